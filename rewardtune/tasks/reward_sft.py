"""Supervised training of a scorer's distribution on rated pictures: Z-Reward's SFT baseline, and the pocket student.

Rows come from `data.read_records`, the forward pass is `scorer/model.py`, targets and loss are `scorer/losses.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rewardtune.data.images import read_tensors
from rewardtune.data.records import PreferenceGroup, RatedImage, read_records
from rewardtune.errors import DataError
from rewardtune.randomness import epoch_index
from rewardtune.recipe.sections import RewardSftRecipe
from rewardtune.scorer.evaluate import held_out_figures
from rewardtune.scorer.export import export_scorer
from rewardtune.scorer.losses import distribution_cross_entropy
from rewardtune.scorer.model import Scorer
from rewardtune.scorer.rubric import Rubric
from rewardtune.scorer.targets import check_labels, rated, target_maker
from rewardtune.scorer.trainable import trainable_scorer
from rewardtune.scoring.augment import training_views
from rewardtune.scoring.objective import expectation
from rewardtune.types import Prompt, StepOutput


@dataclass(frozen=True)
class Row:
    """One rated picture. target: (D, K), NaN for a dimension that nobody rated."""

    image: Path
    prompt: Prompt
    target: Tensor


@dataclass(frozen=True)
class Batch:
    """images: B tensors (3, H, W); target: (B, D, K)."""

    images: list[Tensor]
    prompts: list[Prompt]
    target: Tensor


class RewardSft:
    """See `tasks.Task`. `held_out`: groups that `evaluate` reads at the end; `base`: the reference trained from;
    `shift`, `noise`: see `ViewedSection`."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        rows: Sequence[Row],
        held_out: Sequence[PreferenceGroup] = (),
        seed: int,
        base: str,
        shift: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        if not rows:
            raise DataError("the records hold no scores, only preferences; reward_sft trains on scores.")
        self.scorer, self.rows, self.held_out, self.seed, self.base = scorer, rows, held_out, seed, base
        self.shift, self.noise = shift, noise
        self.trainable: Mapping[str, nn.Module] = {"scorer": scorer.model}

    def batch(self, step: int, indices: Sequence[int]) -> Batch:
        rows = [self.rows[epoch_index(self.seed, "reward_sft/order", i, len(self.rows))] for i in indices]
        images = training_views(
            read_tensors((row.image for row in rows), device=self.scorer.device), indices, seed=self.seed,
            name="reward_sft/view", shift=self.shift, noise=self.noise,
        )  # fmt: skip
        target = torch.stack([row.target for row in rows]).to(self.scorer.device)
        return Batch(images, [row.prompt for row in rows], target)

    def step(self, batch: Batch) -> StepOutput:
        logits = self.scorer.logits(batch.images, batch.prompts)
        loss = distribution_cross_entropy(logits, batch.target)
        with torch.no_grad():
            metrics = self._errors(logits.softmax(-1), batch.target)
        return StepOutput(loss=loss, metrics=metrics)

    def samples(self) -> None:
        return None

    def evaluate(self) -> Mapping[str, float]:
        """Figures of `rewardtune evaluate` on the held-out records, without intervals."""
        return held_out_figures(self.scorer, self.held_out)

    def export(self, folder: Path, provenance: Mapping[str, str]) -> None:
        """Write a scorer's folder in the dtype of the checkpoint trained from; see `export_scorer`."""
        probe = [(row.image, row.prompt) for row in self.rows[:4]]
        export_scorer(self.scorer, folder, provenance, base=self.base, task="reward_sft",
                      trained_on=f"{len(self.rows):,} rated pictures", probe=probe)  # fmt: skip

    def _errors(self, predicted: Tensor, target: Tensor) -> dict[str, float]:
        """Mean absolute error of the expected score, per dimension and over all; dimensions nobody rated are absent."""
        levels = self.scorer.levels
        error = (expectation(predicted, levels) - expectation(target.to(predicted.dtype), levels)).abs()
        out = {"mae": error.nanmean().item()}
        for d, name in enumerate(self.scorer.dimensions):
            out[f"mae/{name}"] = error[:, d].nanmean().item()
        return {k: v for k, v in out.items() if math.isfinite(v)}


def build_reward_sft(recipe: RewardSftRecipe, *, device: str) -> RewardSft:
    """The task of a recipe: scorer loaded and thawed, records read and turned into targets."""
    scorer = trainable_scorer(recipe.scorer, train=recipe.train, device=device)
    groups = read_records(recipe.data.records)
    check_labels(groups, scorer.rubric, target=recipe.objective.target)
    make = target_maker(recipe.objective.target, scorer.rubric)
    held_out = read_records(recipe.data.held_out) if recipe.data.held_out else []
    return RewardSft(
        scorer, rows=rated_rows(groups, make, scorer.rubric), held_out=held_out, seed=recipe.train.seed,
        base=recipe.scorer.model, shift=recipe.objective.shift, noise=recipe.objective.noise,
    )  # fmt: skip


def rated_rows(groups: Sequence[PreferenceGroup], make: Callable[[RatedImage], Tensor], rubric: Rubric) -> list[Row]:
    """One row per picture that has a score; those without are left out and named."""
    return [Row(image.image, group.prompt, target) for group, image, target in rated(groups, make, rubric)]
