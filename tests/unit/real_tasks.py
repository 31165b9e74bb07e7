"""Trains each recipe whole, and again with a stop after every step, and says whether the ends are equal.

Run by `test_resume.py` in one and in two processes; globals: RECIPES, PLUGIN, ROOT, RESULT, ENV.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from rewardtune import registry
from rewardtune.training import runtime
from rewardtune.training.track import read_metrics


def train(recipe: Any, folder: Path, *, until: int) -> dict[str, torch.Tensor]:
    from rewardtune.build import build_task
    from rewardtune.training.loop import train as loop

    folder.mkdir(parents=True, exist_ok=True)
    where = runtime.start(device="cpu", precision=recipe.train.precision)
    where.gather(None)
    task = build_task(recipe, device="cpu")
    state = loop(task, folder=folder, train=recipe.train, optimizer=recipe.optimizer, where=where, until=until)
    parts, _ = state.pack()
    return {f"{part}/{name}": t.detach().clone() for part, some in parts.items() for name, t in some.items()}


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in read_metrics(folder / "metrics.jsonl")]


def main(recipes: dict[str, Any], root: Path) -> dict[str, Any]:
    from pydantic import TypeAdapter

    from rewardtune.recipe.sections import Recipe

    found = {}
    for name, content in recipes.items():
        recipe = TypeAdapter(Recipe).validate_python(content)
        whole = train(recipe, root / name / "whole", until=recipe.train.steps)
        for step in range(1, recipe.train.steps + 1):
            cut = train(recipe, root / name / "cut", until=step)
        equal = whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
        lines = numbers(root / name / "whole")
        found[name] = {"equal": equal, "lines_equal": lines == numbers(root / name / "cut"), "lines": lines}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = globals()
    os.environ.update(given["ENV"])
    registry.load_plugin(given["PLUGIN"])
    try:
        found = main(given["RECIPES"], Path(given["ROOT"]))
    except Exception:
        found = {"error": traceback.format_exc()}
    Path(given["RESULT"]).write_text(json.dumps(found))
    sys.exit("error" in found)
