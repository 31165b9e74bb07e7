"""A reward from a plain function: `(images, prompts) -> values`, and what a card says of it.

For what has no options and loads nothing worth keeping; anything else is a class (`registry.register_reward`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from rewardtune.errors import PluginError
from rewardtune.plugins import Options, RewardCard
from rewardtune.registry import rewards

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.types import Score

F = TypeVar("F", bound=Callable[..., Any])


def register_reward_function(
    name: str,
    *,
    summary: str | None = None,
    differentiable: bool = False,
    needs_prompt: bool = True,
    range: tuple[float, float] | None = None,
    **card: Any,
) -> Callable[[F], F]:
    """Decorator, or call, that makes a reward of any callable: `@rewardtune.register_reward_function("darkness")`.

    The callable gets images, a float tensor (B, 3, H, W) in [0, 1], and B prompts; it returns B numbers, as a tensor,
    an array or a list, and is itself left as it was. Without gradient by default: it is called under no_grad with
    detached images, and can score, compare and guard but not be trained on. With `differentiable` it must return a
    tensor with graph. summary: the first line of its docstring, where none is given. card: further fields of
    `RewardCard`. Raises PluginError for a field that a card does not have.
    """
    unknown = sorted(set(card) - {field.name for field in fields(RewardCard)})
    if unknown:
        raise PluginError(
            f"register_reward_function({name!r}): a card has no {', '.join(unknown)}; its fields are those of "
            "rewardtune.plugins.RewardCard."
        )

    def decorate(function: F) -> F:
        said = summary or " ".join((getattr(function, "__doc__", None) or "").strip().partition("\n")[0].split())
        described = RewardCard(
            name, said or f"the function {getattr(function, '__qualname__', type(function).__qualname__)}",
            differentiable=differentiable, needs_prompt=needs_prompt, range=range,
            # a function may count, and a count may turn on a single grey level
            **{"pillow_difference": 0.05 if differentiable else None, **card},
        )  # fmt: skip
        rewards.register(name, _class_of(function, described))
        return function

    return decorate


def _class_of(function: Callable[..., Any], described: RewardCard) -> type:
    """The plug-in that calls the function, under the function's own module, so that errors and lists name its file."""

    class FunctionReward:
        card = described
        Config = Options

        @classmethod
        def load(cls, config: Options, *, device: str | torch.device) -> FunctionReward:
            return cls()

        def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
            """See `plugins.Reward`."""
            import torch

            from rewardtune.types import Score

            if described.differentiable:
                return Score(_numbers(function(images, prompts), images, described))
            with torch.no_grad():
                return Score(_numbers(function(images.detach(), prompts), images, described))

    FunctionReward.function = staticmethod(function)  # type: ignore[attr-defined]  # what an entry point may name
    FunctionReward.__module__ = getattr(function, "__module__", None) or type(function).__module__
    FunctionReward.__qualname__ = getattr(function, "__qualname__", type(function).__qualname__)
    FunctionReward.__doc__ = described.summary
    return FunctionReward


def _numbers(found: Any, images: Tensor, card: RewardCard) -> Tensor:
    """(B,) float32 on the images' device. Raises PluginError for anything that is not one number an image."""
    import torch

    wanted = f"reward {card.name!r}: its function must return {len(images)} numbers, one an image"
    if card.differentiable and not isinstance(found, torch.Tensor):
        raise PluginError(
            f"{wanted}, as a tensor with graph since it is registered as differentiable; it returned "
            f"{type(found).__name__}. Compute in torch, or leave `differentiable` out."
        )
    try:
        numbers = torch.as_tensor(found, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PluginError(f"{wanted}; it returned {str(found)[:80]!r} ({type(found).__name__}).") from error
    if numbers.shape != (len(images),) or numbers.is_complex():
        raise PluginError(f"{wanted}; it returned the shape {tuple(numbers.shape)} of {numbers.dtype}.")
    return numbers.float()
