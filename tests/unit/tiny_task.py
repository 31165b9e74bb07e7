"""A small real task for the tests of the loop, and a way to run it as a recipe in another process.

A net of two layers fits a keyed linear map. Data is drawn by global index, so what a step sees does not depend on
processes. As the built-in tasks load whole pipelines, `tiny_build` takes the place of `build.build_task` in its runs.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rewardtune.errors import NonFiniteError, RewardTuneError
from rewardtune.randomness import generator
from rewardtune.recipe.file import LoadedRecipe
from rewardtune.recipe.sections import DirectRewardRecipe
from rewardtune.types import StepOutput


class TinyTask:
    """broken: global index -> what goes wrong there: loss, inf, grad or reward. pause: seconds a micro-batch takes.

    signal_at: global index at which the process that holds it gets SIGTERM.
    """

    def __init__(
        self,
        *,
        broken: Mapping[int, str] | None = None,
        dropout: float = 0.0,
        pause: float = 0.0,
        width: int = 16,
        signal_at: int | None = None,
    ) -> None:
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3))
        self.fixed = nn.Linear(6, 6).requires_grad_(False)
        self.trainable = {"net": self.net, "frozen": self.fixed}
        self.broken = broken or {}
        self.pause = pause
        self.signal_at = signal_at
        self.answer = torch.randn(6, 3, generator=generator(0, "answer"))
        self.seen: list[tuple[int, list[int]]] = []

    def batch(self, step: int, indices: Sequence[int]) -> Any:
        assert not torch.is_grad_enabled()
        self.seen.append((step, list(indices)))
        if self.signal_at in indices:
            os.kill(os.getpid(), signal.SIGTERM)
        rows = torch.stack([torch.randn(6, generator=generator(0, "rows", i)) for i in indices])
        return rows, [self.broken.get(i, "") for i in indices]

    def step(self, batch: Any) -> StepOutput:
        time.sleep(self.pause)
        rows, broken = batch
        out = self.net(rows + 0.1 * self.fixed(rows))
        loss = (out - rows @ self.answer).square().mean()
        if "reward" in broken:
            raise NonFiniteError("reward `tiny` returned nan.")
        if "loss" in broken:
            loss = loss * math.nan
        if "inf" in broken:
            loss = loss * math.inf
        if "grad" in broken:
            loss = loss + OneNan.apply(self.net[0].weight)
        return StepOutput(loss, {"reward/fit": -float(loss.detach()), "mean_row": float(rows.mean())})

    def samples(self) -> Tensor | None:
        return None

    def evaluate(self) -> Mapping[str, float]:
        assert not torch.is_grad_enabled()
        return {"weight": float(self.net[0].weight.sum())}

    def export(self, folder: Path, provenance: Mapping[str, str]) -> None:
        save_file(dict(self.net.state_dict()), folder / "net.safetensors", metadata=dict(provenance))


class OneNan(torch.autograd.Function):
    """Adds nothing to the loss and one NaN to the gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.shape = weight.shape
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # type: ignore[override]
        gradient = torch.zeros(ctx.shape)
        gradient[0, 0] = math.nan
        return gradient


def tiny_build(recipe: Any, *, device: str) -> TinyTask:
    """The task whose settings `data.prompts` carries as JSON."""
    settings = json.loads(recipe.data.prompts)
    settings["broken"] = {int(index): how for index, how in settings.get("broken", {}).items()}
    return TinyTask(**settings)


def tiny_recipe(
    *,
    train: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    **sections: Any,
) -> LoadedRecipe:
    """A recipe of 12 steps of 8 samples on the CPU; what is given changes it."""
    content = {
        "task": "direct_reward",
        "pipeline": {"model": "none"},
        "lora": {},
        "data": {"prompts": json.dumps(task or {})},
        "gradient": {"method": "refl"},
        "rewards": [{"name": "none"}],
        "optimizer": {"lr": 0.01, "schedule": "cosine", "warmup_steps": 2},
        "train": {"steps": 12, "batch_size": 8, "device": "cpu", **(train or {})},
        "checkpoint": {"every": 4, **(checkpoint or {})},
        **sections,
    }
    recipe = DirectRewardRecipe.model_validate(content)
    return LoadedRecipe(recipe=recipe, source=Path("tiny.yaml"), text=f"# {content}\n", name="tiny")


def build_module() -> ModuleType:
    """What takes the place of `rewardtune.build`."""
    module = ModuleType("rewardtune.build")
    module.build_task = tiny_build  # type: ignore[attr-defined]
    return module


def start(job: Mapping[str, Any], *, stderr: Path, env: Mapping[str, str] | None = None) -> BaseProcess:
    """Run a job in a process of its own, forked from one that has imported everything.

    job: `out`, `nproc`, `allow_changed`, and what `tiny_recipe` takes; or `jobs`, several by name.
    """
    import processes

    return processes.start(Path(__file__), {"JOB": job, "STDERR": str(stderr), "ENV": dict(env or {})})


def main(job: Mapping[str, Any]) -> None:
    from rewardtune.training.run import train_recipe

    settings = {key: value for key, value in job.items() if key not in ("out", "nproc", "allow_changed")}
    rest = {"nproc": job.get("nproc", 1), "allow_changed": job.get("allow_changed", ()), "plugins": [__file__]}
    try:
        train_recipe(tiny_recipe(**settings), out=job["out"], **rest)
    except RewardTuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def main_of_many(jobs: Mapping[str, Mapping[str, Any]], results: Path) -> None:
    """Several jobs in turn in one process group; notes the exit code of each in this rank."""
    codes = {}
    for name, job in jobs.items():
        try:
            main(job)
            codes[name] = 0
        except SystemExit as error:
            codes[name] = int(error.code or 0)
    results.with_suffix(f".rank{os.environ['RANK']}.json").write_text(json.dumps(codes))


# A run of several processes imports this file in each of them, as what --plugin names.
if os.environ.get("TINY_BUILD"):
    sys.modules["rewardtune.build"] = build_module()

if __name__ == "__main__":
    os.environ.update({"TINY_BUILD": "1", "OMP_NUM_THREADS": "1", **globals()["ENV"]})
    sys.modules["rewardtune.build"] = build_module()
    torch.set_num_threads(1)
    descriptor = os.open(globals()["STDERR"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    if "jobs" in globals()["JOB"]:
        main_of_many(globals()["JOB"]["jobs"], Path(globals()["STDERR"]))
    else:
        main(globals()["JOB"])
