"""Preference records -> pictures to score, and what people said of them: first in the flow of `rewards calibrate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewardtune.data.records import PreferenceGroup, RatedImage
from rewardtune.errors import DataError
from rewardtune.scoring.agreement import Array, Pairs
from rewardtune.types import Prompt

Indices = NDArray[np.int64]
FEWEST = 5
"""Ours: prompts with a pair that people order, below which an interval means nothing."""


@dataclass(frozen=True)
class Picture:
    """One picture to score, under one prompt; groups that show it again share it."""

    file: Path
    prompt: Prompt


@dataclass(frozen=True)
class Compared:
    """P pairs of places that people order, in one dimension or overall. first, second, prompt: (P,) indices.

    human: (P,) first minus second, never 0; plus or minus infinity where only the choice is known.
    """

    first: Indices
    second: Indices
    prompt: Indices
    human: Array

    def __len__(self) -> int:
        return len(self.human)

    def beside(self, values: Array) -> Pairs:
        """The same pairs with what a reward says: `values` (N,) of the places. Those without a value are left out."""
        known = ~np.isnan(values[self.first] - values[self.second])
        nothing = np.zeros(int(known.sum()), dtype=np.int64)
        predicted = (values[self.first] - values[self.second])[known]
        return Pairs(self.prompt[known], nothing, self.human[known], predicted)


@dataclass(frozen=True)
class Labels:
    """What people said. N places are the pictures of all groups in their order.

    pictures: U different ones. picture, prompt: (N,) indices, of the picture and of the prompt's text. scores: (N, D),
    NaN where nobody rated. rated: the N records, for their annotators. overall: the pairs that count; each: dimension
    -> pairs. mates: all pairs of a group, whatever people say. dropped: reason -> how many groups or pairs.
    """

    pictures: tuple[Picture, ...]
    picture: Indices
    prompt: Indices
    dimensions: tuple[str, ...]
    counted: tuple[str, ...]
    """The dimensions whose mean is people's overall score."""
    scores: Array
    rated: tuple[RatedImage, ...]
    overall: Compared
    each: dict[str, Compared]
    mates: Compared
    dropped: dict[str, int]

    @property
    def score(self) -> Array:
        """(N,) people's overall score of each place: the mean over the counted dimensions that it is rated in."""
        table = self.scores[:, [self.dimensions.index(name) for name in self.counted]]
        known = ~np.isnan(table)
        count = known.sum(1)
        total = np.where(known, table, 0.0).sum(1)
        out: Array = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return out

    @property
    def prompts(self) -> int:
        """How many prompts have a pair that counts."""
        return len(np.unique(self.overall.prompt))

    def without(self, gone: NDArray[np.bool_]) -> Labels:
        """The same without the pairs and ratings of some pictures: (U,) True for those."""
        bad = gone[self.picture]
        rated = tuple(replace(r, scores={}, annotations=()) if b else r for r, b in zip(self.rated, bad, strict=True))
        return replace(
            self,
            scores=np.where(bad[:, None], np.nan, self.scores),
            rated=rated,
            overall=_kept(self.overall, bad),
            each={name: _kept(pairs, bad) for name, pairs in self.each.items()},
            mates=_kept(self.mates, bad),
        )

    def require(self) -> None:
        """Raises DataError where too little is left to say anything."""
        if len(self.overall) == 0:
            raise DataError(
                "no usable pair: in no group do people order two pictures of one prompt. Give groups of two pictures "
                "or more whose `scores` differ, or rows with `chosen` and `rejected` (docs/data.md)."
            )
        if self.prompts < FEWEST:
            raise DataError(
                f"only {self.prompts} prompt{'s have' if self.prompts > 1 else ' has'} a pair that people order, and "
                f"intervals need {FEWEST}; 50 or more tell rewards apart. Label more groups."
            )


def read_labels(groups: Sequence[PreferenceGroup], *, dimension: str | None = None) -> Labels:
    """What the records say. dimension: whose scores count overall; the mean over all of them when None.

    A stated choice counts instead of the scores of its two pictures. Raises DataError for a dimension that nobody
    rated.
    """
    names = tuple(dict.fromkeys(name for group in groups for image in group.images for name in image.scores))
    if dimension is not None and dimension not in names:
        there = f"they rate: {', '.join(names)}" if names else "they hold choices only, so leave --dimension out"
        raise DataError(f"--dimension {dimension!r}: the records have no such scores; {there}.")
    counted = names if dimension is None else (dimension,)
    where: dict[tuple[str, str, str], int] = {}
    texts: dict[str, int] = {}
    pictures: list[Picture] = []
    picture: list[int] = []
    prompt: list[int] = []
    starts: list[int] = []
    rated: list[RatedImage] = []
    for group in groups:
        starts.append(len(rated))
        facts = json.dumps(dict(group.prompt.metadata), sort_keys=True, default=str)
        for image in group.images:
            key = (str(image.image), str(group.prompt), facts)
            if key not in where:
                where[key] = len(pictures)
                pictures.append(Picture(image.image, group.prompt))
            picture.append(where[key])
            prompt.append(texts.setdefault(str(group.prompt), len(texts)))
            rated.append(image)
    scores = np.full((len(rated), len(names)), np.nan)
    for n, image in enumerate(rated):
        for name, value in image.scores.items():
            scores[n, names.index(name)] = value
    columns = [names.index(name) for name in counted]
    dropped = {"groups without an ordered pair": 0, "pairs that people find equal": 0, "pairs that nobody judged": 0}
    overall: list[tuple[int, int, float]] = []
    mates: list[tuple[int, int, float]] = []
    each: dict[str, list[tuple[int, int, float]]] = {name: [] for name in names}
    for group, start in zip(groups, starts, strict=True):
        # with one dimension asked for, choices between whole pictures are about something else
        stated = {} if dimension is not None else {frozenset(pair): pair for pair in group.preferences}
        before = len(overall)
        for i, j in combinations(range(len(group.images)), 2):
            a, b = start + i, start + j
            mates.append((a, b, np.inf))
            for d, name in enumerate(names):
                if (gap := scores[a, d] - scores[b, d]) and not np.isnan(gap):
                    each[name].append((a, b, float(gap)))
            if (choice := stated.get(frozenset((i, j)))) is not None:
                overall.append((a, b, np.inf if choice[0] == i else -np.inf))
                continue
            gaps = scores[a, columns] - scores[b, columns]
            gaps = gaps[~np.isnan(gaps)]
            if not len(gaps):
                dropped["pairs that nobody judged"] += 1
            elif abs(gaps.mean()) < 1e-9:
                dropped["pairs that people find equal"] += 1
            else:
                overall.append((a, b, float(gaps.mean())))
        dropped["groups without an ordered pair"] += len(overall) == before
    owner = np.array(prompt, dtype=np.int64)
    return Labels(
        pictures=tuple(pictures),
        picture=np.array(picture, dtype=np.int64),
        prompt=owner,
        dimensions=names,
        counted=counted,
        scores=scores,
        rated=tuple(rated),
        overall=_compared(overall, owner),
        each={name: _compared(rows, owner) for name, rows in each.items()},
        mates=_compared(mates, owner),
        dropped=dropped,
    )


def _compared(rows: Sequence[tuple[int, int, float]], prompt: Indices) -> Compared:
    first = np.array([row[0] for row in rows], dtype=np.int64)
    second = np.array([row[1] for row in rows], dtype=np.int64)
    return Compared(first, second, prompt[first], np.array([row[2] for row in rows], dtype=np.float64))


def _kept(pairs: Compared, bad: NDArray[Any]) -> Compared:
    good = ~(bad[pairs.first] | bad[pairs.second])
    return Compared(pairs.first[good], pairs.second[good], pairs.prompt[good], pairs.human[good])
