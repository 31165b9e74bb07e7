"""The document and pictures of a probe -> `probe.html`: one file, no network, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rewardtune.data.images import to_pil
from rewardtune.pages.html import CHART, MARGIN, curve, picture, render_page
from rewardtune.probe.verdict import signed

_HERE = Path(__file__).parent
BRIGHTER = 4
"""Ours: how many times a difference of pixels is enlarged, around grey."""


def render(document: Mapping[str, Any], shown: Sequence[Mapping[int, Tensor]]) -> str:
    """The page's HTML. shown: for each start, step -> (3, H, W) in [0, 1], step 0 and the end of each budget."""
    rewards = {document["reward"]["label"]: document["reward"], **document["judges"]}
    chosen = next(e for e in document["budgets"] if e["budget"] == document["verdict"]["budget"])
    values = {
        "document": document,
        "rewards": rewards,
        "chosen": chosen,
        "charts": [_chart(document, label, label == document["reward"]["label"]) for label in rewards],
        "marks": _marks(document),
        "strips": [_strip(document, i, steps) for i, steps in enumerate(shown)],
        "brighter": BRIGHTER,
    }
    filters = {"signed": signed, "pixels": lambda x: f"{255 * x:.1f}"}
    return render_page(_HERE / "probe.html.j2", values, filters=filters)


def _chart(document: Mapping[str, Any], label: str, probed: bool) -> dict[str, Any]:
    """One reward along the walk: a line for each picture, and their mean; noise apart."""
    steps = [look["step"] for look in document["looks"]]
    table = [[look["values"][label][i] for look in document["looks"]] for i in range(len(document["starts"]))]
    limits = (min(map(min, table)), max(map(max, table)))
    real = [row for row, start in zip(table, document["starts"], strict=True) if start["kind"] != "noise"]
    mean = [sum(column) / len(real) for column in zip(*real, strict=True)]
    noise = [row for row, start in zip(table, document["starts"], strict=True) if start["kind"] == "noise"]
    return {
        "label": label, "probed": probed, "low": limits[0], "high": limits[1], "first": mean[0], "last": mean[-1],
        "mean": curve(steps, mean, limits)["points"],
        "each": [curve(steps, row, limits)["points"] for row in real],
        "noise": [curve(steps, row, limits)["points"] for row in noise],
    }  # fmt: skip


def _marks(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where each budget ends on the axis of steps."""
    last, width = document["rule"]["steps"], CHART[0] - 2 * MARGIN
    return [{"x": round(MARGIN + width * e["step"] / last, 1), "budget": e["budget"]} for e in document["budgets"]]


def _strip(document: Mapping[str, Any], i: int, steps: Mapping[int, Tensor]) -> dict[str, Any]:
    """One start: the picture at each budget with everybody's verdict, and what was added in the end."""
    budgets = {0: 0, **{e["step"]: e["budget"] for e in document["budgets"]}}
    seen = {look["step"]: look["values"] for look in document["looks"]}
    tiles = [
        {"title": f"± {budgets[step]}/255" if step else "start", "picture": picture(to_pil(image[None])[0]),
         "values": {label: rows[i] for label, rows in seen[step].items()}}
        for step, image in sorted(steps.items())
    ]  # fmt: skip
    last = max(steps)
    added = (0.5 + BRIGHTER * (steps[last] - steps[0])).clamp(0, 1)
    return {**document["starts"][i], "tiles": tiles, "added": picture(to_pil(added[None])[0])}
