"""Ways to take the reward gradient: one small file each. Prompts and noise -> latents that carry gradient.

To add one: write `gradients/<method>.py` with a function of the type `Method`, add its section to
`recipe/sections.py` and a line to `METHODS`; and to `CHOICES`, if all it does is to choose steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rewardtune.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from rewardtune.diffusion.rollout import Chain


class Method(Protocol):
    """Run the chain from `noise` and return finished latents (or an estimate of them) with graph.

    `rng` is keyed by seed and optimiser step: the same on every process. Keywords are the fields of the method's
    section in `recipe/sections.py`.
    """

    def __call__(self, chain: Chain, noise: Tensor, rng: random.Random, **settings: Any) -> Tensor: ...


class Choice(NamedTuple):
    """What a method asks of a pipeline that is run as a whole: see `plugins.WholeRollout.rollout`."""

    gradient_steps: slice
    recompute: bool


METHODS: Mapping[str, str] = {
    "refl": "rewardtune.gradients.refl:refl",
    "draft": "rewardtune.gradients.draft:draft",
}
CHOICES: Mapping[str, str] = {
    "draft": "rewardtune.gradients.draft:choice",
}
"""Methods that only choose steps: a function of the settings that says which."""


def load_choice(name: str) -> Callable[..., Choice]:
    """Raises RecipeError for a method that takes single steps."""
    if name not in CHOICES:
        raise RecipeError(
            f"gradient.method {name} takes single steps, and the recipe's pipeline can only be run as a whole. "
            f"Write one of: {', '.join(CHOICES)}; or give the pipeline an adapter of its own (rewardtune/plugins.py)."
        )
    module, function = CHOICES[name].split(":")
    choice: Callable[..., Choice] = getattr(import_module(module), function)
    return choice


def load_method(name: str) -> Callable[..., Tensor]:
    module, function = METHODS[name].split(":")
    method: Callable[..., Tensor] = getattr(import_module(module), function)
    return method
