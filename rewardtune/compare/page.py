"""`compare.json`, scores and images -> `report.html`: one file, no network, no script but its own.

Last in the flow of `compare`. Prompts and names are text from outside: the template escapes them, and the page's
content security policy names its one style sheet and its one script by hash, so that nothing else runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewardtune.compare.report import HUMAN, count_words, judge_verdicts, pairs_of, percent, signed, verdict_words
from rewardtune.compare.sampling import Plan, image_file, image_seed
from rewardtune.compare.scores import Scored
from rewardtune.data.images import open_image
from rewardtune.pages.files import write_bytes
from rewardtune.pages.html import curve, picture, render_page

_HERE = Path(__file__).parent


def write_page(folder: Path, document: Mapping[str, Any], scored: Sequence[Scored], plan: Plan) -> None:
    """Write `folder/report.html`."""
    write_bytes(folder / "report.html", render(folder, document, scored, plan).encode())


def render(folder: Path, document: Mapping[str, Any], scored: Sequence[Scored], plan: Plan) -> str:
    """The page's HTML. Reads images from `folder/images/`."""
    judge = next((s for s in scored if document["judge"] and s.label == document["judge"]["name"]), None)
    pairs = pairs_of(document["sides"], document["reference"])
    verdicts = {pair: judge_verdicts(judge, *pair).tolist() for pair in pairs} if judge else {}
    values = {
        "document": document,
        "contests": [_contest(document, a, b) for a, b in pairs if document["pairs"]],
        "groups": _groups(document, scored),
        "guards": [_guard(name, watched) for name, watched in document.get("guards", {}).items()],
        "rows": [_row(folder, document, scored, plan, judge, verdicts, i) for i in range(len(plan.items))],
        "pairs": pairs,
        "data": {"report": document["report"], "sides": document["sides"], "pairs": pairs},
        "human": HUMAN,
    }
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    filters = {"percent": percent, "signed": signed, "p_value": p_value}
    return render_page(_HERE / "report.html.j2", values, script=script, filters=filters)


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _guard(name: str, watched: Mapping[str, Any]) -> dict[str, Any]:
    """A side's guard with its charts over optimiser steps: held-out score, trained objective, diversity and drift, the
    last two with the limit that the recipe sets."""
    looks = watched["looks"]
    titles = {"score": "held-out score", "trained": "trained objective", "diversity": "diversity, of the start's",
              "drift": "drift from the start"}  # fmt: skip
    steps = [look["step"] for look in looks]
    chosen = min(range(len(steps)), key=lambda i: abs(steps[i] - watched["exported_step"]))
    charts = []
    for key, title in titles.items():
        values = [look[key] for look in looks]
        if None not in values:
            setting = _LIMITS.get(key, "")
            limit = watched.get(setting)
            # the limit is in the frame, however far from it the run stayed
            there = values if limit is None else [*values, limit]
            points = curve(steps, values, (min(there), max(there)))["points"]
            charts.append({"title": title, "first": values[0], "last": values[-1], "points": points,
                           "low": min(values), "high": max(values), "limit": _limit(setting, limit, there),
                           "chosen": points[chosen], "chosen_value": values[chosen]})  # fmt: skip
    return {"side": name, **watched, "charts": charts}


_LIMITS = {"diversity": "min_diversity", "drift": "max_drift"}
"""What a guard limits -> its setting in the recipe."""


def _limit(setting: str, limit: float | None, frame: Sequence[float]) -> dict[str, Any] | None:
    """Height of a limit's line in a chart with these values, and of its label: above the line where there is room."""
    if limit is None:
        return None
    height = curve([0], [limit], (min(frame), max(frame)))["points"][0][1]
    return {"name": setting, "value": limit, "y": height, "label_y": height - 3 if height > 16 else height + 10}


def _contest(document: Mapping[str, Any], a: str, b: str) -> dict[str, Any]:
    """One pair of sides: every net win rate there is, the judge's first, then its parts', then people's."""
    lines = []
    found = [pair for pair in document["pairs"] if (pair["a"], pair["b"]) == (a, b)]
    for pair in found:
        lines.append({"name": pair["judge"], "kind": "human" if pair["judge"] == HUMAN else "judge", **_net(pair)})
        for part, result in pair.get("parts", {}).items():
            lines.append({"name": f"{part} alone", "kind": "part", **_net(result)})
    lead = found[0] if found else None
    votes = document["votes"]["pairs"] if document["votes"] else []
    return {
        "a": a,
        "b": b,
        "lead": lead,
        "verdict": verdict_words(lead) if lead else "",
        "counts": count_words(lead) if lead else "",
        "lines": lines,
        "votes": next((entry for entry in votes if (entry["a"], entry["b"]) == (a, b)), None),
    }


def _net(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A net win rate with the places of its marks on an axis from 0 (net -1) to 200 (net +1)."""
    total = pair["wins"] + pair["ties"] + pair["losses"]
    place = [round(100 + 100 * x, 1) for x in (pair["net_ci95"][0], pair["net"], pair["net_ci95"][1])]
    share = [round(100 * pair[key] / total, 2) for key in ("wins", "ties", "losses")]
    return {**pair, "place": place, "share": share, "total": total}


def _groups(document: Mapping[str, Any], scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Rewards, held-out ones first and trained ones apart; each followed by its parts."""
    judge = document["judge"]["name"] if document["judge"] else None
    groups = []
    for title, trained in (("Held out: no side was trained on these", False), ("Trained on by a side", True)):
        lines = []
        for reward in sorted((s for s in scored if s.trained is trained), key=lambda s: s.label != judge):
            for part in [None, *reward.parts]:
                cells = [_cell(document["rewards"][side][reward.label], part, reward) for side in document["sides"]]
                if cells[0] is not None:
                    lines.append(
                        {"name": part or reward.label, "part": part, "judge": reward.label == judge, "cells": cells}
                    )
        if lines:
            groups.append({"title": title, "lines": lines})
    return groups


def _cell(entry: Mapping[str, Any], part: str | None, reward: Scored) -> dict[str, Any] | None:
    figures = entry if part is None else entry["parts"].get(part)
    if figures is None:
        return None
    low, high = figures["delta_ci95"]
    better, worse = (low > 0, high < 0) if reward.sign > 0 else (high < 0, low > 0)
    trend = "better" if better else "worse" if worse else "same"
    return {**{k: figures[k] for k in ("mean", "ci95", "delta", "delta_ci95")}, "trend": trend}


def _row(
    folder: Path,
    document: Mapping[str, Any],
    scored: Sequence[Scored],
    plan: Plan,
    judge: Scored | None,
    verdicts: Mapping[tuple[str, str], Sequence[int]],
    i: int,
) -> dict[str, Any]:
    """One prompt and seed: every side's image and scores, and each pair's verdict."""
    p, k = plan.items[i]
    margins = []
    for a, b in verdicts:
        assert judge is not None
        margins.append(round(judge.sign * (judge.images[a][i].value - judge.images[b][i].value), 6))
    return {
        "index": i,
        "prompt_index": p,
        "seed_index": k,
        "seed": image_seed(p, k),
        "prompt": str(plan.prompts[p]),
        "verdicts": [("loss", "tie", "win")[1 + column[i]] for column in verdicts.values()],
        "margins": margins,
        "figures": [
            {
                "side": side,
                **picture(open_image(folder / "images" / side / image_file(p, k))),
                "scores": [_score(reward, side, i, reward is judge) for reward in scored],
            }
            for side in document["sides"]
        ],
    }


def _score(reward: Scored, side: str, i: int, judge: bool) -> dict[str, Any]:
    """One reward on one image; `charts` draws its distribution, one small bar chart a dimension."""
    image = reward.images[side][i]
    charts = []
    if image.distribution is not None and image.dimensions is not None and image.levels is not None:
        for (name, mean), shares in zip(image.dimensions.items(), image.distribution, strict=True):
            peak = image.levels[max(range(len(shares)), key=shares.__getitem__)]
            charts.append(
                {"name": name, "mean": mean, "peak": peak, "path": bars(shares), "width": 5 * len(shares) - 1}
            )
    parts = {name: value for name, value in image.parts.items() if value is not None and "/" not in name}
    parts = {name: value for name, value in parts.items() if name not in (image.dimensions or {})}
    return {"label": reward.label, "value": image.value, "judge": judge, "parts": parts, "charts": charts}


def bars(shares: Sequence[float], *, height: int = 16) -> str:
    """SVG path of K bars, 4 units wide and 5 apart; the whole height is probability 1, half of it 0.25.

    Heights are square roots of the shares, so that small probabilities stay visible.
    """
    out = []
    for k, share in enumerate(shares):
        tall = round(height * max(share, 0.0) ** 0.5, 1)
        out.append(f"M{5 * k} {height}v-{max(tall, 0.5):g}h4V{height}z")
    return "".join(out)
