"""Ways to take the reward gradient: one small file each. Prompts and noise -> latents that carry gradient.

To add one: write `gradients/<method>.py` with a function of the type `Method`, add its section to
`recipe/sections.py` and a line to `METHODS`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from rewardtune.diffusion.rollout import Chain


class Method(Protocol):
    """Run the chain from `noise` and return finished latents (or an estimate of them) with graph.

    `rng` is keyed by seed and optimiser step: the same on every process. Keywords are the fields of the method's
    section in `recipe/sections.py`.
    """

    def __call__(self, chain: Chain, noise: Tensor, rng: random.Random, **settings: Any) -> Tensor: ...


METHODS: Mapping[str, str] = {
    "refl": "rewardtune.gradients.refl:refl",
    "draft": "rewardtune.gradients.draft:draft",
}


def load_method(name: str) -> Callable[..., Tensor]:
    module, function = METHODS[name].split(":")
    method: Callable[..., Tensor] = getattr(import_module(module), function)
    return method
