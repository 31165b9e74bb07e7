"""The document of `rewards calibrate` -> `calibration.html`: one file, no network, no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewardtune.calibration.verdict import CHANCE, points, share
from rewardtune.pages.html import render_page

_HERE = Path(__file__).parent
FEW_PAIRS = 30
"""Ours: accuracies of fewer pairs are shown faintly."""
Words = Callable[[float], str]
Strength = Callable[[float], float]
_DIAGRAM = 100.0
"""Side of a reliability diagram, in its own units."""


def render(document: Mapping[str, Any]) -> str:
    """The page's HTML."""
    rewards = document["rewards"]
    values = {
        "document": document,
        "lines": [{"label": label, **reward, "bar": _bar(reward)} for label, reward in rewards.items()],
        "gaps": [_gap(entry) for entry in document["differences"] if entry["hpa"]],
        "dimensions": _dimensions(document),
        "few_pairs": FEW_PAIRS,
        "tables": _tables(document),
        "reliable": [_reliable(label, r["reliability"]) for label, r in rewards.items()
                     if isinstance(r["reliability"], dict)],
        "unreliable": [(label, r["reliability"]) for label, r in rewards.items()
                       if isinstance(r["reliability"], str)],
    }  # fmt: skip
    filters: dict[str, Callable[..., Any]] = {
        "share": share,
        "points": points,
        "between": between,
        "gap": gap,
        "seconds": seconds,
        "two": "{:.2f}".format,
    }
    return render_page(_HERE / "calibration.html.j2", values, filters=filters)


def between(ends: Sequence[float]) -> str:
    """[78.8, 84.1], an interval of shares in percent."""
    return f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def gap(ends: Sequence[float]) -> str:
    """[+1.2, +4.3], an interval of a difference of shares in points."""
    return f"[{100 * ends[0]:+z.1f}, {100 * ends[1]:+z.1f}]"


def seconds(value: float) -> str:
    """0.9 ms, 24 ms, 1.31 s"""
    if value < 1:
        return f"{1000 * value:.2g} ms" if value < 0.1 else f"{1000 * value:.0f} ms"
    return f"{value:.2f} s"


def _bar(reward: Mapping[str, Any]) -> list[float]:
    """Places of low, middle and high of the pair accuracy on an axis from 0 (all wrong) to 200 (all right)."""
    low, high = reward["ci95"]["hpa"]
    return [round(200 * x, 1) for x in (low, reward["hpa"], high)]


def _gap(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A difference with its places on an axis from 0 (50 points less) to 200 (50 points more)."""
    gap = entry["hpa"]
    ends = (gap["ci95"][0], gap["difference"], gap["ci95"][1])
    return {**entry, **gap, "bar": [round(100 + 200 * max(-0.5, min(0.5, x)), 1) for x in ends]}


def _dimensions(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of dimensions: each reward, then its parts. None without dimensions and parts."""
    rows = []
    for label, reward in document["rewards"].items():
        overall = {"hpa": reward["hpa"], "ci95": reward["ci95"]["hpa"], "pairs": reward["pairs"]}
        cells = [overall, *(reward["dimensions"][d] for d in document["dimensions"])]
        rows.append({"name": label, "part": False, "cells": [_heat(cell) for cell in cells]})
        for part, found in reward["parts"].items():
            cells = [found["overall"], *(found[d] for d in document["dimensions"])]
            if any(cell["hpa"] is not None for cell in cells):
                rows.append({"name": part, "part": True, "cells": [_heat(cell) for cell in cells]})
    return rows


def _heat(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A pair accuracy with the class of its colour: hot above chance, cold below."""
    return {
        **cell,
        "tone": "" if cell["hpa"] is None else tone(_over_chance(cell["hpa"])),
        "few": cell["pairs"] < FEW_PAIRS,
    }


def tone(strength: float) -> str:
    """-1 to 1 -> a class of the style sheet, cold-10 to hot-10."""
    step = min(10, round(abs(strength) * 10))
    return f"{'hot' if strength >= 0 else 'cold'}-{step}"


def _tables(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The matrices of every two rewards."""
    between, labels = document["between_rewards"], list(document["rewards"])
    kinds: tuple[tuple[str, str, str, Words, Strength], ...] = (
        ("Values", "Spearman correlation over all pictures.", "spearman", "{:+z.2f}".format, _as_it_is),
        ("Order of pairs", "Share of same-prompt pairs that both put in one order.", "pair_agreement", share,
         _over_chance),
        ("Errors", "Correlation of being wrong about the same pairs. A judge wants little.", "error_correlation",
         "{:+z.2f}".format, _as_it_is),
        ("Caught", "Of the pairs that the row gets wrong, the share that the column gets right.", "catches", share,
         _over_chance),
    )  # fmt: skip
    tables = []
    for title, caption, key, words, strength in kinds:
        rows = []
        for a in labels:
            cells = []
            for b in labels:
                found = between[key][a][b]
                found = found["share"] if isinstance(found, dict) else found
                known = found is not None and a != b
                cells.append({"text": words(found) if known else "–", "tone": tone(strength(found)) if known else ""})
            rows.append({"name": a, "cells": cells})
        tables.append({"title": title, "caption": caption, "rows": rows})
    return tables


def _as_it_is(correlation: float) -> float:
    return correlation


def _over_chance(found: float) -> float:
    """A share as -1 (none) to 1 (all)."""
    return (found - CHANCE) / (1 - CHANCE)


def _reliable(label: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A reward's reliability with the dots of its diagrams, on the half of the prompts that nothing was fitted to."""
    held = found["reported_on"]
    diagrams = [
        {"title": "as it is", "kind": "before", **held["before"], "dots": _dots(held["before"]["bins"])},
        {"title": f"at temperature {found['temperature']:.2f}", "kind": "after", **held["after"],
         "dots": _dots(held["after"]["bins"])},
    ]  # fmt: skip
    return {"label": label, **found, "diagrams": diagrams}


def _dots(bins: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One dot a bin: across how sure, up how often right, its area the number of ratings."""
    most = max(b["ratings"] for b in bins)
    return [
        {"x": round(_DIAGRAM * b["confidence"], 1), "y": round(_DIAGRAM * (1 - b["agreed"]), 1),
         "r": round(1.2 + 4.5 * (b["ratings"] / most) ** 0.5, 1), "ratings": b["ratings"]}
        for b in bins
    ]  # fmt: skip
