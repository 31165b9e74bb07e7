"""Trains each case sharded and not, and says what of it was split. Run by `test_sharding.py` in two processes.

Globals: CASES, PLUGIN, ROOT, RESULT, ENV.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rewardtune import registry
from rewardtune.errors import RewardTuneError
from rewardtune.types import StepOutput


class Pieces:
    """A task that never calls the model itself: vision features, hidden states, rows of the tied output embedding.

    broken: global index -> what is not finite there, as in `tiny_task.py`. `half`: the frozen part is bf16.
    """

    def __init__(self, task: Any, *, half: bool, broken: Mapping[int, str]) -> None:
        self.task, self.trainable, self.broken = task, task.trainable, broken
        if half:
            for parameter in self.model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()

    @property
    def model(self) -> Any:
        return self.task.scorer.model

    def batch(self, step: int, indices: Sequence[int]) -> Any:
        return self.task.batch(step, indices), [self.broken.get(index, "") for index in indices]

    def step(self, given: Any) -> StepOutput:
        from rewardtune.errors import NonFiniteError
        from rewardtune.scorer.patches import patchify

        batch, broken = given
        scorer = self.task.scorer
        rows, grid = patchify(batch.images, scorer.geometry)
        with torch.no_grad():
            self.model.get_image_features(rows, image_grid_thw=grid)
        ids, mask = scorer._tokens(batch.prompts, (grid[:, 1] * grid[:, 2] // scorer.geometry.merge**2).tolist())
        kinds = (ids == self.model.config.image_token_id).int()
        hidden = self.model.model(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, pixel_values=rows, image_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        weight = self.model.get_output_embeddings().weight
        assert type(weight) is nn.Parameter and weight is self.model.get_input_embeddings().weight
        logits = hidden[:, -4:].float() @ weight[list(scorer.reading.level_ids)].float().T
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten(0, 1).softmax(-1))
        if "reward" in broken:
            raise NonFiniteError("reward `pieces` returned nan.")
        return StepOutput(loss * torch.nan if "loss" in broken else loss)

    def samples(self) -> None:
        return None

    def evaluate(self) -> Mapping[str, float]:
        return {}

    def export(self, folder: Path, provenance: Mapping[str, str]) -> None:
        raise AssertionError


def build(case: Mapping[str, Any]) -> tuple[Any, Any]:
    """(task, recipe) of a case."""
    from pydantic import TypeAdapter

    from rewardtune.build import build_task
    from rewardtune.recipe.sections import Recipe

    if "tiny" in case:
        import tiny_task

        settings = {**case["tiny"], "broken": {int(i): how for i, how in case["tiny"].get("broken", {}).items()}}
        task: Any = tiny_task.TinyTask(**settings)
        return task, tiny_task.tiny_recipe(train=case["train"]).recipe
    recipe: Any = TypeAdapter(Recipe).validate_python(case["recipe"])
    task = build_task(recipe, device="cpu")
    if "pieces" in case:
        given = case["pieces"]
        task = Pieces(task, half=given["half"], broken={int(i): how for i, how in given["broken"].items()})
    return task, recipe


def train(case: Mapping[str, Any], folder: Path, *, sharded: bool, until: int | None = None) -> Any:
    """Train a case in `folder`; (task, state)."""
    from rewardtune.training import runtime
    from rewardtune.training.loop import train as loop

    folder.mkdir(parents=True, exist_ok=True)
    task, recipe = build(case)
    section = recipe.train.model_copy(update={"shard": sharded})
    where = runtime.start(device="cpu", precision=section.precision)
    where.gather(None)
    return task, loop(task, folder=folder, train=section, optimizer=recipe.optimizer, where=where, until=until)


def split(task: Any, state: Any) -> dict[str, Any]:
    """How much of everything is a DTensor, and what share of its numbers is here."""
    moments = [t for values in state.optimizer.state.values() for t in values.values() if t.ndim]
    kinds = {
        "all": [p for module in task.trainable.values() for p in module.parameters()],
        "frozen": [p for module in getattr(task, "frozen", {}).values() for p in module.parameters()],
        "trained": list(state.parameters.values()), "optimizer": moments,
        "ema": list(state.ema.average.values()) if state.ema else [],
    }  # fmt: skip

    def here(tensors: Sequence[Tensor]) -> int:
        return sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors)

    found: dict[str, Any] = {
        name: {"sharded": all(isinstance(t, DTensor) for t in tensors), "total": sum(t.numel() for t in tensors),
               "here": here(tensors)}
        for name, tensors in kinds.items()
    }  # fmt: skip
    modules = [module for root in task.trainable.values() for module in root.modules()]
    return {**found, "groups": sum(isinstance(module, FSDPModule) for module in modules)}


def run(name: str, case: Mapping[str, Any], root: Path) -> dict[str, Any]:
    if "whole run" in case:
        return {"codes": [whole_run(case, root / name / how, sharded=how == "sharded") for how in ("plain", "sharded")]}
    train(case, root / name / "plain", sharded=False)
    found = {"split": split(*train(case, root / name / "sharded", sharded=True))}
    for until in range(1, 4) if case.get("stops") else ():
        train(case, root / name / "cut", sharded=True, until=until)
    for first, folder in ((True, "sharded-then-plain"), (False, "plain-then-sharded")) if case.get("changes") else ():
        train(case, root / name / folder, sharded=first, until=2)
        train(case, root / name / folder, sharded=not first)
    return found


def whole_run(case: Mapping[str, Any], folder: Path, *, sharded: bool) -> int:
    """`rewardtune train`, first dry, then with evaluation and export."""
    from pydantic import TypeAdapter

    from rewardtune.recipe.file import LoadedRecipe
    from rewardtune.recipe.sections import Recipe
    from rewardtune.training.run import train_recipe

    content = {**case["recipe"], "train": {**case["recipe"]["train"], "shard": sharded}}
    recipe: Any = TypeAdapter(Recipe).validate_python(content)
    loaded = LoadedRecipe(recipe=recipe, source=Path("a.yaml"), text="", name="a")
    folder.parent.mkdir(exist_ok=True)
    try:
        train_recipe(loaded, out=folder, dry_run=True)
        train_recipe(loaded, out=folder)
    except RewardTuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = globals()
    os.environ.update(given["ENV"])
    registry.load_plugin(given["PLUGIN"])
    results = {}
    try:
        for name, case in given["CASES"].items():
            results[name] = run(name, case, Path(given["ROOT"]))
    except Exception:
        results = {"error": traceback.format_exc()}
    Path(given["RESULT"]).write_text(json.dumps(results))
    sys.stdout.flush()
    # A rank that failed must not wait for the other one in the process group's end.
    os._exit("error" in results)
