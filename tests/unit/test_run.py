from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tiny_task as tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rewardtune.errors import DiskError, NonFiniteError, RecipeError
from rewardtune.training import run
from rewardtune.training.track import read_metrics

# Seconds on an idle machine; other work on it must not fail this.
pytestmark = pytest.mark.timeout(900)

SCRIPT = Path(__file__).with_name("tiny_task.py")


@pytest.fixture(autouse=True)
def _tiny_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run builds the small task; everything else is real."""
    monkeypatch.setitem(sys.modules, "rewardtune.build", tiny.build_module())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "net.safetensors")


def same_end(a: Path, b: Path) -> bool:
    """Exports, last checkpoints and metrics are equal to the bit, times apart."""
    one, two = weights(a), weights(b)
    last = sorted((a / "checkpoints").glob("step-*"))[-1].name
    names = ("parameters.safetensors", "optimizer.safetensors")
    files = [[(folder / "checkpoints" / last / name).read_bytes() for name in names] for folder in (a, b)]
    numbers = [[{**line, "seconds": 0} for line in read_metrics(folder / "metrics.jsonl")] for folder in (a, b)]
    return all(torch.equal(one[name], two[name]) for name in one) and files[0] == files[1] and numbers[0] == numbers[1]


def test_a_run_folder_holds_what_the_interface_says(tmp_path: Path) -> None:
    loaded = tiny.tiny_recipe()
    folder = run.train_recipe(loaded, out=tmp_path / "a")
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "recipe.yaml", "recipe.json", "metrics.jsonl", "checkpoints", "export", "finished.json",
    }  # fmt: skip
    assert (folder / "recipe.yaml").read_text() == loaded.text
    record = json.loads((folder / "recipe.json").read_text())
    assert record["recipe"] == loaded.resolved and record["sha256"] == loaded.sha256
    assert record["versions"]["torch"] == torch.__version__ and record["plugins"] == {}
    root = SCRIPT.parents[2]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    known = head.stdout.strip() if head.returncode == 0 and (root / ".git").exists() else ""
    assert (record["git_revision"] or "").removesuffix("+") == known
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {"step", "loss", "reward/fit", "grad_norm", "lr", "seconds", "skipped"} <= lines[0].keys()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    finished = json.loads((folder / "finished.json").read_text())
    exported = weights(folder)
    assert finished == {"step": 12, "skipped": 0, "evaluation": {"weight": float(exported["0.weight"].sum())}}
    with safe_open(folder / "export" / "net.safetensors", "pt") as file:
        provenance = file.metadata()
    assert provenance["recipe_sha256"] == loaded.sha256 and provenance["step"] == "12"
    assert json.loads(provenance["recipe"]) == loaded.resolved
    assert all(isinstance(value, str) for value in provenance.values())


def test_no_pickle_in_a_run_folder(tmp_path: Path) -> None:
    folder = run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "a")
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {"", ".yaml", ".json", ".jsonl", ".safetensors"}


def test_the_average_is_what_is_evaluated_and_exported(tmp_path: Path) -> None:
    folder = run.train_recipe(tiny.tiny_recipe(train={"ema_decay": 0.8}), out=tmp_path / "a")
    saved = folder / "checkpoints" / "step-000012"
    average, trained = load_file(saved / "ema.safetensors"), load_file(saved / "parameters.safetensors")
    exported = weights(folder)
    assert torch.equal(exported["0.weight"], average["net.0.weight"])
    assert not torch.equal(exported["0.weight"], trained["net.0.weight"])
    evaluation = json.loads((folder / "finished.json").read_text())["evaluation"]
    assert evaluation["weight"] == float(average["net.0.weight"].sum())
    modes = {file.stat().st_mode for file in (folder / "export").iterdir()}
    assert modes == {(folder / "finished.json").stat().st_mode}, "safetensors writes for its owner alone"


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    assert run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "a") == folder
    assert "is finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == before


def test_an_unfinished_run_goes_on_and_says_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "whole")
    folder = tmp_path / "cut"
    # Sample 56 belongs to step 8, the first that fails; none may.
    broken = {"broken": {str(index): "loss" for index in range(56, 100)}}
    with pytest.raises(NonFiniteError):
        run.train_recipe(tiny.tiny_recipe(task=broken, train={"max_consecutive_skips": 0}), out=folder)
    assert not (folder / "finished.json").exists() and not (folder / "export").exists()
    settings: dict[str, Any] = {"allow_changed": ["data.prompts,train.max_consecutive_skips"], "out": folder}
    (folder / "checkpoints" / "step-000008" / "state.json").write_text("{")
    capsys.readouterr()
    run.train_recipe(tiny.tiny_recipe(), **settings)
    said = capsys.readouterr().err
    assert "step-000008 is damaged" in said and f"continuing from {folder / 'checkpoints' / 'step-000004'}" in said
    assert same_end(whole, folder)


def test_another_recipe_is_refused_with_a_diff(tmp_path: Path) -> None:
    folder = run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "a")
    other = tiny.tiny_recipe(train={"seed": 7, "steps": 14}, rewards=[{"name": "else"}])
    with pytest.raises(RecipeError) as caught:
        run.train_recipe(other, out=folder)
    said = str(caught.value)
    assert "train.seed: 0 -> 7" in said and "train.steps: 12 -> 14" in said
    assert 'rewards.0.name: "none" -> "else"' in said
    assert "--allow-changed rewards.0.name,train.seed,train.steps" in said
    with pytest.raises(RecipeError, match=r"train\.seed") as caught:
        run.train_recipe(other, out=folder, allow_changed=["train.steps", "rewards"])
    assert "train.steps:" not in str(caught.value)
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["train"]["seed"] == 0


def test_a_section_that_came_or_went_is_one_change(tmp_path: Path) -> None:
    folder = run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "a")
    other = tiny.tiny_recipe(augment={"copies": 2}, lora=None, full={})
    with pytest.raises(RecipeError) as caught:
        run.train_recipe(other, out=folder)
    said = str(caught.value)
    assert "  augment: null -> a section\n  full: null -> " in said and "  lora: a section -> null\n" in said
    assert "--allow-changed augment,full,lora to" in said
    back = tiny.tiny_recipe(train={"seed": 1})
    run.train_recipe(other, out=folder, allow_changed=["augment", "full,lora"])
    with pytest.raises(RecipeError, match="augment: a section -> null\n"):
        run.train_recipe(back, out=folder)


def test_a_run_that_ended_before_its_training_takes_a_mended_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RecipeError("no such checkpoint")

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["rewardtune.build"], "build_task", fails)
        with pytest.raises(RecipeError, match="no such checkpoint"):
            run.train_recipe(tiny.tiny_recipe(rewards=[{"name": "wrong"}]), out=tmp_path / "a")
    (tmp_path / "a" / "rewards.json").write_text("[]")
    folder = run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "a")
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["rewards"][0]["name"] == "none"
    assert (folder / "finished.json").exists() and not (folder / "rewards.json").exists()


def test_a_setting_that_came_later_is_no_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "a")
    record = json.loads((folder / "recipe.json").read_text())
    del record["recipe"]["train"]["max_grad_norm"]
    (folder / "recipe.json").write_text(json.dumps(record))
    run.train_recipe(tiny.tiny_recipe(), out=folder)
    assert "is finished" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"train\.max_grad_norm: 1.0 -> 2.0"):
        run.train_recipe(tiny.tiny_recipe(train={"max_grad_norm": 2.0}), out=folder)


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    constant = {"optimizer": {"lr": 0.01}}
    whole = run.train_recipe(tiny.tiny_recipe(train={"steps": 16}, **constant), out=tmp_path / "whole")
    folder = run.train_recipe(tiny.tiny_recipe(**constant), out=tmp_path / "grown")
    run.train_recipe(tiny.tiny_recipe(train={"steps": 16}, **constant), out=folder, allow_changed=["train.steps"])
    assert same_end(whole, folder)
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["train"]["steps"] == 16


def test_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    folder = run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "a")
    old = (folder / "export" / "net.safetensors").read_bytes()
    run.train_recipe(tiny.tiny_recipe(train={"seed": 3}), out=folder, fresh=True)
    aside = next(path for path in tmp_path.iterdir() if path.name.startswith("a-"))
    assert (aside / "export" / "net.safetensors").read_bytes() == old and (aside / "finished.json").exists()
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["train"]["seed"] == 3


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="no run folder"):
        run.train_recipe(tiny.tiny_recipe(), out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", ".lock"}
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(RecipeError, match="not the record of a run"):
        run.train_recipe(tiny.tiny_recipe(), out=tmp_path)


def test_an_export_of_a_broken_record_names_it(tmp_path: Path) -> None:
    folder = run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "a")
    for text in ("{", '{"recipe": {"task": "sft"}}', "[]"):
        (folder / "recipe.json").write_text(text)
        with pytest.raises(RecipeError, match=r"recipe\.json: not the recipe of a run"):
            run.export_run(folder)
    assert (folder / "export" / "net.safetensors").is_file()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="--out"):
        run.train_recipe(tiny.tiny_recipe(), out=tmp_path / "file" / "run")


def test_plugins_are_recorded_and_asked_for(tmp_path: Path) -> None:
    plugin = tmp_path / "my_reward.py"
    plugin.write_text("VALUE = 1\n")
    broken = {"broken": {str(index): "loss" for index in range(8, 100)}}
    with pytest.raises(NonFiniteError):
        run.train_recipe(tiny.tiny_recipe(task=broken), out=tmp_path / "a", plugins=[str(plugin)])
    record = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert record["plugins"] == {"my_reward.py": hashlib.sha256(plugin.read_bytes()).hexdigest()}
    with pytest.raises(RecipeError, match=r"plugins\.my_reward\.py: .* -> not there"):
        run.train_recipe(tiny.tiny_recipe(task=broken), out=tmp_path / "a")


def test_what_is_noticed_in_a_recipe_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = dataclasses.replace(tiny.tiny_recipe(), notices=("a scale has no effect.",))
    run.train_recipe(loaded, out=tmp_path / "a", dry_run=True)
    assert capsys.readouterr().err.count("note: a scale has no effect.\n") == 1


def test_dry_run_does_it_all_once_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "a"
    run.train_recipe(tiny.tiny_recipe(train={"ema_decay": 0.9}), out=out, dry_run=True)
    said = capsys.readouterr().err
    assert "one step took" in said and "12 steps take about 0:00:0" in said
    # of the whole process, so it depends on the tests that ran in it before
    assert re.search(r"peak memory \d+\.\d\d GiB; a checkpoint \d", said)
    assert list(tmp_path.iterdir()) == []
    # A run that is there already is not touched by it.
    folder = run.train_recipe(tiny.tiny_recipe(), out=out)
    before = sorted(path for path in folder.rglob("*"))
    run.train_recipe(tiny.tiny_recipe(train={"steps": 99}), out=out, dry_run=True)
    assert sorted(path for path in folder.rglob("*")) == before
    assert [path.name for path in out.parent.iterdir()] == ["a"]


def start(folder: Path, **job: Any) -> BaseProcess:
    """The same in a process of its own; what it says goes to a file beside the folder."""
    process: BaseProcess = tiny.start({"out": str(folder), **job}, stderr=folder.with_suffix(".err"))
    return process


def end(process: BaseProcess) -> int | None:
    process.join(300)
    return process.exitcode


def wait_for_step(folder: Path, step: int, process: BaseProcess) -> None:
    metrics = folder / "metrics.jsonl"
    while process.is_alive():
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            return
        time.sleep(0.005)
    raise AssertionError(folder.with_suffix(".err").read_text())


JOB: dict[str, Any] = {
    "train": {"steps": 20, "accumulation": 2, "ema_decay": 0.9},
    "checkpoint": {"every": 2},
    "task": {"dropout": 0.1, "pause": 0.01, "width": 256},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert end(start(folder, **JOB)) == 0
    return folder


def test_kill_9_at_random_moments_changes_nothing(tmp_path: Path, undisturbed: Path) -> None:
    folder, rng = tmp_path / "killed", random.Random(4)
    for until in (3, 5, 8, 12, 15):
        process = start(folder, **JOB)
        wait_for_step(folder, until, process)
        # A save takes about as long as a step, so some of these hit it.
        time.sleep(rng.random() * 0.1)
        process.kill()
        assert end(process) == -signal.SIGKILL and not (folder / "finished.json").exists()
    assert end(start(folder, **JOB)) == 0
    assert "continuing from" in folder.with_suffix(".err").read_text()
    assert same_end(undisturbed, folder)
    assert not list(folder.rglob(".tmp*"))


def test_sigterm_saves_and_a_second_run_in_the_folder_is_refused(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "stopped"
    process = start(folder, **JOB | {"checkpoint": {"every": 1000}})
    wait_for_step(folder, 3, process)
    with pytest.raises(RecipeError, match=rf"in use by `rewardtune train` \(process {process.pid} on"):
        run.train_recipe(tiny.tiny_recipe(**JOB | {"checkpoint": {"every": 1000}}), out=folder)
    process.terminate()
    assert end(process) == 143
    done = len(read_metrics(folder / "metrics.jsonl"))
    assert 3 <= done < 20
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert "a second signal leaves at once" in folder.with_suffix(".err").read_text()
    assert end(start(folder, **JOB | {"checkpoint": {"every": 1000}})) == 0
    assert same_end(undisturbed, folder)


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "stuck"
    process = start(folder, task={"pause": 60.0})
    # Once checkpoints/ or metrics.jsonl could be there, the first step is under way; nothing on disk says so earlier.
    while not (folder / "recipe.json").exists():
        time.sleep(0.01)
    time.sleep(1.0)
    process.terminate()
    time.sleep(0.3)
    assert process.is_alive()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert end(process) == 130
