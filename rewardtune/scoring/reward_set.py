"""Images and prompts -> one number an image: load rewards, run each once, reduce, weight and name them.

The engine's only view of rewards; it knows none by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewardtune.errors import NonFiniteError
from rewardtune.plugins import Reward
from rewardtune.scoring.objective import Statistic, expectation
from rewardtune.types import Score


def load_reward(name: str, *, device: str = "cpu", **options: Any) -> Reward:
    """A reward by its name in `rewards list`, with the options of its card.

    Raises RecipeError for an unknown name or option, MissingExtra when a package is missing.
    """
    from pydantic import ValidationError

    from rewardtune import registry
    from rewardtune.errors import RecipeError

    plugin = registry.rewards.load_class(name)
    try:
        config = plugin.Config(**options)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(
            f"reward {name!r} does not take these options: {problems}. `rewardtune rewards show {name}` lists them."
        ) from error
    reward: Reward = plugin.load(config, device=device)
    return reward


@dataclass(frozen=True)
class Term:
    """One reward of an objective: its weight, and how its distribution becomes a number."""

    reward: Reward
    weight: float = 1.0
    statistic: Statistic = expectation
    dimensions: Mapping[str, float] | None = None
    """Weight of each dimension; equal when None."""

    @property
    def name(self) -> str:
        return self.reward.card.name


class RewardSet:
    """Several rewards as one: sum over terms of weight * sign * value / scale. One forward a reward a batch."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = terms

    def score(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
        """(B,) numbers to maximise, and every reward's and dimension's batch mean for the log.

        Raises NonFiniteError, naming the reward, where a value is missing or not finite.
        """
        total = torch.zeros(len(prompts), device=images.device)
        metrics: dict[str, float] = {}
        for term in self.terms:
            score = term.reward.score(images, prompts)
            value = reduce(score, term)
            check(term.name, score, len(prompts))
            sign = 1.0 if term.reward.card.higher_is_better else -1.0
            total = total + term.weight * sign * value.float() / term.reward.card.scale
            metrics[f"reward/{term.name}"] = score.value.detach().mean().item()
            if score.distribution is not None and score.levels is not None:
                means = expectation(score.distribution.detach(), score.levels).mean(0)
                metrics |= {f"reward/{term.name}/{d}": m.item() for d, m in zip(score.dimensions, means, strict=True)}
            else:
                metrics |= {f"reward/{term.name}/{k}": v.detach().mean().item() for k, v in score.parts.items()}
        return total, metrics


def reduce(score: Score, term: Term) -> Tensor:
    """(B,): the statistic of each dimension, averaged by the term's weights; a scalar reward's own value."""
    if score.distribution is None:
        return score.value
    assert score.levels is not None
    per_dimension = term.statistic(score.distribution, score.levels)
    wanted = term.dimensions or dict.fromkeys(score.dimensions, 1.0)
    weights = torch.tensor([wanted.get(d, 0.0) for d in score.dimensions]).to(per_dimension)
    return (per_dimension * weights).sum(-1) / weights.abs().sum()


def check(name: str, score: Score, count: int) -> None:
    """A missing or non-finite reward is never turned into a number."""
    if score.value.shape != (count,):
        raise NonFiniteError(
            f"reward {name!r} returned {tuple(score.value.shape)} values for {count} images; it must return one each"
        )
    if not bool(torch.isfinite(score.value).all()):
        bad = (~torch.isfinite(score.value)).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"reward {name!r} returned a value that is not finite for image(s) {bad} of the batch. Nothing was updated "
            f"from it. Run `rewardtune rewards test {name}`; in bf16, try train.precision=fp32."
        )
