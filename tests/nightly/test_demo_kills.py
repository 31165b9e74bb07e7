"""The demo's training, killed at random moments: nothing is lost, and the weights are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from rewardtune.diffusion.export import LORA_FILE
from rewardtune.training.track import read_metrics

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(7200)]


def start(out: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rewardtune", "train", "pocket/zreward", *overrides, "--out", str(out)]
    out.parent.mkdir(exist_ok=True)
    with out.with_suffix(".err").open("ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})


def steps_done(folder: Path) -> int:
    return len(read_metrics(folder / "metrics.jsonl"))


def contents(file: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors. The checkout may be edited during the runs, so its revision is left out."""
    with safe_open(file, framework="np") as opened:
        metadata = {key: value for key, value in opened.metadata().items() if key != "rewardtune.git_revision"}
        return metadata, {name: opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118


def test_five_kills_change_nothing(tmp_path: Path, *overrides: str) -> None:
    # of one name, which exports carry
    whole, killed, rng = tmp_path / "whole" / "run", tmp_path / "killed" / "run", random.Random(0)
    assert start(whole, *overrides).wait() == 0
    total, previous = steps_done(whole), 0
    for kill in range(5):
        process = start(killed, *overrides)
        # Anywhere from the middle of loading to a step further on; later kills lie deeper in the run.
        target = rng.uniform(0, 1.2 * total * (kill + 1) / 5)
        began = time.monotonic()
        while process.poll() is None and steps_done(killed) < target and time.monotonic() - began < 5 + 3 * target:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        process.kill()
        ended = process.wait()
        assert ended in (0, -signal.SIGKILL), killed.with_suffix(".err").read_text()
        if ended == 0:
            break
        assert steps_done(killed) >= previous - 20, "more than a checkpoint's interval was lost"
        previous = steps_done(killed)
    assert start(killed, *overrides).wait() == 0, killed.with_suffix(".err").read_text()
    # safetensors writes its metadata in an order of its own, so what a file says is compared, not its bytes
    assert contents(whole / "export" / LORA_FILE) == contents(killed / "export" / LORA_FILE)
    for last in (whole / "checkpoints").iterdir():
        for file in last.glob("*.safetensors"):
            assert file.read_bytes() == (killed / "checkpoints" / last.name / file.name).read_bytes(), file
    numbers = [
        [{**line, "seconds": 0} for line in read_metrics(folder / "metrics.jsonl")] for folder in (whole, killed)
    ]
    assert numbers[0] == numbers[1]
