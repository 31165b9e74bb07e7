"""Runs each guarded recipe as `rewardtune train` does and says how it ended. Run by `test_guard_processes.py`.

Globals: RECIPES, PLUGIN, ROOT, RESULT, ENV.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from rewardtune import registry


def load(content: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter

    from rewardtune.recipe.file import LoadedRecipe
    from rewardtune.recipe.sections import Recipe

    recipe: Any = TypeAdapter(Recipe).validate_python(content)
    return LoadedRecipe(recipe=recipe, source=Path("a.yaml"), text="", name="a")


def main(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The exit code, and how many sharded modules were left when the export began to load whole ones."""
    from rewardtune.errors import RewardTuneError
    from rewardtune.training import run

    found: dict[str, Any] = {"code": 0, "parts_left": 0}
    restored = run._restored

    def counting(*given: Any, **named: Any) -> Any:
        found["parts_left"] = sum(isinstance(thing, FSDPModule) for thing in gc.get_objects())
        return restored(*given, **named)

    run._restored = counting  # type: ignore[assignment]
    try:
        run.train_recipe(load(content), out=folder)
    except RewardTuneError as error:
        print(error, file=sys.stderr)
        found["code"] = error.exit_code
    finally:
        run._restored = restored  # type: ignore[assignment]
    return found


def late(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As after a signal in a step whose look is due: that look is made first thing, and here before the second process
    has come so far."""
    from rewardtune.build import build_guard, build_task
    from rewardtune.guard.guard import Guard
    from rewardtune.training import runtime
    from rewardtune.training.loop import train

    recipe = load(content).recipe
    where = runtime.start(device="cpu")
    folder.mkdir(exist_ok=True)

    def part(until: int) -> None:
        task = build_task(recipe, device="cpu")
        train(
            task, folder=folder, train=recipe.train, optimizer=recipe.optimizer, where=where, until=until,
            guard=build_guard(recipe, task, folder),
        )  # fmt: skip

    part(2)
    looks = folder / "guard" / "looks.jsonl"
    whole = looks.read_text()
    where.gather(None)
    if where.main:
        looks.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    where.gather(None)
    resume = Guard.resume

    def waiting(guard: Guard, step: int) -> None:
        end = time.monotonic() + 5
        while not where.main and looks.read_text() != whole and time.monotonic() < end:
            time.sleep(0.01)
        resume(guard, step)

    Guard.resume = waiting  # type: ignore[method-assign]
    try:
        part(4)
    finally:
        Guard.resume = resume  # type: ignore[method-assign]
    return {"code": 0, "looks": [json.loads(line)["step"] for line in looks.read_text().splitlines()]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = globals()
    os.environ.update(given["ENV"])
    registry.load_plugin(given["PLUGIN"])
    found: dict[str, Any] = {}
    try:
        for name, content in given["RECIPES"].items():
            found[name] = (late if name == "late" else main)(content, Path(given["ROOT"]) / name)
    except Exception:
        found = {"error": traceback.format_exc()}
    Path(given["RESULT"]).write_text(json.dumps(found))
    sys.stdout.flush()
    # a process that failed must not wait for the other one in the process group's end
    os._exit("error" in found)
