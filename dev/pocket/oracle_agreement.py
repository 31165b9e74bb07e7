"""How far the held-out judge agrees with the people who labelled the pipeline's samples by looking at them.

Reads dev/pocket/oracle_labels.jsonl and its pictures; prints, and writes with --out, agreement with intervals.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from label_sheet import in_words, pictures
from rewardtune.rewards.pocket_oracle import KINDS, PocketOracle
from scipy.stats import binomtest

LABELS = Path(__file__).parent / "oracle_labels.jsonl"
IMAGES = LABELS.with_suffix(".png")


def share(agreed: Sequence[bool]) -> dict[str, Any]:
    """Share that agreed, with its 95 % Wilson interval."""
    interval = binomtest(sum(agreed), len(agreed)).proportion_ci(0.95, method="wilson")
    return {"agreement": round(sum(agreed) / len(agreed), 4), "facts": len(agreed),
            "ci95": [round(float(interval.low), 4), round(float(interval.high), 4)]}  # fmt: skip


def agreement(rows: Sequence[dict[str, Any]], said: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Overall, by kind of fact, and by what the person said; also whole pictures (all facts right or not)."""
    flat = [(fact["kind"], row.get("kind"), person, oracle) for row, verdicts in zip(rows, said, strict=True)
            for fact, person, oracle in zip(row["facts"], row["person"], verdicts, strict=True)]  # fmt: skip
    report = {"overall": share([p == o for _, _, p, o in flat])}
    report |= {kind: share(own) for kind in KINDS if (own := [p == o for k, _, p, o in flat if k == kind])}
    for name, value in (("person says right", True), ("person says wrong", False)):
        if own := [o == value for _, _, p, o in flat if p == value]:
            report[name] = share(own)
    samples = sorted({row["kind"] for row in rows if "kind" in row})
    report["samples"] = {kind: share([p == o for _, k, p, o in flat if k == kind]) for kind in samples}
    if all("votes" in row for row in rows):
        report["labellers"] = each_other([votes for row in rows for votes in row["votes"]])
    report["whole pictures"] = share([all(r["person"]) == all(v) for r, v in zip(rows, said, strict=True)])
    report["all facts right"] = {"person": round(float(np.mean([all(r["person"]) for r in rows])), 4),
                                 "oracle": round(float(np.mean([all(v) for v in said])), 4)}  # fmt: skip
    return report


def each_other(votes: Sequence[int]) -> dict[str, Any]:
    """How often two labellers say the same of a fact; `votes` counts those who say that it holds."""
    count = max(votes)  # some fact convinces all of them
    same = [math.comb(v, 2) + math.comb(count - v, 2) for v in votes]
    return {"labellers": count, "agreement": round(sum(same) / (math.comb(count, 2) * len(votes)), 4)}


def judged(
    labels: Path, images: Path, oracle: PocketOracle
) -> tuple[list[dict[str, Any]], list[Any], list[list[bool]]]:
    """Labelled rows, what the judge read in their pictures, and its verdict on each of their facts."""
    rows = [json.loads(line) for line in labels.read_text().splitlines() if line.strip()]
    tiles = pictures(images)
    x = torch.stack([torch.from_numpy(np.array(tiles[row["image"]])).permute(2, 0, 1) for row in rows]).float() / 255
    claims = [row["facts"] for row in rows]
    readings = [reading for i in range(0, len(rows), 50) for reading in oracle.read(x[i : i + 50], claims[i : i + 50])]
    said = [oracle.check(reading, row["facts"]) for reading, row in zip(readings, rows, strict=True)]
    return rows, readings, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=Path, default=LABELS)
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder, or one PNG of tiles")
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--disagreements", action="store_true", help="list the facts on which the two differ")
    args = parser.parse_args()
    rows, readings, said = judged(args.labels, args.images, PocketOracle.load(PocketOracle.Config()))
    report = agreement(rows, said)
    flat = {name: figures for name, figures in report.items() if name != "samples"} | report["samples"]
    for name, figures in flat.items():
        print(f"{name:30s}", *(f"{key} {value}" for key, value in figures.items()))
    if args.disagreements:
        for row, reading, verdicts in zip(rows, readings, said, strict=True):
            for fact, person, verdict in zip(row["facts"], row["person"], verdicts, strict=True):
                if person != verdict:
                    seen = [(o.concept, o.tint, round(o.x), round(o.y), round(o.side)) for o in reading.objects]
                    print(f"#{row['image']} {in_words(fact)}: person {person}, oracle {verdict}; it saw {seen}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
