"""RewardDance as Z-Reward runs it (arXiv 2606.09076, section 6): the score first, an explanation after it, both
trained; at test the score alone is read. Explanations are the records' `critique`, by people or a strong model.
The original, which compares two pictures, is `reward_dance_pairs.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewardtune.data.images import read_tensors
from rewardtune.data.records import PreferenceGroup, read_records
from rewardtune.errors import DataError
from rewardtune.randomness import epoch_index
from rewardtune.recipe.sections import DanceSection, RewardDanceRecipe
from rewardtune.scorer.evaluate import held_out_figures
from rewardtune.scorer.explanations import explanation_ids, explanation_log_probs
from rewardtune.scorer.export import export_scorer
from rewardtune.scorer.losses import distribution_cross_entropy
from rewardtune.scorer.model import Scorer
from rewardtune.scorer.patches import patchify
from rewardtune.scorer.targets import check_labels, rated, target_maker
from rewardtune.scorer.trainable import trainable_scorer
from rewardtune.tasks.reward_dance_pairs import RewardDancePairs, build_reward_dance_pairs
from rewardtune.types import Prompt, StepOutput


@dataclass(frozen=True)
class Row:
    """One rated picture. target: (D, K). explanation: empty where there is no critique."""

    image: Path
    prompt: Prompt
    target: Tensor
    explanation: str


class RewardDance:
    """See `tasks.Task`."""

    def __init__(
        self, scorer: Scorer, *, rows: Sequence[Row], objective: DanceSection, seed: int, base: str,
        held_out: Sequence[PreferenceGroup] = (),
    ) -> None:  # fmt: skip
        if not any(row.explanation for row in rows):
            raise DataError("no rated picture of the records has a `critique`, and RewardDance learns to explain. Add "
                            "critiques, or train with task: reward_sft.")  # fmt: skip
        self.scorer, self.rows, self.objective = scorer, rows, objective
        self.seed, self.base, self.held_out = seed, base, held_out
        self.trainable: Mapping[str, nn.Module] = {"scorer": scorer.model}

    def batch(self, step: int, indices: Sequence[int]) -> list[Row]:
        return [self.rows[epoch_index(self.seed, "dance/order", i, len(self.rows))] for i in indices]

    def step(self, batch: list[Row]) -> StepOutput:
        scorer, model = self.scorer, self._model
        patches, grid = patchify(read_tensors(r.image for r in batch), scorer.geometry)
        counts = (grid[:, 1] * grid[:, 2] // scorer.geometry.merge**2).tolist()
        asked = [scorer.tokens(scorer.reading.frame, r.prompt, n) for r, n in zip(batch, counts, strict=True)]
        told = [explanation_ids(scorer, row.explanation) for row in batch]
        ids, mask = scorer.pad([[*a, *t] for a, t in zip(asked, told, strict=True)])
        hidden: Tensor = model.model(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == scorer.image_token).int(), use_cache=False,
            pixel_values=patches.to(ids.device), image_grid_thw=grid.to(ids.device),
        ).last_hidden_state  # fmt: skip
        weight = model.get_output_embeddings().weight
        # the reads end where the explanation begins
        places = torch.tensor([[-len(t) + p for p in scorer.reading.positions] for t in told], device=ids.device)
        rows = torch.arange(len(batch), device=ids.device)[:, None]
        logits = F.linear(hidden[rows, places], weight[list(scorer.reading.level_ids)]).float()
        target = torch.stack([row.target for row in batch]).to(logits)
        loss = distribution_cross_entropy(logits / scorer.rubric.temperature, target)
        metrics = {"score_loss": float(loss.detach())}
        if any(told) and self.objective.explanation:
            words = -explanation_log_probs(hidden, ids, [len(t) for t in told], weight).mean()
            loss, metrics["explanation_loss"] = loss + self.objective.explanation * words, float(words.detach())
        return StepOutput(loss=loss, metrics=metrics)

    def samples(self) -> None:
        return None

    def evaluate(self) -> Mapping[str, float]:
        """Figures of `rewardtune evaluate` on the held-out records, without intervals."""
        return held_out_figures(self.scorer, self.held_out)

    def export(self, folder: Path, provenance: Mapping[str, str]) -> None:
        """A scorer's folder."""
        export_scorer(self.scorer, folder, provenance, base=self.base, task="reward_dance",
                      trained_on=f"{len(self.rows):,} rated pictures with explanations",
                      probe=[(row.image, row.prompt) for row in self.rows[:4]])  # fmt: skip

    @property
    def _model(self) -> Any:
        return self.scorer.model


def build_reward_dance(recipe: RewardDanceRecipe, *, device: str) -> RewardDance | RewardDancePairs:
    """The task of a recipe, in either form."""
    if recipe.objective.form == "pairwise":
        return build_reward_dance_pairs(recipe, device=device)
    scorer = trainable_scorer(recipe.scorer, train=recipe.train, device=device)
    groups = read_records(recipe.data.records)
    check_labels(groups, scorer.rubric, target=recipe.objective.target)
    make = target_maker(recipe.objective.target, scorer.rubric)
    rows = [
        Row(image.image, group.prompt, target, image.critique or "")
        for group, image, target in rated(groups, make, scorer.rubric)
    ]
    held_out = read_records(recipe.data.held_out) if recipe.data.held_out else []
    return RewardDance(
        scorer, rows=rows, objective=recipe.objective, seed=recipe.train.seed, base=recipe.scorer.model,
        held_out=held_out,
    )  # fmt: skip
