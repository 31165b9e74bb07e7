"""One look: images of fixed prompts and seeds under the current weights, and what is held against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rewardtune.compare.diversity import distances, features
from rewardtune.data.images import to_pil
from rewardtune.diffusion.rollout import sample
from rewardtune.plugins import AnyPipeline, Guidance
from rewardtune.randomness import generator
from rewardtune.scoring.reward_set import RewardSet, Term, score_term
from rewardtune.types import Prompt

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Look:
    """What is seen of N images, prompt by prompt.

    held_out: label -> (N,) values, higher is better. trained: mean of the trained objective, None where there is none.
    features: (N, F) of `compare/diversity.py`. diversity: mean distance between them.
    """

    held_out: dict[str, Floats]
    trained: float | None
    features: Floats
    diversity: float


class Watch:
    """Draws `seeds` images of each prompt, `batch_size` at a time, with the noise of (seed, prompt, copy) alone."""

    def __init__(
        self, pipeline: AnyPipeline, *, prompts: Sequence[Prompt], seeds: int, held_out: Sequence[Term],
        trained: RewardSet | None, num_steps: int, guidance: Guidance, size: tuple[int, int], batch_size: int,
    ) -> None:  # fmt: skip
        self.pipeline, self.prompts, self.seeds = pipeline, prompts, seeds
        self.held_out, self.trained = held_out, trained
        self.num_steps, self.guidance, self.size, self.batch_size = num_steps, guidance, size, batch_size

    def look(self) -> Look:
        """Under whatever weights the pipeline has now."""
        items = [(p, k) for p in range(len(self.prompts)) for k in range(self.seeds)]
        values: dict[str, list[float]] = {term.name: [] for term in self.held_out}
        objective: list[float] = []
        seen: list[Floats] = []
        with torch.no_grad():
            for start in range(0, len(items), self.batch_size):
                batch = items[start : start + self.batch_size]
                prompts = [self.prompts[p] for p, _ in batch]
                images = sample(
                    self.pipeline, prompts, [generator(0, "guard", p, k) for p, k in batch],
                    num_steps=self.num_steps, guidance=self.guidance, size=self.size,
                )  # fmt: skip
                for term in self.held_out:
                    values[term.name] += score_term(term, images, prompts)[0].tolist()
                if self.trained is not None:
                    objective += self.trained.score(images, prompts)[0].tolist()
                seen += [features(picture) for picture in to_pil(images)]
        vectors = np.stack(seen)
        apart = distances(vectors)
        pairs = len(items) * (len(items) - 1)
        return Look(
            held_out={name: np.asarray(found) for name, found in values.items()},
            trained=float(np.mean(objective)) if objective else None,
            features=vectors,
            diversity=float(apart.sum() / pairs) if pairs else 0.0,
        )
