"""RISD (Z-Reward, arXiv 2606.09076, section 5): a student learns, in one pass, the distributions that a teacher reaches
by reasoning. No labels are needed; the teacher's judgements are drawn once (`scorer/traces.py`) or live.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from rewardtune.data.images import read_tensors
from rewardtune.data.records import PreferenceGroup, read_records
from rewardtune.errors import DataError
from rewardtune.randomness import epoch_index
from rewardtune.recipe.sections import RewardRisdRecipe, RisdSection
from rewardtune.scorer.evaluate import held_out_figures
from rewardtune.scorer.export import export_scorer
from rewardtune.scorer.losses import distribution_cross_entropy, forward_kl
from rewardtune.scorer.model import Scorer
from rewardtune.scorer.targets import check_labels, target_maker
from rewardtune.scorer.teacher import judgements
from rewardtune.scorer.traces import Item, Judged
from rewardtune.scorer.trainable import trainable_scorer
from rewardtune.scoring.augment import training_views
from rewardtune.types import Prompt, StepOutput


@dataclass(frozen=True)
class Batch:
    """images: B tensors (3, H, W). teacher: (B, D, R, K), NaN where a judgement could not be read. labels: (B, D, K)
    targets, NaN where there is none. figures: of the teacher's traces, where they were drawn for this batch."""

    images: list[Tensor]
    prompts: list[Prompt]
    teacher: Tensor
    labels: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)


class RewardRisd:
    """See `tasks.Task`. judge: from global sample indices and items' places to the teacher's judgements.
    labels: (items, D, K) targets for the control that adds them; all NaN otherwise."""

    def __init__(
        self, scorer: Scorer, *, items: Sequence[Item], judge: Callable[[Sequence[int], Sequence[int]], Judged],
        labels: Tensor, objective: RisdSection, seed: int, base: str, held_out: Sequence[PreferenceGroup] = (),
    ) -> None:  # fmt: skip
        if not items:
            raise DataError("there is no picture to distil from; data.images names an empty file.")
        self.scorer, self.items, self.judge, self.labels = scorer, items, judge, labels
        self.objective, self.seed, self.base, self.held_out = objective, seed, base, held_out
        self.trainable: Mapping[str, nn.Module] = {"scorer": scorer.model}

    def batch(self, step: int, indices: Sequence[int]) -> Batch:
        chosen = [epoch_index(self.seed, "risd/order", i, len(self.items)) for i in indices]
        device = self.scorer.device
        images = training_views(
            read_tensors((self.items[i][0] for i in chosen), device=device), indices, seed=self.seed,
            name="risd/view", shift=self.objective.shift, noise=self.objective.noise,
        )  # fmt: skip
        judged, prompts = self.judge(indices, chosen), [self.items[i][1] for i in chosen]
        teacher, labels = judged.distributions.to(device), self.labels[chosen].to(device)
        return Batch(images, prompts, teacher, labels, judged.figures)

    def step(self, batch: Batch) -> StepOutput:
        logits = self.scorer.logits(batch.images, batch.prompts)
        levels = self.scorer.levels.to(logits.dtype)
        means, wanted = logits.softmax(-1) @ levels, (batch.teacher.to(logits.dtype) @ levels).nanmean(-1)
        kl = forward_kl(logits, batch.teacher.to(logits.dtype))
        metrics = {"kl": float(kl.detach()), "mae": float((means - wanted).detach().abs().nanmean())}
        loss = kl
        if self.objective.match == "mean":
            loss = ((means - wanted) / (levels[-1] - levels[0])).square().nanmean()
        if self.objective.labels:
            supervised = distribution_cross_entropy(logits, batch.labels.to(logits.dtype))
            loss, metrics["labels_loss"] = loss + self.objective.labels * supervised, float(supervised.detach())
        return StepOutput(loss=loss, metrics={**metrics, **batch.figures})

    def samples(self) -> None:
        return None

    def evaluate(self) -> Mapping[str, float]:
        """Figures of `rewardtune evaluate` on the held-out records, without intervals."""
        return held_out_figures(self.scorer, self.held_out)

    def export(self, folder: Path, provenance: Mapping[str, str]) -> None:
        """A scorer's folder."""
        export_scorer(self.scorer, folder, provenance, base=self.base, task="reward_risd",
                      trained_on=f"a teacher's judgements of {len(self.items):,} pictures",
                      probe=self.items[:4])  # fmt: skip


def build_reward_risd(recipe: RewardRisdRecipe, *, device: str) -> RewardRisd:
    """The task of a recipe; the teacher's judgements are drawn here unless they are drawn live."""
    scorer = trainable_scorer(recipe.scorer, train=recipe.train, device=device)
    groups = read_records(recipe.data.images, rated=False)
    items = [(image.image, group.prompt) for group in groups for image in group.images]
    labels = torch.full((len(items), len(scorer.dimensions), len(scorer.levels)), torch.nan)
    if recipe.objective.labels:
        check_labels(groups, scorer.rubric, target="two-hot")
        make = target_maker("two-hot", scorer.rubric)
        labels = torch.stack([make(image) for group in groups for image in group.images])
        if labels.isnan().all():
            raise DataError("objective.labels needs scores, and data.images holds none. Leave objective.labels out.")
    judge = judgements(
        recipe.teacher, items=items, student=scorer.rubric, seed=recipe.train.seed, device=device
    )  # fmt: skip
    held_out = read_records(recipe.data.held_out) if recipe.data.held_out else []
    return RewardRisd(
        scorer, items=items, judge=judge, labels=labels, objective=recipe.objective, seed=recipe.train.seed,
        base=recipe.scorer.model, held_out=held_out,
    )  # fmt: skip
