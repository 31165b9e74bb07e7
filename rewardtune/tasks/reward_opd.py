"""On-policy distillation (Z-Reward, arXiv 2606.09076, Eq. 18 and 19; after Thinking Machines' recipe): the student
reasons, the teacher says how likely each of its tokens is, and the difference is the token's advantage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rewardtune.data.images import read_tensors
from rewardtune.data.records import PreferenceGroup, read_records
from rewardtune.errors import DataError, RecipeError
from rewardtune.randomness import epoch_index, generator
from rewardtune.recipe.sections import OpdSection, RewardOpdRecipe
from rewardtune.scorer.evaluate import held_out_figures
from rewardtune.scorer.export import export_scorer
from rewardtune.scorer.losses import over_tokens
from rewardtune.scorer.reasoning import (
    Judgements,
    Question,
    Reasoner,
    Trace,
    load_reasoner,
    said_level,
    with_level,
)
from rewardtune.scorer.teacher import load_teacher
from rewardtune.scorer.traces import Item
from rewardtune.scorer.trainable import loading_place, trainable_scorer
from rewardtune.types import StepOutput


@dataclass(frozen=True)
class Batch:
    """N judgements of the student. drawn: (N,) in [0, 1), what picks the level. teacher: (N, T) log-probabilities
    of the sampled tokens; levels: (N, K) of the levels."""

    images: list[Tensor]
    questions: list[Question]
    traces: list[Trace]
    drawn: Tensor
    teacher: Tensor
    levels: Tensor


class RewardOpd:
    """See `tasks.Task`. A sample is one picture in one dimension; it is judged `objective.samples` times."""

    def __init__(
        self, student: Reasoner, teacher: Reasoner, *, items: Sequence[Item], objective: OpdSection, seed: int,
        base: str, held_out: Sequence[PreferenceGroup] = (),
    ) -> None:  # fmt: skip
        if not items:
            raise DataError("there is no picture to distil from; data.images names an empty file.")
        self.student, self.teacher, self.items = student, teacher, items
        self.objective, self.seed, self.base, self.held_out = objective, seed, base, held_out
        self.trainable: Mapping[str, nn.Module] = {"scorer": student.scorer.model}
        self.frozen: Mapping[str, nn.Module] = {"teacher": teacher.scorer.model}

    def batch(self, step: int, indices: Sequence[int]) -> Batch:
        count, samples = len(self.student.scorer.dimensions), self.objective.samples
        chosen = [divmod(epoch_index(self.seed, "opd/order", i, len(self.items) * count), count) for i in indices]
        device = self.student.scorer.device
        images = read_tensors((self.items[i][0] for i, _ in chosen), device=device)
        questions = [Question(n, self.items[i][1], d) for n, (i, d) in enumerate(chosen) for _ in range(samples)]
        names = [(index, sample) for index in indices for sample in range(samples)]
        traces = self.student.sample(
            images, questions, [(self.seed, "opd/trace", *name) for name in names],
            temperature=self.objective.temperature, max_tokens=self.objective.max_tokens,
        )  # fmt: skip
        drawn = torch.stack([torch.rand((), generator=generator(self.seed, "opd/level", *name)) for name in names])
        read = self.teacher.read(images, questions, traces, tokens=True)
        assert read.log_probs is not None
        return Batch(images, questions, traces, drawn.to(device), read.log_probs, read.logits.log_softmax(-1))

    def step(self, batch: Batch) -> StepOutput:
        read = self.student.read(batch.images, batch.questions, batch.traces, tokens=True)
        level = said_level(read.logits.detach(), batch.drawn)
        ours, mask = with_level(read, level)
        theirs, _ = with_level(Judgements(batch.levels, batch.teacher, read.mask), level)
        advantages = (theirs - ours).detach()
        loss = -over_tokens(advantages * ours, mask, "mean")
        gap = float((-advantages * mask).sum() / mask.sum())
        return StepOutput(loss=loss, metrics={"reverse_kl": gap, **self.student.figures(batch.traces)})

    def samples(self) -> None:
        return None

    def evaluate(self) -> Mapping[str, float]:
        """Figures of `rewardtune evaluate --reasoning 1` on the held-out records, without intervals."""
        return held_out_figures(self.student.scorer, self.held_out, reasoning=1)

    def export(self, folder: Path, provenance: Mapping[str, str]) -> None:
        """A scorer's folder; its rubric says how it thinks."""
        export_scorer(self.student.scorer, folder, provenance, base=self.base, task="reward_opd",
                      trained_on=f"its own reasoning about {len(self.items):,} pictures, rated by a teacher",
                      probe=self.items[:4])  # fmt: skip


def build_reward_opd(recipe: RewardOpdRecipe, *, device: str) -> RewardOpd:
    """The task of a recipe. Raises RecipeError where teacher and student do not read the same tokens."""
    student = trainable_scorer(recipe.scorer, train=recipe.train, device=device)
    teacher = load_teacher(recipe.teacher, student=student.rubric, device=loading_place(recipe.train, device))
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise RecipeError(
            "teacher and student have different tokenizers, so the teacher cannot rate the student's tokens (Eq. 18). "
            "Use task: reward_risd, which compares score distributions only."
        )
    groups = read_records(recipe.data.images, rated=False)
    items = [(image.image, group.prompt) for group in groups for image in group.images]
    held_out = read_records(recipe.data.held_out) if recipe.data.held_out else []
    return RewardOpd(
        load_reasoner(student), load_reasoner(teacher), items=items, objective=recipe.objective,
        seed=recipe.train.seed, base=recipe.scorer.model, held_out=held_out,
    )  # fmt: skip
