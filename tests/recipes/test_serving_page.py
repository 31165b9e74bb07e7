"""The commands of docs/serving.md, in their order, on a free port and fewer steps; its YAML is a recipe's."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/serving.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
FEWER = ["train.steps=1", "train.batch_size=1", "checkpoint.every=1", "samples.prompts=[]"]


@pytest.mark.timeout(900)
def test_every_command_works_when_pasted(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    start, use = (block.replace("8421", port).splitlines() for block in BLOCKS)

    def run(line: str, *more: str) -> None:
        done = subprocess.run([*shlex.split(line), *more], cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        if line.startswith("python"):
            (tmp_path / "token").write_text(done.stdout)

    make, serve = start
    run(make.partition(" > ")[0])
    with (tmp_path / "log").open("w") as log:
        command = [*shlex.split(serve), "--port", port]
        server = subprocess.Popen(command, cwd=tmp_path, env=settings, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert [server.stdout.readline().split(":")[0] for _ in range(3)][1:] == ["url", "token"]
            test, train = use
            run(test)
            run(train, *FEWER)
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 130
        finally:
            server.kill()
    (line,) = (tmp_path / "runs/remote/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["skipped"] == 0 and "reward/zreward" in json.loads(line)
    token = (tmp_path / "token").read_text().strip()
    kept = [f for f in (tmp_path / "runs/remote").rglob("*") if f.is_file() and token.encode() in f.read_bytes()]
    assert not kept and token not in (tmp_path / "log").read_text()


def test_its_yaml_is_a_recipes():
    from rewardtune.recipe.rewards import RewardSection
    from rewardtune.recipe.validate import check_joins

    remote, judge = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    RewardSection.model_validate(remote["rewards"][0])
    RewardSection.model_validate(judge["compare"]["rewards"][0])
    assert check_joins({"task": "direct_reward", **remote, **judge}) == []


def test_the_protocol_is_that_of_the_code():
    from rewardtune.serving import wire

    assert f"The protocol, version {wire.PROTOCOL}" in PAGE
