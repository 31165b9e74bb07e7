"""Randomness keyed by (seed, stream, step, index): never by rank, never by what was drawn before.

The same key gives the same numbers on a resumed run, with another number of processes, and in another order.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit key of the parts."""
    text = "/".join([str(seed), stream, *map(str, counters)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, stream: str, *counters: int) -> torch.Generator:
    """A CPU generator for tensors; sample on the CPU, then move, so that devices agree."""
    import torch

    return torch.Generator().manual_seed(key(seed, stream, *counters))


def choice(seed: int, stream: str, *counters: int) -> random.Random:
    """A generator for choices outside tensors."""
    return random.Random(key(seed, stream, *counters))


def epoch_index(seed: int, stream: str, index: int, size: int) -> int:
    """Row for the global sample `index` when `size` rows are walked in a new order every epoch."""
    epoch, position = divmod(index, size)
    return _order(seed, stream, epoch, size)[position]


_orders: dict[tuple[int, str, int, int], list[int]] = {}


def _order(seed: int, stream: str, epoch: int, size: int) -> list[int]:
    """The permutation of one epoch; only the last few are kept."""
    wanted = (seed, stream, epoch, size)
    if wanted not in _orders:
        while len(_orders) > 4:
            _orders.pop(next(iter(_orders)))
        rows = list(range(size))
        choice(seed, stream, epoch).shuffle(rows)
        _orders[wanted] = rows
    return _orders[wanted]
