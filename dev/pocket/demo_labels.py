"""What the demo's reward learns from: a few hundred labelled groups, and every other picture without its labels.

    python dev/pocket/demo_labels.py build/pocket --annotated build/pocket/annotations/train.jsonl ...

writes OUT/demo-labelled.jsonl (sampled groups of the annotated ones, and the labelled ones of the Z-Reward table) and
OUT/demo-pictures.jsonl (all pictures; RISD's student sees the teacher's judgements of them).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rewardtune.randomness import choice


def read(file: Path, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Group -> rows, their pictures named from OUT."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        row["image"] = str((file.parent / row["image"]).resolve().relative_to(out.resolve()))
        groups.setdefault(row["group"], []).append(row)
    return groups


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{file}: {len(rows):,} pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that holds all pictures")
    parser.add_argument("--annotated", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--judgements", type=Path, default=Path("build/pocket/judgements"))
    parser.add_argument("--groups", type=int, default=600, help="annotated groups whose labels are used")
    args = parser.parse_args()
    annotated = {name: rows for file in args.annotated for name, rows in read(file, args.out).items()}
    few = read(args.judgements / "labelled.jsonl", args.out)
    more = read(args.judgements / "unlabelled.jsonl", args.out)
    chosen = choice(0, "demo/labels").sample(sorted(annotated), args.groups)
    write(args.out / "demo-labelled.jsonl", [r for g in (*(annotated[n] for n in chosen), *few.values()) for r in g])
    pictures = [row for part in (annotated, few, more) for rows in part.values() for row in rows]
    bare = [{key: row[key] for key in ("group", "prompt", "image")} for row in pictures]
    write(args.out / "demo-pictures.jsonl", bare)


if __name__ == "__main__":
    main()
