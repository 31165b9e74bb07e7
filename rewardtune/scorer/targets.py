"""From human ratings to what a scorer is trained on: checked labels, target distributions, same-prompt pairs.

The tasks that train scorers call it; losses are `losses.py`'s.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from rewardtune.data.records import PreferenceGroup, RatedImage, read_records
from rewardtune.data.skipped import Skipped
from rewardtune.errors import DataError
from rewardtune.scorer.losses import hard_target, histogram_target, two_hot_target
from rewardtune.scorer.rubric import Rubric
from rewardtune.types import Prompt

SHOWN = 3
"""Offending labels that an error lists."""


def target_maker(kind: str, rubric: Rubric) -> Callable[[RatedImage], Tensor]:
    """From a rated picture to its target (D, K), NaN for dimensions without a rating.

    `hard`: one level; `two-hot`: the two neighbouring levels; `histogram`: every annotator's score, and the two-hot
    target where only an aggregate is known.
    """
    levels, dimensions = torch.tensor(rubric.values), rubric.dimensions

    def make(image: RatedImage) -> Tensor:
        single = torch.tensor([image.scores.get(d, math.nan) for d in dimensions])
        if kind == "hard":
            return hard_target(single, levels)
        if kind == "two-hot" or not image.annotations:
            return two_hot_target(single, levels)
        each = torch.tensor([[a.get(d, math.nan) for a in image.annotations] for d in dimensions])
        counted = histogram_target(each, levels)
        return torch.where(counted.isnan(), two_hot_target(single, levels), counted)

    return make


def check_labels(groups: Sequence[PreferenceGroup], rubric: Rubric, *, target: str) -> None:
    """Raises DataError when labels do not fit the rubric: another scale, none of its dimensions, or, where the target
    is one level (`hard`), scores between levels."""
    lowest, highest = rubric.values[0], rubric.values[-1]
    outside, between, known = [], [], 0
    names: set[str] = set()
    for group in groups:
        for image in group.images:
            names |= image.scores.keys()
            for name, score in image.scores.items():
                if name not in rubric.dimensions:
                    continue
                known += 1
                place = f"{image.image.name} {name} {score:g}"
                if not lowest <= score <= highest:
                    outside.append(place)
                elif min(abs(score - value) for value in rubric.values) > 1e-6:
                    between.append(place)
    if outside:
        raise DataError(
            f"{len(outside):,} labels lie outside the rubric's scale of {lowest:g} to {highest:g}: "
            f"{', '.join(outside[:SHOWN])}{' ...' if len(outside) > SHOWN else ''}. Rescale the scores of the records, "
            "or use a rubric with their levels."
        )
    if names and not known:
        raise DataError(
            f"the records rate {', '.join(sorted(names))}, and the rubric's dimensions are "
            f"{', '.join(rubric.dimensions)}: none is the same. Rename one of the two."
        )
    if between and target == "hard":
        raise DataError(
            f"{len(between):,} labels lie between the rubric's levels: {', '.join(between[:SHOWN])}"
            f"{' ...' if len(between) > SHOWN else ''}. A hard target has one level: set objective.target to "
            "`two-hot`, which keeps their mean, or round the records."
        )


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt, compared in one dimension (an index); the first is the better one.

    ratings: their human scores; None when only the order is known. targets: (2, K), None likewise. critiques: what was
    written about each, empty where nothing was.
    """

    prompt: Prompt
    images: tuple[Path, Path]
    dimension: int
    ratings: tuple[float, float] | None = None
    targets: Tensor | None = field(default=None, compare=False)
    critiques: tuple[str, str] = ("", "")


def read_pairs(records: str | Path, rubric: Rubric, *, target: str, preferences_in: str | None) -> list[Pair]:
    """The pairs of a file of records; says on standard error which records make none. See `make_pairs`.

    Raises DataError for records that cannot be read, or whose labels do not fit the rubric.
    """
    groups = read_records(records)
    check_labels(groups, rubric, target=target)
    pairs, left = make_pairs(groups, rubric, target=target, preferences_in=preferences_in)
    say_what_is_left_out(f"{len(pairs):,} pairs", left)
    return pairs


def say_what_is_left_out(kept: str, left: Skipped) -> None:
    """On standard error: what there is to learn from, and what is not used, by reason and with names."""
    if left:
        print("\n  ".join([f"{kept}; left out:", *left.lines()]), file=sys.stderr)


def make_pairs(
    groups: Sequence[PreferenceGroup], rubric: Rubric, *, target: str, preferences_in: str | None
) -> tuple[list[Pair], Skipped]:
    """All pairs of the records, and which were left out for which reason.

    Scored pictures give a pair for each dimension in which they differ. Stated preferences between pictures without
    scores are about `preferences_in`; DataError when there are some and it is None or no dimension of the rubric.
    """
    make = target_maker(target, rubric)
    pairs: list[Pair] = []
    left = Skipped()
    for group in groups:
        targets = [make(image) for image in group.images]
        before = len(pairs)
        for a, b in combinations(range(len(group.images)), 2):
            both = f"group {group.id}: {group.images[a].image.name} and {group.images[b].image.name}"
            for d, name in enumerate(rubric.dimensions):
                first, second = (group.images[i].scores.get(name) for i in (a, b))
                if first is None or second is None:
                    # pictures of which only a choice is known lack no dimension: it stands among the preferences
                    if group.images[a].scores or group.images[b].scores:
                        left.add(f"for want of a score in {name}", both)
                    continue
                if first == second:
                    left.add("equal scores", f"{both} in {name}")
                    continue
                won, lost = (a, b) if first > second else (b, a)
                pairs.append(
                    Pair(
                        group.prompt, (group.images[won].image, group.images[lost].image), d,
                        (max(first, second), min(first, second)), torch.stack([targets[won][d], targets[lost][d]]),
                        (group.images[won].critique or "", group.images[lost].critique or ""),
                    )
                )  # fmt: skip
        for won, lost in group.preferences:
            if group.images[won].scores and group.images[lost].scores:
                continue
            if preferences_in not in rubric.dimensions:
                raise DataError(
                    "the records hold preferences without scores; say which dimension they are about with "
                    f"objective.preferences_in, one of {', '.join(rubric.dimensions)}."
                )
            images = (group.images[won].image, group.images[lost].image)
            said = (group.images[won].critique or "", group.images[lost].critique or "")
            pairs.append(Pair(group.prompt, images, rubric.dimensions.index(preferences_in), critiques=said))
        if len(group.images) < 2:
            left.add("groups of one picture", f"group {group.id}")
        elif len(pairs) == before:
            left.add("groups without a pair", f"group {group.id}")
    return pairs, left


def rated(
    groups: Sequence[PreferenceGroup], make: Callable[[RatedImage], Tensor], rubric: Rubric
) -> list[tuple[PreferenceGroup, RatedImage, Tensor]]:
    """Pictures with a rating in one of the rubric's dimensions at least, and their targets; says on standard error
    which others are left out, and which lack a dimension, in which they then teach nothing."""
    found, left = [], Skipped()
    for group in groups:
        for image in group.images:
            target = make(image)
            name, known = f"group {group.id}: {image.image.name}", target.isfinite().all(-1)
            if not known.any():
                left.add("pictures without a score", name)
                continue
            for dimension, there in zip(rubric.dimensions, known.tolist(), strict=True):
                if not there:
                    left.add(f"scores in {dimension} that are not there", name)
            found.append((group, image, target))
    say_what_is_left_out(f"{len(found):,} rated pictures", left)
    return found
