"""`rewardtune rewards test`: does a loaded reward keep the contract of `plugins.Reward` on this machine?

Needs nothing but the reward: pictures are smooth noise, prompts those of the pocket world, which carry metadata too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardtune.data.records import read_prompts
from rewardtune.errors import RewardTuneError
from rewardtune.plugins import Reward
from rewardtune.randomness import generator
from rewardtune.types import Prompt, Score

COUNT = 3
SIZE = 64
"""Pixels a side where the card names no native resolution."""
REGROUPED = 1e-4
"""Ours: largest difference, relative to the card's scale, when the same image is scored in another batch. Kernels
round differently with another batch size (about 1e-6 a forward); batch statistics would show as 1e-2 and more."""
SLOPE = 0.05
"""Ours: largest relative error of the gradient against central differences in fp32."""


@dataclass(frozen=True)
class Check:
    """One line of the answer. found: what was measured, in words."""

    name: str
    passed: bool
    found: str


def check_reward(reward: Reward, *, device: str = "cpu") -> list[Check]:
    """All checks that apply to this reward; a check that raises has failed."""
    size = reward.card.native_resolution or SIZE
    images = probe_images(COUNT, size=size).to(device)
    prompts = read_prompts("pocket:prompts/heldout")[:COUNT]
    return [_run(name, check, reward, images, prompts) for name, check in _checks(reward)]


def probe_images(count: int, *, size: int) -> Tensor:
    """(count, 3, size, size) smooth pictures in [0.1, 0.9], away from the ends where clamping hides gradients."""
    coarse = torch.rand(count, 3, 8, 8, generator=generator(0, "reward-checks"))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return 0.1 + 0.8 * smooth


Checker = Callable[[Reward, Tensor, Sequence[Prompt]], tuple[bool, str]]


def _checks(reward: Reward) -> Iterator[tuple[str, Checker]]:
    yield "one finite value an image", _values
    if reward.card.dimensions:
        yield "distribution", _distribution
    yield "deterministic", _deterministic
    yield "independent of batch mates", _batch_mates
    yield "prompt is read as the card says", _reads_prompt
    if reward.card.differentiable:
        yield "gradient reaches every image", _gradient
        yield "no gradient across images", _no_crosstalk
        yield "gradient equals finite differences", _finite_differences
    else:
        yield "no graph, as the card says", _no_graph


def _run(name: str, check: Checker, reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Check:
    try:
        passed, found = check(reward, images, prompts)
    except RewardTuneError as error:
        return Check(name, False, str(error))
    except Exception as error:  # whatever a plug-in does wrong is the answer, not our crash
        return Check(name, False, f"raised {type(error).__name__}: {error}")
    return Check(name, passed, found)


def _score(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Score:
    with torch.no_grad():
        return reward.score(images, prompts)


def _values(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> tuple[bool, str]:
    value = _score(reward, images, prompts).value
    if value.shape != (COUNT,) or value.dtype != torch.float32:
        return False, f"shape {tuple(value.shape)} of {value.dtype} for {COUNT} images; expected ({COUNT},) of float32"
    shown = ", ".join(f"{number:.4g}" for number in value.tolist())
    if not bool(torch.isfinite(value).all()):
        return False, f"values {shown}"
    if reward.card.range is not None:
        low, high = reward.card.range
        if bool((value < low - 1e-4).any() or (value > high + 1e-4).any()):
            return False, f"values {shown} leave the card's range {low:g} to {high:g}"
    return True, f"values {shown}"


def _distribution(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> tuple[bool, str]:
    score = _score(reward, images, prompts)
    if score.distribution is None or score.levels is None:
        return False, "the card names dimensions, and there is no distribution"
    if score.dimensions != reward.card.dimensions:
        return False, f"dimensions {score.dimensions}; the card has {reward.card.dimensions}"
    expected = (COUNT, len(score.dimensions), len(score.levels))
    if tuple(score.distribution.shape) != expected:
        return False, f"shape {tuple(score.distribution.shape)}; expected {expected}"
    off = (score.distribution.sum(-1) - 1).abs().max().item()
    rising = bool((score.levels.diff() > 0).all())
    fine = off < 1e-4 and rising and bool((score.distribution >= 0).all())
    return fine, f"rows sum to 1 within {off:.1g}, levels {'rise' if rising else 'do not rise'}"


def _deterministic(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> tuple[bool, str]:
    first, second = (_score(reward, images, prompts).value for _ in range(2))
    return torch.equal(first, second), f"largest difference of two calls {(first - second).abs().max():.2g}"


def _batch_mates(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> tuple[bool, str]:
    together = _score(reward, images, prompts).value
    alone = torch.cat([_score(reward, images[i : i + 1], prompts[i : i + 1]).value for i in range(COUNT)])
    reverse = list(range(COUNT))[::-1]
    turned = _score(reward, images[reverse], [prompts[i] for i in reverse]).value[reverse]
    off = max((together - alone).abs().max().item(), (together - turned).abs().max().item()) / reward.card.scale
    return off <= REGROUPED, f"alone, together and in another order differ by {off:.2g} (at most {REGROUPED:g})"


def _reads_prompt(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> tuple[bool, str]:
    own = _score(reward, images, prompts).value
    others = [_score(reward, images, [*prompts[i:], *prompts[:i]]).value for i in range(1, COUNT)]
    changed = any(not torch.equal(own, other) for other in others)
    found = "other prompts change the value" if changed else "other prompts change nothing"
    return changed == reward.card.needs_prompt, f"{found}; needs_prompt is {reward.card.needs_prompt}"


def _jacobian(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """(B, B, 3, H, W): gradient of value i with respect to image j."""
    rows = []
    for index in range(COUNT):
        leaf = images.detach().clone().requires_grad_(True)
        value = reward.score(leaf, prompts).value[index]
        rows.append(torch.autograd.grad(value, leaf)[0])
    return torch.stack(rows)


def _gradient(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> tuple[bool, str]:
    norms = [block.norm().item() for block in torch.diagonal(_jacobian(reward, images, prompts)).movedim(-1, 0)]
    shown = ", ".join(f"{norm:.2g}" for norm in norms)
    return all(0 < norm < float("inf") for norm in norms), f"norms {shown}"


def _no_crosstalk(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> tuple[bool, str]:
    jacobian = _jacobian(reward, images, prompts)
    others = [jacobian[i, j] for i in range(COUNT) for j in range(COUNT) if i != j]
    largest = max(block.abs().max().item() for block in others)
    return largest == 0.0, f"largest entry {largest:.2g} (must be exactly 0)"


def _finite_differences(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> tuple[bool, str]:
    """Along the gradient's own direction, at the best of three step lengths: too short drowns in rounding."""
    gradient = torch.diagonal(_jacobian(reward, images, prompts)).movedim(-1, 0)
    direction = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    slope = (gradient * direction).sum(dim=(1, 2, 3))
    errors = []
    for step in (1e-2, 3e-3, 1e-3):
        up, down = (_score(reward, images + sign * step * direction, prompts).value for sign in (1, -1))
        errors.append(((up - down) / (2 * step) - slope).abs() / slope.abs())
    worst = torch.stack(errors).amin(dim=0).max().item()
    return worst <= SLOPE, f"relative error {worst:.2g} (at most {SLOPE:g})"


def _no_graph(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> tuple[bool, str]:
    value = reward.score(images.detach().clone().requires_grad_(True), prompts).value
    found = "carries a graph although the card says it is not differentiable" if value.requires_grad else "none"
    return not value.requires_grad, found
