"""How well the test's truth can be known at all, and what the untrained bases know of it.

Observers: one annotator, a careful person, and the panel without its noise. Bases: at once, after one reasoning, and
the mean over four, with the gain over at once on the same pairs.
Reads what make_judgements.py wrote; writes dev/results/zreward-world.json. Run before any method, on the development
groups; nothing here looks at the test groups.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rewardtune.data.records import RatedImage, read_records
from rewardtune.pocket.panel import DIMENSIONS, PANEL
from rewardtune.scorer.evaluate import beside_people, predict
from rewardtune.scorer.model import load_scorer
from rewardtune.scoring.agreement import Ratings, measure, pairs_of

ROOT = Path(__file__).parents[2]
Scores = Mapping[str, float]
TRACES = 4
"""Reasonings whose distributions are averaged, as RISD's teacher may (ours)."""


def without_noise(opinion: Scores) -> dict[str, float]:
    """The trimmed mean of what the annotators would say of a picture if none of them ever wavered."""
    latent = np.array([opinion[d] for d in DIMENSIONS])
    said = []
    for member in PANEL:
        overall = latent @ np.array(member.emphasis) / sum(member.emphasis)
        mixed = (1 - member.halo) * latent + member.halo * overall
        said.append(np.clip(3.5 + member.gain * (mixed - 3.5) + np.array(member.bias), 1, 5))
    return dict(zip(DIMENSIONS, np.sort(np.array(said), 0)[1:-1].mean(0).tolist(), strict=True))


def agreement(data: Path, observer: Callable[[RatedImage, Scores], Scores]) -> dict[str, Any]:
    """Figures of an observer who sees an image's ratings and the opinion behind them."""
    lines = (data / "opinions.jsonl").read_text().splitlines()
    opinions = {row["image"]: row["values"] for row in map(json.loads, lines)}
    rows: list[tuple[float, ...]] = []
    for g, group in enumerate(read_records(data / "development.jsonl")):
        for image in group.images:
            said = observer(image, opinions[f"images/development/{image.image.name}"])
            rows += [(g, len(rows) // 4, d, image.scores[n], said[n], 0, 0) for d, n in enumerate(DIMENSIONS)]
    table = np.array(rows)
    whole = table[:, :3].astype(np.int64)
    found = measure(Ratings(*whole.T, *table[:, 3:].T), DIMENSIONS)
    parts = {name: round(part["hpa"], 4) for name, part in found["dimensions"].items()}
    kept = {name: round(found[name], 4) for name in ("hpa", "margin_hpa", "near_hpa", "plcc", "srcc")}
    return {**kept, "ci95": {k: v for k, v in found["ci95"].items() if k in kept}, "dimensions": parts}


def base(data: Path, name: str) -> dict[str, dict[str, Any]]:
    """Figures of an untrained base in its three ways of judging."""
    groups = read_records(data / "development.jsonl")
    scorer = load_scorer(name)
    ways = {"at once": 0, "reasoned": 1, f"reasoned {TRACES} times": TRACES}
    found: dict[str, dict[str, Any]] = {}
    rights: dict[str, Any] = {}
    for how, traces in ways.items():
        predicted, tokens = predict(scorer, groups, batch_size=64, reasoning=traces)
        ratings = beside_people(scorer, groups, predicted)
        document, pairs = measure(ratings, DIMENSIONS), pairs_of(ratings)
        right = pairs.predicted * pairs.human > 0
        rights[how] = np.stack([np.bincount(pairs.group, right, len(groups)), np.bincount(pairs.group)], 1)
        parts = {dimension: round(part["hpa"], 4) for dimension, part in document["dimensions"].items()}
        found[how] = {**document, "tokens_per_score": round(tokens, 2), "dimensions": parts}
        if traces:
            found[how]["gain"] = gain(rights[how], rights["at once"])
    return {f"{name.removeprefix('pocket:').replace('-', ' ')}, {how}": figures for how, figures in found.items()}


def gain(one: Any, other: Any) -> dict[str, Any]:
    """Difference in pair accuracy and its 95 % bootstrap interval over the same groups."""
    drawn = np.random.default_rng(0).integers(len(one), size=(2000, len(one)))
    shares = [np.concatenate([c.sum(0)[None], c[drawn].sum(1)]) for c in (one, other)]
    (a, b) = (share[:, 0] / share[:, 1] for share in shares)
    return {"hpa": float(a[0] - b[0]), "ci95": np.percentile((a - b)[1:], [2.5, 97.5]).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "build/pocket/judgements")
    parser.add_argument("--out", type=Path, default=ROOT / "dev/results/zreward-world.json")
    args = parser.parse_args()
    report: dict[str, Any] = {
        f"annotator {member.name}": agreement(args.data, lambda image, _, i=i: image.annotations[i])
        for i, member in enumerate(PANEL)
    }
    report["careful person"] = agreement(args.data, lambda _, opinion: opinion)
    report["panel without noise"] = agreement(args.data, lambda _, opinion: without_noise(opinion))
    for name in ("pocket:teacher-base", "pocket:student-base"):
        report |= base(args.data, name)
    for name, figures in report.items():
        print(f"{name:31s}", *(f"{k} {figures[k]:.3f}" for k in ("hpa", "margin_hpa", "near_hpa", "plcc")))
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
