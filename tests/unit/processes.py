"""Runs scripts in processes forked from one that has imported everything, alone or as a group as of torchrun."""

from __future__ import annotations

import multiprocessing
import runpy
import socket
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = ["accelerate", "diffusers.optimization", "rewardtune.build", "rewardtune.training.loop",
           "rewardtune.training.run_folder"]  # fmt: skip


def start(script: Path, given: Mapping[str, Any]) -> BaseProcess:
    """Run a script as `__main__` with these globals."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    kwargs = {"init_globals": dict(given), "run_name": "__main__"}
    process = context.Process(target=runpy.run_path, args=(str(script),), kwargs=kwargs, daemon=True)
    process.start()
    return process


def group(count: int) -> list[dict[str, str]]:
    """The environment of each process of a group on this machine; of one process that stands alone."""
    if count == 1:
        return [{"OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"OMP_NUM_THREADS": "1", **size, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def join(processes: Sequence[BaseProcess], said: Callable[[], list[str]]) -> None:
    """Wait for all; `said` is what a failure shows."""
    for process in processes:
        process.join(800)
        assert process.exitcode == 0, said()
