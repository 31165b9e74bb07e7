"""What goes into a reward is checked here, once for all of them, and what comes out too.

`load_reward` puts this before every reward, a plug-in's of a user as well as ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rewardtune.errors import DataError, NonFiniteError, PluginError, RewardTuneError
from rewardtune.plugins import Reward, RewardCard
from rewardtune.types import Score

BEYOND = 1e-2
"""Ours: how far a pixel may leave [0, 1]. Rounding and resizing go a little beyond; the next mistakes of users, [-1, 1]
and [0, 255], are far off."""


class Checked:
    """A reward that refuses what it cannot judge. Anything but `score` is the reward's own.

    place: its device, where images come from another and values go back there, and gradients on their way.
    """

    def __init__(self, reward: Reward, config: Any = None, *, place: torch.device | None = None) -> None:
        self.reward, self.config, self.place = reward, config, place
        self.card: RewardCard = reward.card

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. The reward gets float32 and computes outside autocast: its precision is its own.

        Raises DataError for images or prompts that it cannot judge, NonFiniteError for pixels or values without a
        number, PluginError for what is no score of these images, NoGraph where a gradient was asked for and the card
        promises one; each names reward, argument and remedy.
        """
        check_images(self.card.name, images)
        check_prompts(self.card, prompts, len(images))
        given = images.float() if self.place is None else images.float().to(self.place)
        with named(self.card.name), torch.autocast(given.device.type, enabled=False):
            score = self.reward.score(given, prompts)
        check_score(self.card.name, score, len(images))
        if self.card.differentiable and given.requires_grad and torch.is_grad_enabled():
            value = score.value if score.distribution is None else score.distribution
            if not value.requires_grad:  # the loss would have no graph either, and a run would train nothing to its end
                raise _no_graph(self.card.name)
        return score if self.place is None else score.to(images.device)

    def __getattr__(self, name: str) -> Any:
        if name == "reward":  # not set yet, as while unpickling: no reward to ask
            raise AttributeError(name)
        return getattr(self.reward, name)


@contextmanager
def named(name: str) -> Iterator[None]:
    """What goes wrong inside, where loaders and servers know of no reward, is told with the reward's name."""
    try:
        yield
    except RewardTuneError as error:
        told = str(error)
        if repr(name) in told or told.startswith(f"{name}:"):
            raise
        raise type(error)(f"reward {name!r}: {told}") from error


def check_images(name: str, images: Any) -> None:
    """Float (B, 3, H, W) in [0, 1]. One look at the values, so one wait for the device."""
    wanted = f"reward {name!r}: images must be a float tensor (B, 3, H, W) in [0, 1]"
    if not isinstance(images, torch.Tensor):
        kind = type(images).__name__
        raise DataError(f"{wanted}, not {kind}. Pictures become one with `rewardtune.data.images.to_tensor(pictures)`.")
    shape = tuple(images.shape)
    if images.dim() != 4:
        hint = "Add the batch: images[None]." if images.dim() == 3 else "Stack pictures of one size along the first."
        raise DataError(f"{wanted}; these have the shape {shape}. {hint}")
    if shape[1] != 3:
        hint = {
            1: "They are greyscale: images.expand(-1, 3, -1, -1) makes them RGB.",
            4: "They have four channels: put them on a background, rgb * alpha + (1 - alpha), and give the three.",
        }.get(shape[1], "Give red, green and blue.")
        if shape[3] == 3:
            hint = "The channels are last: images.permute(0, 3, 1, 2) puts them second."
        raise DataError(f"{wanted}; these have the shape {shape}. {hint}")
    if not all(shape):
        raise DataError(f"{wanted}; these have the shape {shape}, which holds no pixel. Leave empty batches out.")
    if not images.is_floating_point():
        raise DataError(f"{wanted}; these are {images.dtype}. Write images.float() / 255 for bytes.")
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        bad = (~torch.isfinite(images.detach()).flatten(1).all(1)).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"reward {name!r}: images {bad} of the batch hold NaN or infinite pixels, which no reward can judge. Look "
            "at what made them: a learning rate that is too high, or a decoder in float16."
        )
    if low < -BEYOND or high > 1 + BEYOND:
        hint = "images.clamp(0, 1) cuts off what a decoder overshoots."
        if high > 2:
            hint = "Values up to 255 want images / 255."
        elif low < -0.5:
            hint = "Values in [-1, 1] want images / 2 + 0.5."
        raise DataError(f"{wanted}; these reach from {low:.3g} to {high:.3g}. {hint}")


def check_prompts(card: RewardCard, prompts: Any, count: int) -> None:
    """One string an image, with the metadata that the card asks for."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        kind = "one string" if isinstance(prompts, str) else type(prompts).__name__
        raise DataError(
            f"reward {card.name!r}: prompts must be a list with one string an image, not {kind}. "
            "Write [prompt] * len(images) where all images have the same."
        )
    if len(prompts) != count:
        raise DataError(
            f"reward {card.name!r}: {count} images came with {len(prompts)} prompts. Give one an image, in their order."
        )
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise DataError(
                f"reward {card.name!r}: prompt {index} is {type(prompt).__name__}, not a string. Give '' for none."
            )
        lacking = [key for key in card.metadata if key not in getattr(prompt, "metadata", {})]
        if lacking:
            raise DataError(
                f"reward {card.name!r}: prompt {index}, {str(prompt)[:80]!r}, lacks the metadata "
                f"{', '.join(map(repr, lacking))}. Give prompts as a .jsonl file whose rows have `prompt` and "
                f"{', '.join(f'`{key}`' for key in lacking)}, or as rewardtune.types.Prompt(text, {{...}})."
            )


class NoGraph(PluginError):
    """A reward that calls itself differentiable and is not."""


def gradient_of(name: str, value: Tensor, images: Tensor) -> Tensor:
    """The gradient of a reward's number with respect to images. Raises NoGraph where it has none."""
    found = torch.autograd.grad(value, images, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise _no_graph(name)
    return found


def _no_graph(name: str) -> NoGraph:
    return NoGraph(
        f"reward {name!r}: no gradient can be taken: the card says differentiable, and `value` has no graph that leads "
        "back to the images. Something in `score` cuts it: detach, item, tolist, numpy, PIL, torch.tensor(...) or "
        "no_grad. Compute in torch from the images on, or write differentiable=False in the card."
    )


def check_score(name: str, score: Any, count: int) -> None:
    """Raise PluginError for what is no `Score` with a number an image, and NonFiniteError for numbers that are missing:
    those are never turned into others."""
    if not isinstance(score, Score) or not isinstance(score.value, torch.Tensor):
        found = f"a {type(score.value).__name__} as its value" if isinstance(score, Score) else type(score).__name__
        raise PluginError(
            f"reward {name!r} returned {found}, where rewardtune.types.Score with a tensor of {count} numbers was "
            "expected. Write `return Score(value)`."
        )
    if score.value.shape != (count,):
        raise PluginError(
            f"reward {name!r} returned {tuple(score.value.shape)} values for {count} images; it must return one each"
        )
    if not bool(torch.isfinite(score.value).all()):
        bad = (~torch.isfinite(score.value)).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"reward {name!r} returned a value that is not finite for image(s) {bad} of the batch. Nothing was updated "
            f"from it. Run `rewardtune rewards test {name}`; in bf16, try train.precision=fp32."
        )
