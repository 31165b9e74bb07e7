"""Images and prompts -> one number an image: load rewards, run each once, reduce, mix and name them.

The engine's only view of rewards; it knows none by name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rewardtune import devices
from rewardtune.errors import DataError
from rewardtune.plugins import Reward
from rewardtune.scoring.checked import Checked, check_score, gradient_of, named
from rewardtune.scoring.mixing import Mixing
from rewardtune.scoring.objective import Statistic, expectation
from rewardtune.types import Prompt, Score

if TYPE_CHECKING:
    from rewardtune.recipe.rewards import RewardSection

Found = TypeVar("Found")


def load_reward(name: str, *, device: str = "cpu", **options: Any) -> Reward:
    """A reward by its name in `rewards list`, with the options of its card; what it is given is checked first.

    Raises PluginError for an unknown name, RecipeError for an unknown option or weights that do not fit, MissingExtra
    when a package is missing.
    """
    return _load(name, options, device=device)


def load_section(section: RewardSection, *, device: str) -> Reward:
    """A reward as a recipe names it, for images on `device`: on that one, or on the section's own, where images are
    brought and values fetched from. Raises what `load_reward` does, and RecipeError for a device that is not here."""
    if section.device is None:
        return _load(section.name, section.options, device=device)
    place = devices.find(section.device, key=f"reward {section.name!r}: device")
    return _load(section.name, section.options, device=str(place), place=place)


def _load(name: str, options: Mapping[str, Any], *, device: str, place: torch.device | None = None) -> Reward:
    from rewardtune import registry
    from rewardtune.errors import MissingExtra
    from rewardtune.recipe.validate import missing_requirement, read_options

    plugin = registry.rewards.load_class(name)
    if why := missing_requirement(plugin.card):
        raise MissingExtra(f"reward {name!r} {why}")
    config = read_options(plugin.Config, options, whose=f"reward {name!r}", listed_by=f"rewardtune rewards show {name}")
    with named(name):
        return Checked(plugin.load(config, device=device), config, place=place)


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
    offset: float = 0.0
    """Value that counts as 0."""
    batch_size: int | None = None
    """Most images that go through the reward at once; all when None."""

    @property
    def name(self) -> str:
        return self.reward.card.name


class RewardSet:
    """Several rewards as one, by `Mixing`. One forward a reward and image.

    Where the device's memory runs out in a reward, it sees half as many images at once from there on.
    """

    def __init__(self, terms: Sequence[Term], mixing: Mixing | None = None) -> None:
        self.terms, self.mixing = list(terms), mixing or Mixing()

    def score(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
        """(B,) numbers to maximise, and every reward's and dimension's batch mean for the log.

        Raises NonFiniteError, naming the reward, where a value is missing or not finite.
        """
        values: list[Tensor] = []
        metrics: dict[str, float] = {}
        for place, term in enumerate(self.terms):
            value, seen = self._fitting(place, len(prompts), lambda some: score_term(some, images, prompts))
            values.append(term.weight * value)
            metrics |= seen
        return self.mixing.value(values), metrics

    def gradient(
        self, images: Tensor, prompts: Sequence[str], weights: Tensor | None, *, balance: str, share: float = 1.0
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """(d objective / d images, (B,) values, metrics): each reward's graph is gone before the next one's is built.

        The objective is the mean of weights * values. balance `gradient`: every reward's gradient is divided by its
        norm before its weight counts. share: these images of the optimiser step's; a norm is what they let one expect
        of all of the step's, so that it does not grow with the number of parts. Logged: each norm, and the cosine of
        every two.
        """
        values: list[Tensor] = []
        metrics: dict[str, float] = {}
        gradients: list[Tensor] = []

        def one_alone(term: Term) -> tuple[Tensor, Tensor, dict[str, float]]:
            leaf = images.detach().requires_grad_(True)
            value, seen = score_term(term, leaf, prompts)
            factors = torch.ones_like(value) if weights is None else weights.to(value)
            return gradient_of(term.name, (factors * value).mean(), leaf), value.detach(), seen

        for place, term in enumerate(self.terms):
            one, value, seen = self._fitting(place, len(prompts), one_alone)
            gradients.append(one)
            values.append(term.weight * value)
            metrics |= seen
        # a mean over one part of n has a gradient sqrt(n) times as long as the mean over all
        norms = [g.norm() * share**0.5 for g in gradients]
        combined = torch.zeros_like(images)
        for term, one, norm, part in zip(self.terms, gradients, norms, self.mixing.shares(values), strict=True):
            metrics[f"gradient/{term.name}"] = norm.item()
            scale: Tensor | float = 1.0
            if balance == "gradient":
                scale = 1 / norm.clamp(min=torch.finfo(norm.dtype).tiny)
                if not math.isfinite(metrics[f"gradient/{term.name}"]):
                    # divided by infinity, a reward would be left out without a word
                    scale = torch.full_like(norm, math.nan)
            # a share belongs to an image, and so does its part of the gradient
            combined = combined + term.weight * scale * part.view(-1, 1, 1, 1) * one
        for (a, left), (b, right) in combinations(zip(self.terms, gradients, strict=True), 2):
            cosine = torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0)
            metrics[f"cosine/{a.name}/{b.name}"] = cosine.item()
        return combined, self.mixing.value(values), metrics

    def _fitting(self, place: int, count: int, run: Callable[[Term], Found]) -> Found:
        """`run` of a term; where memory runs out, of the same with half as many images at once, and so on.

        Raises torch.OutOfMemoryError where one image alone is too much.
        """
        while True:
            term = self.terms[place]
            size = min(term.batch_size or count, count)
            try:
                return run(term)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # here and not above: until the handler is left, its traceback holds the graph that did not fit
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            half = (size + 1) // 2
            self.terms[place] = replace(term, batch_size=half)
            print(
                f"reward {term.name!r}: no memory for {size} images at once, so it goes on with {half}. `batch_size: "
                f"{half}` beside its name in the recipe saves the attempt.", file=sys.stderr,
            )  # fmt: skip


def score_term(term: Term, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
    """(B,) values of one term, higher is better, over its card's scale; and what to log of it.

    With `batch_size` the images go through in groups, and each group's graph is gone before the next one's is built:
    the gradient is taken on the way forward, which is exact because a value depends on its own image alone.
    Raises NonFiniteError, naming the reward, where a value is missing or not finite.
    """
    size = term.batch_size
    if size is None or len(prompts) <= size:
        return _score_group(term, images, prompts)
    if len(images) != len(prompts):
        raise DataError(
            f"reward {term.name!r}: {len(images)} images came with {len(prompts)} prompts. Give one an image."
        )
    seen: list[tuple[dict[str, float], int]] = []

    def group(start: int, some: Tensor) -> Tensor:
        value, metrics = _score_group(term, some, prompts[start : start + size])
        seen.append((metrics, len(some)))
        return value

    value = _Groups.apply(images, size, group)  # type: ignore[no-untyped-call]
    names = seen[0][0]
    metrics = {name: sum(found[name] * count for found, count in seen) / len(prompts) for name in names}
    return value, metrics


class _Groups(torch.autograd.Function):
    """(images (B, ...), size, group(start, images) -> values) -> (B,) values, each of its own image alone."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, size: int, group: Callable[[int, Tensor], Tensor]) -> Tensor:
        values, gradients = [], []
        wanted = ctx.needs_input_grad[0]
        for start in range(0, len(images), size):
            leaf = images.detach()[start : start + size].requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                value = group(start, leaf)
                if wanted:
                    gradients.append(torch.autograd.grad(value.sum(), leaf)[0])
            values.append(value.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return upstream[0].view(-1, *[1] * (gradients.dim() - 1)) * gradients, None, None


def _score_group(term: Term, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
    if term.relative is None:
        score = term.reward.score(images, prompts)
        value = reduce(score, term)
    else:
        score = term.reward.score(images, [_before(term.relative.positive, p) for p in prompts])
        other = term.reward.score(images, [_before(term.relative.negative, p) for p in prompts])
        check_score(term.name, other, len(prompts))
        value = (1 + term.relative.k) * reduce(score, term) - reduce(other, term)
    check_score(term.name, score, len(prompts))
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
    return sign * (value.float() - term.offset) / term.reward.card.scale, metrics


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
