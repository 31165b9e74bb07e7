"""How good a scorer is, measured against people: pair accuracies, correlations and calibration, with intervals.

Behind `rewardtune evaluate` and the end of `task: reward_sft`. Definitions: Z-Reward (arXiv 2606.09076), section 7 of
the design notes; what the paper leaves open (pooling, intervals) is ours and said below.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewardtune.data.images import read_tensors
from rewardtune.data.records import PreferenceGroup, read_records
from rewardtune.data.skipped import Skipped
from rewardtune.errors import DataError
from rewardtune.progress import Progress
from rewardtune.scorer.losses import histogram_target, two_hot_target
from rewardtune.scorer.model import Scorer, load_scorer
from rewardtune.scorer.reasoning import Trace, load_reasoner
from rewardtune.scorer.targets import say_what_is_left_out
from rewardtune.scoring.agreement import RESAMPLES, Array, Ratings, flat, measure
from rewardtune.scoring.score import best_device

TRACES = ("trace_ended", "trace_empty")
"""Figures of traces that tell whether a model reasons at all, and comes to an end."""


def evaluate_scorer(
    scorer: str | Path,
    *,
    data: str | Path,
    device: str | None = None,
    batch_size: int = 32,
    resamples: int = RESAMPLES,
    revision: str | None = None,
    reasoning: int = 0,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The document that `rewardtune evaluate --json` prints.

    scorer: an export, a folder, `pocket:<name>` or a hub id. data: preference records with scores. reasoning: traces
    sampled before each score, whose distributions are averaged; 0 reads in one pass. dtype: of the weights, float32 or
    bfloat16. Accuracies are fractions. Raises DataError for records without scores of this scorer's dimensions.
    """
    groups = read_records(data)
    loaded = load_scorer(scorer, revision=revision, dtype=getattr(torch, dtype), device=device or best_device())
    return {
        "scorer": str(scorer),
        "data": str(data),
        **evaluate_groups(loaded, groups, batch_size=batch_size, resamples=resamples, reasoning=reasoning),
    }


def evaluate_groups(
    scorer: Scorer,
    groups: Sequence[PreferenceGroup],
    *,
    batch_size: int = 32,
    resamples: int = RESAMPLES,
    reasoning: int = 0,
) -> dict[str, Any]:
    """Score every rated or compared picture of the groups and measure; see `measure`. reasoning: traces per score."""
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.images))]
    started = time.perf_counter()
    predicted, said = _predicted(scorer, groups, batch_size=batch_size, reasoning=reasoning)
    seconds = time.perf_counter() - started
    ratings = beside_people(scorer, groups, predicted)
    document = measure(ratings, scorer.dimensions, resamples=resamples)
    stated = _stated_preferences(scorer, groups, places, predicted)
    return {
        **document,
        **({"preference_accuracy": stated[0] / stated[1], "preferences": stated[1]} if stated[1] else {}),
        **said,
        "images_per_second": round(len(places) / seconds, 2),
        "groups": len(groups),
        "images": len(places),
    }


@torch.no_grad()
def held_out_figures(scorer: Scorer, groups: Sequence[PreferenceGroup], *, reasoning: int = 0) -> dict[str, float]:
    """What a task that trains a scorer says of it at the end: `flat` figures without intervals, and what became of the
    traces; none without groups."""
    if not groups:
        return {}
    document = evaluate_groups(scorer, groups, resamples=0, reasoning=reasoning)
    return {**flat(document), **{name: document[name] for name in TRACES if name in document}}


def predict(
    scorer: Scorer, groups: Sequence[PreferenceGroup], *, batch_size: int = 32, reasoning: int = 0
) -> tuple[Array, float]:
    """(N, D, K) probabilities for every picture of the groups, in their order, and the tokens that a score took."""
    predicted, said = _predicted(scorer, groups, batch_size=batch_size, reasoning=reasoning)
    return predicted, said["tokens_per_score"]


def beside_people(scorer: Scorer, groups: Sequence[PreferenceGroup], predicted: Array) -> Ratings:
    """Predictions (N, D, K) of `predict` beside the scores. Raises DataError when there is none of these dimensions."""
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.images))]
    ratings = _ratings(scorer, groups, places, predicted)
    if len(ratings.human) == 0:
        raise DataError(
            f"the records hold no scores for {', '.join(scorer.dimensions)}; a scorer is evaluated against scores."
        )
    return ratings


# -------------------------------------------------------------------------------------------------------- predictions


def _predicted(
    scorer: Scorer, groups: Sequence[PreferenceGroup], *, batch_size: int, reasoning: int
) -> tuple[Array, dict[str, float]]:
    """(N, D, K) probabilities, and numbers about what was written for them."""
    pictures = [(image.image, group.prompt) for group in groups for image in group.images]
    if reasoning:
        return _reason(scorer, pictures, batch_size, traces=reasoning)
    # one level token per score; all dimensions are read in one forward pass
    return _one_pass(scorer, pictures, batch_size), {"tokens_per_score": 1.0}


@torch.no_grad()
def _one_pass(scorer: Scorer, pictures: Sequence[tuple[Path, str]], batch_size: int) -> Array:
    """(N, D, K) probabilities."""
    parts = []
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        images = read_tensors((path for path, _ in batch), device=scorer.device)
        parts.append(scorer.distribution(images, [prompt for _, prompt in batch]).double().cpu())
    return np.asarray(torch.cat(parts))


@torch.no_grad()
def _reason(
    scorer: Scorer, pictures: Sequence[tuple[Path, str]], batch_size: int, *, traces: int
) -> tuple[Array, dict[str, float]]:
    """(N, D, K) mean probabilities over sampled traces, how many tokens a score took, and the shares of the traces that
    are empty and that the model closed itself."""
    reasoner = load_reasoner(scorer)
    progress = Progress("reasoning about images", len(pictures))
    parts: list[torch.Tensor] = []
    written: list[Trace] = []
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        images = read_tensors((path for path, _ in batch), device=scorer.device)
        sampled, shares = reasoner.every_dimension(
            images, [prompt for _, prompt in batch], traces=traces,
            stream=(0, "evaluate"), places=range(start, start + len(batch)),
        )  # fmt: skip
        parts.append(shares.mean(2).double().cpu())
        written += sampled
        progress.advance(len(batch))
    found = reasoner.figures(written)
    # a score takes all its traces, each with the level behind it
    figures = {"tokens_per_score": round(traces * (found["trace_tokens"] + 1), 2)}
    return np.asarray(torch.cat(parts)), figures | {name: round(found[name], 4) for name in TRACES}


def _ratings(
    scorer: Scorer, groups: Sequence[PreferenceGroup], places: Sequence[tuple[int, int]], predicted: Array
) -> Ratings:
    levels = torch.tensor(scorer.rubric.values, dtype=torch.float64)
    rows: list[tuple[float, ...]] = []
    left = Skipped()
    for n, (g, i) in enumerate(places):
        image = groups[g].images[i]
        for d, name in enumerate(scorer.dimensions):
            if name not in image.scores:
                if image.scores:
                    left.add(f"scores in {name} that are not there", f"group {groups[g].id}: {image.image.name}")
                continue
            each = [a[name] for a in image.annotations if name in a]
            human = torch.tensor(each or [image.scores[name]], dtype=torch.float64)
            mass = histogram_target(human, levels) if each else two_hot_target(human, levels)[0]
            p = predicted[n, d]
            best = int(p.argmax())
            expected = float(p @ np.asarray(levels))
            rows.append((g, n, d, image.scores[name], expected, float(p[best]), float(mass[best])))
    say_what_is_left_out(f"{len(rows):,} scores to compare with", left)
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    whole = table[:, :3].astype(np.int64)
    return Ratings(whole[:, 0], whole[:, 1], whole[:, 2], *table[:, 3:].T)


def _stated_preferences(
    scorer: Scorer, groups: Sequence[PreferenceGroup], places: Sequence[tuple[int, int]], predicted: Array
) -> tuple[int, int]:
    """How many of the stated preferences the mean over dimensions agrees with, and how many there are."""
    value = (predicted @ np.asarray(scorer.rubric.values)).mean(-1)
    at = {place: n for n, place in enumerate(places)}
    stated = [(at[g, won], at[g, lost]) for g, group in enumerate(groups) for won, lost in group.preferences]
    return sum(bool(value[won] > value[lost]) for won, lost in stated), len(stated)
