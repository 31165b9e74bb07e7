"""Weights, pixels and ids that any machine makes alike, for figures recorded from the code of others.

No generator of random numbers is asked: each number is a hash of its name and place, so neither a version of torch nor
the order in which a model makes its parameters changes one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def uniform(name: str, shape: Sequence[int]) -> Tensor:
    """float32 in [0, 1)."""
    count = int(np.prod(shape)) if len(shape) else 1
    place = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 20)
    # the finaliser of splitmix64 (Steele, Lea and Flood 2014), which wraps on purpose
    with np.errstate(over="ignore"):
        place = place * np.uint64(0x9E3779B97F4A7C15)
        place = (place ^ (place >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        place = (place ^ (place >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        place = place ^ (place >> np.uint64(31))
    return torch.from_numpy(((place >> np.uint64(40)).astype(np.float32) / np.float32(2**24)).reshape(tuple(shape)))


def weights(shapes: Mapping[str, Sequence[int]], *, spread: float) -> dict[str, Tensor]:
    """A state dict: uniform in [-spread, spread]; what scales after a normalisation lies around 1."""
    made = {}
    for name, shape in shapes.items():
        values = spread * (2 * uniform(name, shape) - 1)
        made[name] = values + 1 if len(shape) == 1 and name.endswith("weight") else values
    return made
