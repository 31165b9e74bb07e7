from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rewardtune.training import track

ASKED: dict[str, Any] = {"project": "p", "name": "n", "run_id": "0123abcd", "config": {"train": {"steps": 2}}}


class Fails:
    """A tracker whose server is gone at one of its calls."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.logged: list[tuple[int | None, dict[str, Any]]] = []

    def start(self) -> None:
        if self.at == "start":
            raise ConnectionError("no route")

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((step, values))
        if self.at == "log":
            raise SystemExit("the client gave up")
        values["loss"] = 99.0

    def finish(self) -> None:
        if self.at == "finish":
            raise TimeoutError("slow")


@pytest.mark.parametrize("at", ["start", "log", "finish", "never"])
def test_a_failing_tracker_is_switched_off_with_one_line(at: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = Fails(at), Fails("never")
    trackers = track.Trackers({"bad": lambda: bad, "good": lambda: good}, config={})
    values = {"loss": 1.0}
    for step in (1, 2, 3):
        trackers.log(values, step=step)
    trackers.finish()
    said = capsys.readouterr().err
    assert said.count("\n") == (at != "never") and ("tracker bad is switched off" in said) == (at != "never")
    assert len(bad.logged) == {"start": 0, "log": 1, "finish": 3, "never": 3}[at]
    assert [step for step, _ in good.logged] == [1, 2, 3]
    assert values == {"loss": 1.0}


def test_a_tracker_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers = track.build_trackers(wandb="offline", tensorboard=False, folder=tmp_path, **ASKED)
    trackers.log({"loss": 1.0}, step=1)
    trackers.finish()
    assert capsys.readouterr().err.startswith("tracker wandb is switched off: ")


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = track.build_trackers(wandb="off", tensorboard=True, folder=tmp_path, **ASKED)
    for step, loss in ((1, 0.5), (2, 0.25)):
        trackers.log({"loss": loss, "reward/fit": -loss, "step": step}, step=step)
    trackers.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [e.value for e in events.Scalars("reward/fit")] == [-0.5, -0.25]


def test_wandb_without_a_key_or_a_terminal_writes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    trackers = track.build_trackers(wandb="online", tensorboard=False, folder=tmp_path, **ASKED)
    trackers.log({"loss": 0.5}, step=1)
    trackers.finish()
    said = capsys.readouterr().err
    assert said.count("writing offline") == 1 and "switched off" not in said
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert run.name.endswith("0123abcd") and list(run.glob("*.wandb"))


def test_progress_says_what_a_waiting_person_wants(capsys: pytest.CaptureFixture[str]) -> None:
    with track.Progress(total=3700, done=0, every_seconds=1000.0) as progress:
        for step in (1, 2):
            progress.show(
                {"step": step, "loss": 0.5, "reward/zreward": 3.25, "grad_norm": 1.0, "seconds": 2.0, "skipped": 1},
                memory=3 * 2**29,
            )
    said = capsys.readouterr().err
    # The second line comes too soon to be printed.
    assert said == "step 1/3700  reward/zreward 3.250  loss 0.5000  2.00 s/step  ETA 2:03:18  1.5 GiB  skipped 1\n"


def test_metrics_are_one_strict_json_object_a_line(tmp_path: Path) -> None:
    metrics = track.MetricsFile(tmp_path / "metrics.jsonl", after=0)
    metrics.add({"step": 1, "loss": float("inf"), "reward/a": 1.5, "skipped": 0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "reward/a": 1.5, "skipped": 0}\n'
    metrics.sync()
    again = track.MetricsFile(tmp_path / "metrics.jsonl", after=1)
    again.add({"step": 2, "loss": 1.0})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
