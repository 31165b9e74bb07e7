"""`train.gradient_checkpointing` of a scorer: the layers really are computed again, in both classes and both reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tiny_scorer import NAMES, as_qwen3_vl, pictures, write_reasoner

from rewardtune.build import build_task
from rewardtune.data.images import to_pil
from rewardtune.recipe.sections import Recipe
from rewardtune.training import runtime
from rewardtune.training.loop import train as loop
from rewardtune.training.track import read_metrics


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scorer that can reason, and six rated pictures."""
    made = write_reasoner(tmp_path_factory.mktemp(request.param), layers=["linear_attention", "full_attention"])
    if request.param == "qwen3_vl":
        as_qwen3_vl(made)
    rows = []
    for i, picture in enumerate(to_pil(pictures(6))):
        picture.save(made / f"{i}.png")
        scores = dict.fromkeys(NAMES, 1.0 + i / 2)
        rows.append({"group": str(i // 2), "prompt": "a dog", "image": f"{i}.png", "scores": scores})
    (made / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def recipe(folder: Path, task: str, *, lora: bool, again: bool) -> Any:
    return TypeAdapter(Recipe).validate_python({
        "task": task, "scorer": {"model": str(folder), **({"lora": {"rank": 2}} if lora else {})},
        "train": {"steps": 2, "batch_size": 2, "device": "cpu", "gradient_checkpointing": again},
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0},
        "data": {"records": str(folder / "records.jsonl"), "held_out": str(folder / "records.jsonl")},
        **({"objective": {"group_size": 2, "kl": 0.1}} if task == "reward_gdso" else {}),
    })  # fmt: skip


def counted(task: Any) -> Counter[str]:
    """How often each layer begins its forward pass with gradient: in `task.step`, and in the backward pass behind it.

    transformers checkpoints a layer's `forward`, inside its hooks, so the first part of each layer is counted. What
    `task.batch` samples and reads has no gradient.
    """
    (model,) = task.trainable.values()
    parts = {f"text {i}": layer.input_layernorm for i, layer in enumerate(model.model.language_model.layers)}
    parts |= {f"vision {i}": block.norm1 for i, block in enumerate(model.model.visual.blocks)}
    seen: Counter[str] = Counter(dict.fromkeys(parts, 0))
    for name, part in parts.items():

        def count(module: Any, args: Any, name: str = name) -> None:
            seen[name] += torch.is_grad_enabled()

        part.register_forward_pre_hook(count)
    return seen


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["reward_sft", "reward_gdso"])
def test_layers_run_twice_in_training_and_the_numbers_stay(folder: Path, tmp_path: Path, kind: str, lora: bool):
    ends, lines = [], []
    for again in (False, True):
        made = recipe(folder, kind, lora=lora, again=again)
        task = build_task(made, device="cpu")
        # a look at the held-out records on the way must not switch it off
        task.evaluate()
        seen = counted(task)
        (tmp_path / str(again)).mkdir()
        where = runtime.start(device="cpu", precision="fp32")
        state = loop(task, folder=tmp_path / str(again), train=made.train, optimizer=made.optimizer, where=where)
        # adapters leave the vision tower frozen, and what needs no gradient is not computed again
        assert dict(seen) == {name: 2 * (1 + (again and not (lora and "vision" in name))) for name in seen}
        ends.append({name: value.detach().clone() for name, value in state.parameters.items()})
        lines.append([line["loss"] for line in read_metrics(tmp_path / str(again) / "metrics.jsonl")])
    assert lines[1] == pytest.approx(lines[0], rel=1e-6)
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


def test_in_eval_mode_it_would_do_nothing(folder: Path):
    """The trap: transformers ignores the setting outside of training mode, without a word."""
    task = build_task(recipe(folder, "reward_sft", lora=False, again=True), device="cpu")
    (model,) = task.trainable.values()
    assert model.training
    with torch.no_grad():
        batch = task.batch(0, [0, 1])
    found = []
    for training in (True, False):
        model.train(training)
        seen = counted(task)
        task.step(batch).loss.backward()
        found.append(set(seen.values()))
    assert found == [{2}, {1}]
