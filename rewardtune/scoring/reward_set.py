"""Images and prompts -> one number an image: load rewards, run each once, reduce, weight and name them.

The engine's only view of rewards; it knows none by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rewardtune.errors import NonFiniteError
from rewardtune.plugins import Reward
from rewardtune.scoring.objective import Statistic, expectation
from rewardtune.types import Prompt, Score


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
class Relative:
    """SRPO's relative reward: (1 + k) r(image, "positive. prompt") - r(image, "negative. prompt")."""

    positive: str
    negative: str
    k: float = 0.0


@dataclass(frozen=True)
class Term:
    """One reward of an objective: its weight, and how its distribution becomes a number."""

    reward: Reward
    weight: float = 1.0
    statistic: Statistic = expectation
    dimensions: Mapping[str, float] | None = None
    """Weight of each dimension; equal when None."""
    ceiling: float | None = None
    """Value above which an image gives no gradient (below which, where lower is better)."""
    relative: Relative | None = None

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
            value, seen = score_term(term, images, prompts)
            total = total + term.weight * value
            metrics |= seen
        return total, metrics

    def gradient(
        self, images: Tensor, prompts: Sequence[str], weights: Tensor | None, *, balance: str
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """(d objective / d images, (B,) values, metrics): each reward's graph is gone before the next one's is built.

        The objective is the mean of weights * values. balance `gradient`: every reward's gradient is divided by its
        norm before its weight counts. Logged: each norm, and the cosine of every two.
        """
        total = torch.zeros(len(prompts), device=images.device)
        metrics: dict[str, float] = {}
        gradients: list[Tensor] = []
        for term in self.terms:
            leaf = images.detach().requires_grad_(True)
            value, seen = score_term(term, leaf, prompts)
            factors = torch.ones_like(value) if weights is None else weights.to(value)
            (one,) = torch.autograd.grad((factors * value).mean(), leaf)
            gradients.append(one)
            total = total + term.weight * value.detach()
            metrics |= seen
        norms = [g.norm() for g in gradients]
        combined = torch.zeros_like(images)
        for term, one, norm in zip(self.terms, gradients, norms, strict=True):
            metrics[f"gradient/{term.name}"] = norm.item()
            scale = 1 / norm.clamp(min=torch.finfo(norm.dtype).tiny) if balance == "gradient" else 1.0
            combined = combined + term.weight * scale * one
        for (a, left), (b, right) in combinations(zip(self.terms, gradients, strict=True), 2):
            cosine = torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0)
            metrics[f"cosine/{a.name}/{b.name}"] = cosine.item()
        return combined, total, metrics


def score_term(term: Term, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
    """(B,) values of one term, higher is better, over its card's scale; and what to log of it.

    Raises NonFiniteError, naming the reward, where a value is missing or not finite.
    """
    if term.relative is None:
        score = term.reward.score(images, prompts)
        value = reduce(score, term)
    else:
        score = term.reward.score(images, [_before(term.relative.positive, p) for p in prompts])
        other = term.reward.score(images, [_before(term.relative.negative, p) for p in prompts])
        check(term.name, other, len(prompts))
        value = (1 + term.relative.k) * reduce(score, term) - reduce(other, term)
    check(term.name, score, len(prompts))
    if term.ceiling is not None:
        higher = term.reward.card.higher_is_better
        value = value.clamp(max=term.ceiling) if higher else value.clamp(min=term.ceiling)
    sign = 1.0 if term.reward.card.higher_is_better else -1.0
    metrics = {f"reward/{term.name}": score.value.detach().mean().item()}
    if score.distribution is not None and score.levels is not None:
        means = expectation(score.distribution.detach(), score.levels).mean(0)
        metrics |= {f"reward/{term.name}/{d}": m.item() for d, m in zip(score.dimensions, means, strict=True)}
    else:
        metrics |= {f"reward/{term.name}/{k}": v.detach().mean().item() for k, v in score.parts.items()}
    return sign * value.float() / term.reward.card.scale, metrics


def _before(phrase: str, prompt: str) -> Prompt:
    return Prompt(f"{phrase}. {prompt}", getattr(prompt, "metadata", {}))


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
