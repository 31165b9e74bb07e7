"""The guard in two processes (gloo), whole and sharded: both end, where one process ends, with its weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
from safetensors.torch import load_file

from rewardtune.guard.guard import read_looks

HERE = Path(__file__).parent
LONGEST = 240
"""Seconds, about ten times what it takes on an idle machine: longer is a process that waits for one that is gone."""

pytestmark = pytest.mark.timeout(600)


def recipe(root: Path, *, shard: bool = False, **guard: Any) -> dict[str, Any]:
    """As in test_guard.py: DRaFT towards red at a rate that overshoots what the held-out reward wants."""
    prompts = str(root / "prompts.txt")
    return {
        "task": "direct_reward", "pipeline": {"model": str(root / "pipeline")}, "lora": {"rank": 4},
        "data": {"prompts": prompts}, "rollout": {"steps": 2, "guidance": "off"},
        "gradient": {"method": "draft", "last_steps": 1}, "rewards": [{"name": "redness"}], "optimizer": {"lr": 0.05},
        # with averaged weights, which are what the guard looks at and keeps
        "train": {"steps": 8, "batch_size": 2, "device": "cpu", "ema_decay": 0.5, "shard": shard},
        "checkpoint": {"every": 3, "keep": 2}, "samples": {"steps": 2},
        "guard": {"prompts": prompts, "seeds": 2, "rewards": [{"name": "evenness"}], "every": 2, "patience": 1,
                  "min_diversity": None, "steps": 2, "guidance_scale": 0.0} | guard,
    }  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """(folder of `one` and `two`, what guarded_tasks.py found in each process by that name)."""
    root = tmp_path_factory.mktemp("guarded")
    tiny.z_image().save_pretrained(root / "pipeline")
    (root / "prompts.txt").write_text("a dog\nred cat\ntwo birds\n")
    back, stop = recipe(root), recipe(root, action="stop")
    asked = {
        "one": {"roll back": back, "stop": stop},
        "two": {"roll back": back, "stop": stop, "roll back sharded": recipe(root, shard=True), "late": stop},
    }
    running = []
    for name, world in (("one", 1), ("two", 2)):
        (root / name).mkdir()
        for rank, env in enumerate(processes.group(world)):
            given = {"RECIPES": asked[name], "PLUGIN": str(HERE / "redness.py"), "ROOT": str(root / name), "ENV": env}
            given["RESULT"] = str(root / f"{name}-{rank}.json")
            running.append(processes.start(HERE / "guarded_tasks.py", given))
    end = time.monotonic() + LONGEST
    for process in running:
        process.join(max(0.0, end - time.monotonic()))
    stuck = [process for process in running if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, "a process waits for another one"
    found = {path.stem: json.loads(path.read_text()) for path in root.glob("*-[01].json")}
    assert not any("error" in one for one in found.values()), found
    return root, {"one": [found["one-0"]], "two": [found["two-0"], found["two-1"]]}


def ended(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "finished.json").read_text())
    return {"step": found["step"], **found["guard"]}


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export/pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("case", ["roll back", "roll back sharded", "stop"])
def test_both_processes_end_where_one_does_and_with_its_weights(ran: Any, case: str) -> None:
    root, found = ran
    alone, folder = root / "one" / case.removesuffix(" sharded"), root / "two" / case
    assert [rank[case]["code"] for rank in found["two"]] == [0, 0] and found["one"][0][alone.name]["code"] == 0
    wanted = ended(alone)
    assert ended(folder) == wanted
    assert wanted["reasons"] and 0 < wanted["best_step"] < wanted["last_step"] < 8
    assert wanted["exported_step"] == wanted["step"] == wanted["last_step" if case == "stop" else "best_step"]
    for mine, other in zip(read_looks(folder / "guard"), read_looks(alone / "guard"), strict=True):
        assert mine.step == other.step
        assert mine.values["evenness"] == pytest.approx(other.values["evenness"], abs=1e-5)
    mine, other = exported(folder), exported(alone)
    assert mine.keys() == other.keys()
    # Adam divides gradients of another order of summation by themselves: a share of a step of 0.05, measured 1.8e-5
    assert all(float((mine[name] - other[name]).abs().max()) <= 1e-4 for name in mine)


def test_the_best_step_and_the_last_are_far_apart(ran: Any) -> None:
    """Or the test above could not tell which one was exported."""
    best, final = (exported(ran[0] / "one" / case) for case in ("roll back", "stop"))
    assert max(float((best[name] - final[name]).abs().max()) for name in best) > 1e-2


def test_the_parts_of_a_sharded_run_are_gone_before_the_export_loads_the_whole(ran: Any) -> None:
    """The guard draws with the pipeline, and outlives the training."""
    _, found = ran
    assert found["two"][0]["roll back sharded"]["parts_left"] == 0


def test_a_process_that_is_late_after_a_stop_knows_the_looks_that_the_first_one_knew(ran: Any) -> None:
    """And not the one that the first has made meanwhile: it would wait for a gradient, and the first for it."""
    _, found = ran
    assert [rank["late"]["looks"] for rank in found["two"]] == [[0, 2, 4]] * 2
