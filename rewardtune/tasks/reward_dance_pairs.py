"""RewardDance in its original form (arXiv 2509.08826): is a picture better than another of the same prompt, yes or no?

The answer stands first and may be followed by an explanation, the candidate's `critique`; cross-entropy on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from rewardtune.errors import DataError
from rewardtune.randomness import choice, epoch_index
from rewardtune.recipe.sections import DanceSection, RewardDanceRecipe
from rewardtune.scorer.comparison import Comparer, ask, load_comparer, pair_accuracy
from rewardtune.scorer.export import export_scorer
from rewardtune.scorer.targets import Pair, read_pairs
from rewardtune.scorer.trainable import trainable_scorer
from rewardtune.types import StepOutput


@dataclass(frozen=True)
class Asked:
    """A pair and the right answer: yes where its better picture is the candidate, no where it is the reference."""

    pair: Pair
    yes: bool

    @property
    def explanation(self) -> str:
        return self.pair.critiques[0 if self.yes else 1]


class RewardDancePairs:
    """See `tasks.Task`."""

    def __init__(
        self, comparer: Comparer, *, pairs: Sequence[Pair], objective: DanceSection, seed: int, base: str,
        held_out: Sequence[Pair] = (),
    ) -> None:  # fmt: skip
        if not pairs:
            raise DataError(
                "the records hold no two pictures of one prompt of which one is better, and the pairwise form learns "
                "from pairs. Rate several pictures of each prompt, or set objective.form to pointwise."
            )
        self.comparer, self.pairs, self.objective = comparer, pairs, objective
        self.seed, self.base, self.held_out = seed, base, held_out
        self.trainable: Mapping[str, nn.Module] = {"scorer": comparer.scorer.model}

    def batch(self, step: int, indices: Sequence[int]) -> list[Asked]:
        """Each pair in an order of its own, so that the place of a picture says nothing about it."""
        return [
            Asked(
                self.pairs[epoch_index(self.seed, "dance/pairs", i, len(self.pairs))],
                choice(self.seed, "dance/answer", i).random() < 0.5,
            )
            for i in indices
        ]

    def step(self, batch: list[Asked]) -> StepOutput:
        weight = self.objective.explanation
        images, questions = ask(self.comparer.scorer, [asked.pair for asked in batch])
        read = self.comparer.read(
            images,
            [question if asked.yes else question.swapped for question, asked in zip(questions, batch, strict=True)],
            answers=[asked.yes for asked in batch],
            explanations=[asked.explanation for asked in batch] if weight else (),
        )
        right = torch.tensor([0 if asked.yes else 1 for asked in batch], device=read.logits.device)
        loss = F.cross_entropy(read.logits, right)
        found = read.logits.detach().argmax(-1) == right
        metrics = {"answer_loss": float(loss.detach()), "right_answers": float(found.float().mean())}
        if read.said.numel():
            words = -read.said.mean()
            loss, metrics["explanation_loss"] = loss + weight * words, float(words.detach())
        return StepOutput(loss=loss, metrics=metrics)

    def samples(self) -> None:
        return None

    def evaluate(self) -> Mapping[str, float]:
        """Share of the held-out pairs that are ordered right, over all and for each dimension."""
        return pair_accuracy(self.comparer, self.held_out)

    def export(self, folder: Path, provenance: Mapping[str, str]) -> None:
        """A scorer's folder; its rubric says how it compares."""
        probe = [(path, pair.prompt) for pair in self.pairs[:2] for path in pair.images]
        export_scorer(self.comparer.scorer, folder, provenance, base=self.base, task="reward_dance",
                      trained_on=f"{len(self.pairs):,} pairs", probe=probe, compares=True)  # fmt: skip


def build_reward_dance_pairs(recipe: RewardDanceRecipe, *, device: str) -> RewardDancePairs:
    """The task of a recipe; says on standard error which records make no pair."""
    comparer = load_comparer(trainable_scorer(recipe.scorer, train=recipe.train, device=device))
    rubric, about = comparer.scorer.rubric, recipe.objective.preferences_in
    # an order needs no level to lie on
    pairs = read_pairs(recipe.data.records, rubric, target="two-hot", preferences_in=about)
    held_out: list[Pair] = []
    if recipe.data.held_out:
        held_out = read_pairs(recipe.data.held_out, rubric, target="two-hot", preferences_in=about)
        if not held_out:
            raise DataError(
                f"{recipe.data.held_out} holds no two pictures of one prompt of which one is better, so there is "
                "nothing to measure on. Give rated groups of several pictures, or leave data.held_out out."
            )
    return RewardDancePairs(
        comparer, pairs=pairs, objective=recipe.objective, seed=recipe.train.seed, base=recipe.scorer.model,
        held_out=held_out,
    )  # fmt: skip
