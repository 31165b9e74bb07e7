"""Where a run happens: device, processes, precision, attention kernels. Built once by `run.py`, used by the loop.

accelerate's PartialState finds the process group; tensors are averaged here and nowhere else.
"""

from __future__ import annotations

import datetime
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune import devices
from rewardtune.errors import RecipeError


@dataclass(frozen=True)
class Runtime:
    """One process of a run. `world` processes share the work; `rank` counts from 0."""

    device: torch.device
    rank: int = 0
    world: int = 1
    precision: str = "fp32"

    @property
    def main(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 arithmetic where the precision says so; trained parameters stay fp32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over processes, the same bits in each."""
        if self.world == 1:
            return tensor
        torch.distributed.all_reduce(tensor)
        return tensor.div_(self.world)

    def gather(self, value: Any) -> list[Any]:
        """One small object of each process, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's small object."""
        if self.world == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def peak_memory(self) -> int:
        """Bytes: peak allocated on a CUDA device, else peak resident of this process."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return _peak_resident()


def start(*, device: str | None = None, precision: str = "fp32") -> Runtime:
    """Choose the device and join the process group that torchrun or accelerate announced in the environment, if any.

    Raises RecipeError for a device that this machine lacks.
    """
    from accelerate import PartialState

    wanted = _device(device)
    # Only one process draws samples while the others wait in a collective, so the wait is long.
    state = PartialState(cpu=wanted.type == "cpu", timeout=datetime.timedelta(hours=4))
    world = state.num_processes
    if world > 1 and state.device.type != wanted.type:
        raise RecipeError(
            f"train.device is {wanted.type}, but the process group was set up for {state.device.type}; "
            "start a new process for another kind of device."
        )
    chosen = state.device if world > 1 else wanted
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif chosen.type == "cpu":
        _keep_freed_memory()
    return Runtime(device=chosen, rank=state.process_index, world=world, precision=precision)


def _keep_freed_memory() -> None:
    """Let glibc keep what tensors free. It would hand it back to the kernel, which clears it for the next tensor.

    dev/bench/cpu_allocation.py measures what this saves. Other C libraries are left as they are.
    """
    try:
        import ctypes

        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (ImportError, OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def process() -> tuple[int, int]:
    """Rank of this process and the number of processes, also where no `Runtime` is at hand."""
    if _grouped():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def finish() -> None:
    """Leave the process group, if there is one."""
    if _grouped():
        torch.distributed.destroy_process_group()


def set_attention(modules: Sequence[nn.Module], backend: str) -> str:
    """Use `backend` (diffusers' names) for attention in each module that can choose; returns what is used.

    A backend whose kernels do not load here is named in one line, and native attention is used instead.
    """
    if backend == "native":
        return backend
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = sorted(name.value for name in AttentionBackendName)
    if backend not in known:
        raise RecipeError(f"pipeline.attention {backend!r} is unknown; diffusers has: {', '.join(known)}.")
    reason = _xformers_problem() if backend == "xformers" else None
    able: list[Any] = [module for module in modules if hasattr(module, "set_attention_backend")]
    if reason is None and not able:
        reason = "no module of this pipeline lets its attention be chosen"
    if reason is None:
        try:
            for module in able:
                module.set_attention_backend(backend)
            return backend
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            for module in able:
                module.set_attention_backend("native")
    if os.environ.get("RANK", "0") == "0":
        print(f"attention: {backend} is not used here ({reason}); using native attention.", file=sys.stderr)
    return "native"


def _xformers_problem() -> str | None:
    """Why xformers' own kernels do not run here, or None. Its Python part imports even where its C++ part is broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xformers import _cpp_lib
    except ImportError:
        return "xformers is not installed; pip install 'rewardtune[xformers]'"
    if getattr(_cpp_lib, "_cpp_library_load_exception", None) is not None:
        return "xformers' kernels were built for another torch or CUDA"
    if not torch.cuda.is_available():
        return "its kernels need a CUDA device"
    return None


def _device(name: str | None) -> torch.device:
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return devices.find(name, key="train.device")


def _peak_resident() -> int:
    try:
        import resource
    except ImportError:
        # Windows has no such counter.
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
