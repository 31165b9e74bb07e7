"""Two processes on the CPU (gloo): the same numbers as one, the same exactness, the same decisions."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import processes
import psutil
import pytest
import tiny_task as tiny
import torch
from safetensors.torch import load_file

from rewardtune.errors import NonFiniteError, RecipeError
from rewardtune.training import run
from rewardtune.training.track import read_metrics

# Seconds on an idle machine; other work on it must not fail this.
pytestmark = pytest.mark.timeout(900)

SCRIPT = Path(__file__).with_name("tiny_task.py")

HOWS = ("loss", "inf", "grad", "reward")
# Samples 0 to 3 of a step of 8 are rank 0's and 4 to 7 rank 1's; these belong to the fourth step.
BROKEN = {"loss": 31, "inf": 24, "grad": 30, "reward": 28}
SETTINGS: dict[str, Any] = {"train": {"steps": 6, "ema_decay": 0.9}, "checkpoint": {"every": 1}}


def job(folder: Path, *, accumulation: int = 1, task: Any = None, **train: Any) -> dict[str, Any]:
    section = {**SETTINGS["train"], "accumulation": accumulation, **train}
    return {"out": str(folder), "train": section, "checkpoint": SETTINGS["checkpoint"], "task": task or {}}


def jobs(root: Path) -> dict[str, dict[str, Any]]:
    """Every case, one run folder each; the order matters where a folder is used twice."""
    found = {}
    for accumulation in (1, 2):
        found[f"plain-{accumulation}"] = job(root / f"plain-{accumulation}", accumulation=accumulation)
        for how in HOWS:
            name = f"{how}-{accumulation}"
            found[name] = job(root / name, accumulation=accumulation, task={"broken": {str(BROKEN[how]): how}})
    found["dropout"] = job(root / "dropout", task={"dropout": 0.3})
    for rank, index in enumerate((0, 7)):
        for step in (0, 3):
            folder = root / f"signal-{rank}-{step}"
            at = {"dropout": 0.3, "signal_at": 8 * step + index}
            found[folder.name] = job(folder, task=at)
            found[f"{folder.name}-again"] = job(folder, task={"dropout": 0.3}) | {"allow_changed": ["data.prompts"]}
    every = {str(index): "grad" for index in range(23, 100, 8)}
    found["too many"] = job(root / "too many", task={"broken": every}, max_consecutive_skips=2)
    found["uneven"] = job(root / "uneven", batch_size=9)
    found["another"] = job(root / "plain-1", seed=5)
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with every case, run in one group of two processes, and the plain ones in one process."""
    root = tmp_path_factory.mktemp("two")
    running = [
        tiny.start({"jobs": jobs(root)}, stderr=root / f"err{rank}", env=env)
        for rank, env in enumerate(processes.group(2))
    ]
    alone = {name: {**one, "out": f"{one['out']}-alone"} for name, one in jobs(root).items() if "-" in name}
    alone = {name: one for name, one in alone.items() if not name.startswith("signal")}
    (env,) = processes.group(1)
    running.append(tiny.start({"jobs": alone}, stderr=root / "err", env=env))
    processes.join(running, lambda: [path.read_text() for path in root.glob("err*") if path.suffix != ".json"])
    return root


def codes(root: Path) -> list[dict[str, int]]:
    return [json.loads((root / f"err{rank}.rank{rank}.json").read_text()) for rank in (0, 1)]


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in read_metrics(folder / "metrics.jsonl")]


def last(folder: Path, part: str = "parameters") -> dict[str, torch.Tensor]:
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    return load_file(checkpoints[-1] / f"{part}.safetensors")


def test_both_processes_end_alike_and_as_expected(ran: Path) -> None:
    first, second = codes(ran)
    assert first == second
    stopped = {name for name in first if name.startswith("signal") and not name.endswith("again")}
    expected = {name: 143 if name in stopped else 0 for name in first}
    expected |= {"too many": 4, "uneven": 2, "another": 2}
    assert first == expected and len(stopped) == 4
    said = (ran / "err0").read_text()
    assert "cannot be split evenly over 2 processes" in said and "train.seed: 0 -> 5" in said


@pytest.mark.parametrize("case", ["plain", *HOWS])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_give_the_numbers_of_one(ran: Path, case: str, accumulation: int) -> None:
    """To 1e-6 in what is logged (measured: 3.6e-7) and 1e-7 in what is trained (6e-8, one bit of a weight near 1)."""
    two, one = ran / f"{case}-{accumulation}", ran / f"{case}-{accumulation}-alone"
    for a, b in zip(numbers(two), numbers(one), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == b[name] or value == pytest.approx(b[name], rel=1e-6, abs=1e-6), (a["step"], name)
    for part in ("parameters", "optimizer", "ema"):
        mine, other = last(two, part), last(one, part)
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_not_finite_in_one_process_is_skipped_in_both(ran: Path, how: str, accumulation: int) -> None:
    folder = ran / f"{how}-{accumulation}"
    lines = numbers(folder)
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert lines[3]["grad_norm"] is None and (lines[3]["loss"] is None) == (how != "grad")
    assert all(tensor.isfinite().all() for tensor in last(folder).values())
    assert lines[:3] == numbers(ran / f"plain-{accumulation}")[:3]


def test_too_many_keep_a_clean_checkpoint(ran: Path) -> None:
    lines = numbers(ran / "too many")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 3]
    assert all(tensor.isfinite().all() for tensor in last(ran / "too many").values())
    assert math.isfinite(lines[-1]["loss"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [0, 3])
def test_a_signal_in_one_process_stops_both_and_resuming_is_exact(ran: Path, rank: int, step: int) -> None:
    folder = ran / f"signal-{rank}-{step}"
    said = (ran / "err0").read_text()
    assert f"continuing from {folder / 'checkpoints' / f'step-{step + 1:06d}'}" in said
    for part in ("parameters", "optimizer", "ema"):
        mine, other = last(folder, part), last(ran / "dropout", part)
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    assert numbers(folder) == numbers(ran / "dropout")


def launch(settings: dict[str, Any]) -> Any:
    return tiny.start({"nproc": 2, **settings}, stderr=Path(settings["out"]).with_suffix(".err"))


def workers(folder: Path) -> list[int]:
    """Process ids of the workers of the run in `folder`, by the job that their command line names."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "rewardtune.training.launch" in words:
            jobfile = Path(words[-1]) / "job.json"
            if jobfile.exists() and json.loads(jobfile.read_text())["out"] == str(folder):
                found.append(process.pid)
    return sorted(found)


def wait_for_step(folder: Path, step: int, process: Any) -> None:
    while process.is_alive():
        if (folder / "metrics.jsonl").exists() and len(read_metrics(folder / "metrics.jsonl")) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(folder.with_suffix(".err").read_text())


def test_nproc_starts_processes_and_survives_what_befalls_them(tmp_path: Path, ran: Path) -> None:
    folder = tmp_path / "launched"
    slow = job(folder, task={"dropout": 0.3, "pause": 0.2}) | {"allow_changed": ["data.prompts"]}
    process = launch(slow)
    wait_for_step(folder, 1, process)
    assert len(workers(folder)) == 2
    os.kill(workers(folder)[1], signal.SIGKILL)
    process.join(300)
    assert process.exitcode == 137, folder.with_suffix(".err").read_text()
    assert "ended by signal 9" in folder.with_suffix(".err").read_text()

    process = launch(slow)
    wait_for_step(folder, 3, process)
    process.terminate()
    process.join(300)
    assert process.exitcode == 143, folder.with_suffix(".err").read_text()
    assert len(read_metrics(folder / "metrics.jsonl")) < 6 and not (folder / "finished.json").exists()

    process = launch(slow)
    process.join(300)
    assert process.exitcode == 0, folder.with_suffix(".err").read_text()
    assert workers(folder) == []
    other = last(ran / "dropout")
    assert all(torch.equal(tensor, other[name]) for name, tensor in last(folder).items())
    assert (folder / "finished.json").exists()


def test_errors_of_workers_are_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_BUILD", "1")
    with pytest.raises(RecipeError, match="multiple of 4"):
        run.train_recipe(tiny.tiny_recipe(train={"batch_size": 6, "accumulation": 2}), out=tmp_path / "a", nproc=2)
    broken = {"broken": {str(index): "reward" for index in range(15, 999, 8)}}
    loaded = tiny.tiny_recipe(task=broken, train={"max_consecutive_skips": 1})
    with pytest.raises(NonFiniteError, match="reward `tiny` returned nan"):
        run.train_recipe(loaded, out=tmp_path / "b", nproc=2, plugins=[str(SCRIPT)])
    assert [line["skipped"] for line in numbers(tmp_path / "b")] == [0, 1, 2]
