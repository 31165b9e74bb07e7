"""Ways to take the reward gradient: one small file each. Prompts and noise -> latents that carry gradient.

They differ in four choices: which image the reward sees (the sample, or an estimate on the way), which steps carry
gradient, how these are weighted, and whether a path across steps is kept. `Chain.advance` takes a step either way.

To add one: write `gradients/<method>.py` with a function of the type `Method`, add its section to
`recipe/gradients.py` and a line to `METHODS`; and to `CHOICES`, if all it does is to choose steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rewardtune.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.diffusion.rollout import Chain


@dataclass(frozen=True)
class Draws:
    """Randomness of one micro-batch, keyed by seed, optimiser step and sample: the same on any number of processes."""

    shared: random.Random
    """Choices that hold for every image of the optimiser step, such as a step of the chain."""
    each: Sequence[torch.Generator]
    """One an image, for noise."""

    def noise_like(self, latents: Tensor) -> Tensor:
        """Standard normal noise, (B, ...)."""
        import torch

        drawn = [torch.randn(latents.shape[1:], generator=key) for key in self.each]
        return torch.stack(drawn).to(latents)


class Finished(NamedTuple):
    """What a method hands on to the decoder."""

    latents: Tensor
    """(n B, ...), copy by copy of the batch."""
    weights: Tensor | None = None
    """(n B,) factors on the rewards; 1 when None, negative where a reward is to fall."""


class Method(Protocol):
    """Run the chain from unit `noise` (`chain.start` scales it) and return finished latents with graph.

    Keywords are the fields of the method's section in `recipe/gradients.py`.
    """

    def __call__(self, chain: Chain, noise: Tensor, draws: Draws, **settings: Any) -> Finished: ...


class Choice(NamedTuple):
    """What a method asks of a pipeline that is run as a whole: see `plugins.WholeRollout.rollout`."""

    gradient_steps: Callable[[int], range]
    recompute: bool


METHODS: Mapping[str, str] = {
    "refl": "rewardtune.gradients.refl:refl",
    "draft": "rewardtune.gradients.draft:draft",
    "draft_lv": "rewardtune.gradients.draft_lv:draft_lv",
    "alignprop": "rewardtune.gradients.alignprop:alignprop",
    "drtune": "rewardtune.gradients.drtune:drtune",
    "direct_align": "rewardtune.gradients.direct_align:direct_align",
    "flowbp_sparse": "rewardtune.gradients.flowbp_sparse:flowbp_sparse",
}

CHOICES: Mapping[str, str] = {
    "draft": "rewardtune.gradients.draft:choice",
    "alignprop": "rewardtune.gradients.alignprop:choice",
}
"""Methods that only choose steps: a function of a micro-batch's draws and the settings that says which."""


def load_choice(name: str, **settings: Any) -> Callable[[Draws], Choice]:
    """A method's choice with its settings bound. Raises RecipeError for a method that takes single steps."""
    if name not in CHOICES:
        raise RecipeError(
            f"gradient.method {name} takes single steps, and the recipe's pipeline can only be run as a whole. "
            f"Write one of: {', '.join(CHOICES)}; or give the pipeline an adapter of its own (rewardtune/plugins.py)."
        )
    module, function = CHOICES[name].split(":")
    return partial(getattr(import_module(module), function), **settings)


def load_method(name: str, **settings: Any) -> Callable[..., Finished]:
    """A `Method` with its settings bound."""
    module, function = METHODS[name].split(":")
    return partial(getattr(import_module(module), function), **settings)
