"""Peak of live tensor memory while something runs: what an accelerator would need, on any device.

Saved-tensor hooks miss what checkpointing recomputes, and the process's resident memory does not fall; so every storage
that an operation returns is counted until it is freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveBytes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._known and id(storage) not in given:
                    self._known.add(storage)
                    size = storage.nbytes()
                    self.now += size
                    weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def peak_live_bytes(function: Callable[[], object]) -> int:
    """Largest sum of bytes that tensors made inside `function` held at one time. Slows every operation down.

    What exists before, such as weights, is not counted; gradients that `function` leaves behind are.
    """
    with _LiveBytes() as mode:
        function()
    peak: int = mode.peak
    return peak
