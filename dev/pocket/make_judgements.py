"""Draw the groups of the Z-Reward table: few rated ones to learn from, many without ratings, and test groups.

Renders only, so the world is the same everywhere: clean, misread, with drawing faults, and of something else. Writes

    labelled.jsonl      train split; one score a picture on half points, as after a team's own checking, and critiques
    histograms.jsonl    the same pictures with every annotator's scores
    unlabelled.jsonl    train split; pictures and prompts
    few.jsonl           the first 300 of these groups, for the control over the number of traces
    development.jsonl   validation split; twelve ratings a picture, the highest and lowest dropped, the mean on half
                        points, so that pictures nobody can tell apart are ties and not coin tosses
    test.jsonl          held-out split, likewise, two pictures a prompt; its compositions appear nowhere else
    opinions.jsonl      what a careful person would say of every picture: the ceiling, shown to nobody

into OUT, with the pictures under OUT/images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from annotate import draft_groups, rate_group

from rewardtune.data.records import PreferenceGroup, RatedImage, write_records
from rewardtune.pocket.panel import aggregate, rate
from rewardtune.pocket.scenes import Split
from rewardtune.randomness import choice

SETS: dict[str, tuple[Split, int]] = {
    "labelled": ("train", 300),
    "unlabelled": ("train", 3000),
    "development": ("validation", 200),
    "test": ("heldout", 2000),
}
"""Split and groups of each set (ours): labels are scarce and pictures plentiful, as in life."""
FEW = 300


def seen(image: RatedImage, kind: str, again: Sequence[Mapping[str, float]]) -> RatedImage:
    """What a set shows of a picture that every annotator has rated, and has rated `again` on another day."""
    if kind == "unlabelled":
        return RatedImage(image.image)
    if kind == "labelled":
        agreed = on_half_points(aggregate(image.annotations, trimmed=False))
        return RatedImage(image.image, agreed, (), image.critique)
    ratings = (*image.annotations, *again)
    return RatedImage(image.image, on_half_points(aggregate(ratings, trimmed=True)), ratings)


def on_half_points(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(score * 2) / 2 for name, score in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for name, (_, count) in SETS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"groups (default {count})")
    args = parser.parse_args()
    started = time.monotonic()
    opinions: list[str] = []
    for name, (split, _) in SETS.items():
        folder = args.out / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        groups: list[PreferenceGroup] = []
        whole: list[PreferenceGroup] = []
        # a seed of its own: the two sets of the train split must not share pictures
        seed = args.seed + 1000 * (1 + list(SETS).index(name))
        for i, draft in enumerate(draft_groups(split, getattr(args, name), seed=seed, samples={}, decoding=False)):
            rng = choice(seed, f"rate/{name}", i)
            if name == "test":
                # pictures are shuffled; more prompts say more than more pictures of each
                draft.pictures = draft.pictures[:2]
            group = rate_group(f"{name}-{i:05d}", draft, folder, split=split, rng=rng)
            shown = []
            for image, picture in zip(group.images, draft.pictures, strict=True):
                assert picture.opinion is not None
                shown.append(seen(image, name, rate(picture.opinion, rng)))
                values = {name: round(value, 3) for name, value in picture.opinion.values.items()}
                opinions.append(json.dumps({"image": f"images/{name}/{image.image.name}", "values": values}))
            whole.append(group)
            groups.append(replace(group, images=tuple(shown)))
        write_records(groups, args.out / f"{name}.jsonl")
        if name == "labelled":
            write_records(whole, args.out / "histograms.jsonl")
        if name == "unlabelled":
            write_records(groups[:FEW], args.out / "few.jsonl")
        (args.out / "opinions.jsonl").write_text("\n".join(opinions) + "\n", encoding="utf-8")
        print(f"{name}: {len(groups):,} groups after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
