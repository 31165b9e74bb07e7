"""Pictures of the Z-Reward table: training with either reward, accuracy against tokens, the student's reliability."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zreward_report import Found

CURVES = {"gdso": ("student-gdso", "gdso-parsed"), "grpo": ("student-grpo", "grpo-parsed")}
"""Method: the run whose reward is the expectation, and the one whose reward is the score in the text."""


def draw(results: Path, page: Path, found: Sequence[Found]) -> list[str]:
    """Write PNGs beside the page; its lines that show them. A picture whose rows are not finished is left out."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                                "savefig.dpi": 120, "figure.constrained_layout.use": True})  # fmt: skip
    captions = {
        "steps": (_steps(results), "Pair accuracy over steps, development groups. Line: the reward in training. Read "
                  "by the expectation (solid) and by the score that the text says (dotted)."),
        "tokens": (_tokens(found), "Pair accuracy on the test groups against output tokens for one score."),
        "reliability": (_reliability(found), "How often the most likely level is the people's, against how likely it "
                        "was said to be; area: number of scores."),
    }  # fmt: skip
    lines = []
    for name, (figure, caption) in captions.items():
        if figure is not None:
            file = page.with_name(f"{page.stem}-{name}.png")
            figure.savefig(file, metadata={"Software": None})
            lines += ["", f"![{caption}]({file.name})", "", caption]
    return ["", "## Pictures", *lines] if lines else []


def _steps(results: Path) -> Any:
    from matplotlib import pyplot

    curves = {name: json.loads(file.read_text())["rows"] for pair in CURVES.values() for name in pair
              if (file := results / f"{name}.curve.json").exists()}  # fmt: skip
    if not curves:
        return None
    figure, axes = pyplot.subplots(2, 2, figsize=(7.5, 5), sharex=True, sharey="row")
    for (method, names), column in zip(CURVES.items(), axes.T, strict=True):
        for name, reward, colour in zip(names, ("expectation", "text"), ("tab:blue", "tab:orange"), strict=True):
            rows = curves.get(name, [])
            for metric, axis in zip(("hpa", "margin_hpa"), column, strict=True):
                for read, style in (("expectation", "-"), ("text", ":")):
                    axis.plot([r["step"] for r in rows], [r[f"{read}/{metric}"] for r in rows], style, marker=".",
                              color=colour, label=f"reward: {reward}" if read == "expectation" else None)  # fmt: skip
        column[0].set_title(method.upper())
        column[1].set_xlabel("optimiser steps")
    axes[0, 0].set_ylabel("pair accuracy")
    axes[1, 0].set_ylabel("where people differ by > 0.5")
    axes[0, 0].legend(frameon=False)
    return figure


LINE = 0.0045
"""Pair accuracy that a line of names takes."""


def _tokens(found: Sequence[Found]) -> Any:
    from matplotlib import pyplot

    rows = [row for row in found if not row.control]
    if len(rows) < 2:
        return None
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for row in rows:
        tokens, hpa = row.mean("tokens_per_score"), row.mean("hpa")
        values = [f["hpa"] for f in row.figures]
        marker, colour = ("s", "tab:blue") if row.size == "teacher" else ("o", "tab:orange")
        axis.vlines(tokens, min(values), max(values), color=colour, alpha=0.5)
        axis.plot(tokens, hpa, marker, color=colour)
    # names beside their points, lowest first, each a line above the one below it
    height: dict[bool, float] = {}
    for row in sorted(rows, key=lambda row: row.mean("hpa")):
        tokens, hpa = row.mean("tokens_per_score"), row.mean("hpa")
        long = tokens > 4
        height[long] = place = max(hpa, height.get(long, 0.0) + LINE)
        axis.annotate(row.method, (tokens, hpa), xytext=(tokens + 0.15, place), fontsize=8, va="center")
    for size, marker, colour in (("teacher's size", "s", "tab:blue"), ("student's size", "o", "tab:orange")):
        axis.plot([], [], marker, color=colour, label=size)
    axis.set_xlabel("output tokens for one score")
    axis.set_ylabel("pair accuracy (mean over seeds; bar: their range)")
    axis.set_xlim(right=axis.get_xlim()[1] + 2)
    axis.legend(frameon=False, loc="lower center")
    return figure


def _reliability(found: Sequence[Found]) -> Any:
    from matplotlib import pyplot

    named = {row.name: row for row in found}
    rows = [named[name] for name in ("student-risd", "student-sft") if name in named]
    if not rows:
        return None
    figure, axes = pyplot.subplots(1, len(rows), figsize=(3.6 * len(rows), 3.6), sharey=True, squeeze=False)
    for row, axis in zip(rows, axes[0], strict=True):
        axis.plot([0, 1], [0, 1], color="0.8", zorder=0)
        for count, confidence, agreed in (bin for f in row.figures for bin in f["reliability"]):
            if count:
                total = sum(c for c, _, _ in row.figures[0]["reliability"])
                axis.scatter(confidence / count, agreed / count, s=600 * count / total, color="tab:blue", alpha=0.4)
        axis.set_title(f"{row.method} student, calibration error {row.mean('ece'):.3f}", fontsize=9)
        axis.set_xlabel("probability of the most likely level")
    axes[0][0].set_ylabel("share of people on that level")
    return figure
