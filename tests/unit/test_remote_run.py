"""Training on a served reward, as commands: what is left when the server dies, how it goes on, who can reach it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from rewardtune.cli.app import app
from rewardtune.serving import server as serving
from rewardtune.training import checkpoint as checkpoints
from rewardtune.training.track import read_metrics

# Seconds on an idle machine; other work on it must not fail this.
pytestmark = pytest.mark.timeout(600)

HERE = Path(__file__).parent
TOKEN = "a token of a test"


@contextmanager
def serve(folder: Path, *more: str, dies_at: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rewardtune serve` in a process of its own, and the address that it printed; its log is `folder`/log."""
    (folder / "token").write_text(TOKEN)
    command = [sys.executable, "-m", "rewardtune", "serve", "--plugin", str(HERE / "mortal.py"), "--reward", "mortal",
               "--device", "cpu", "--token-file", str(folder / "token"), *more]  # fmt: skip
    settings = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"MORTAL_REQUEST": str(dies_at)} if dies_at else {})
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=settings)
        try:
            said = dict(process.stdout.readline().rstrip().partition(": ")[::2] for _ in range(3))
            yield process, said["url"]
        finally:
            process.kill()
            process.wait()


def write_recipe(root: Path, url: str) -> Path:
    document = {
        "task": "direct_reward", "pipeline": {"model": str(root / "pipeline")}, "lora": {"rank": 2},
        "data": {"prompts": str(root / "prompts.txt")}, "rollout": {"steps": 2, "guidance": "off"},
        "gradient": {"method": "draft", "last_steps": 1},
        "rewards": [{"name": "remote", "options": {"url": url, "token_file": str(root / "token"), "retries": 1}}],
        "optimizer": {"lr": 0.01, "schedule": "cosine"}, "samples": {"prompts": []},
        "train": {"steps": 6, "batch_size": 2, "device": "cpu"}, "checkpoint": {"every": 2},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(document))
    return root / "recipe.yaml"


def train(recipe: Path, folder: Path) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as left:
        app(["train", str(recipe), "--out", str(folder)])
    return int(left.value.code or 0)


def kept(folder: Path) -> dict[str, torch.Tensor]:
    """All of the newest checkpoint, and the export."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    files = [*newest.glob("*.safetensors"), *(folder / "export").glob("*.safetensors")]
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in read_metrics(folder / "metrics.jsonl")]


# a step asks twice: 7 is the fourth step's score, 8 its gradient, on the way back
@pytest.mark.parametrize("request_number", [7, 8])
def test_a_run_whose_server_dies_ends_clearly_and_goes_on_as_if_nothing_had_been(tmp_path, capsys, request_number):
    tiny.z_image().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a dog\nred cat\ntwo birds\n")
    run = tmp_path / "run"
    with serve(tmp_path, "--port", "0", dies_at=request_number) as (process, url):
        recipe = write_recipe(tmp_path, url)
        capsys.readouterr()
        assert train(recipe, run) == 3
        assert process.wait(60) == -signal.SIGKILL
    said = " ".join(capsys.readouterr().err.split())
    assert f"{url}: reward 'mortal' is gone after 2 attempts" in said and "Traceback" not in said
    assert "start it again" in said and "continues from its last checkpoint" in said
    found = checkpoints.newest(run / "checkpoints")
    assert found is not None and found.step == 2 and not (run / "finished.json").exists()

    assert train(recipe, run) == 2, "the door is still closed"
    assert f"no reward answers at {url}" in " ".join(capsys.readouterr().err.split())
    found = checkpoints.newest(run / "checkpoints")
    assert found is not None and found.step == 2

    with serve(tmp_path, "--port", url.rpartition(":")[2]) as (_, again):
        assert again == url
        assert train(recipe, run) == 0
        assert f"continuing from {run / 'checkpoints/step-000002'}" in capsys.readouterr().err
        assert train(recipe, tmp_path / "undisturbed") == 0
    mine, other = kept(run), kept(tmp_path / "undisturbed")
    assert mine.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    assert numbers(run) == numbers(tmp_path / "undisturbed") and len(numbers(run)) == 6
    assert any(t.any() for name, t in mine.items() if name.startswith("parameters/") and "lora_B" in name)


def listened_on(process: subprocess.Popen[str]) -> set[str]:
    found = psutil.Process(process.pid).net_connections("inet")
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("host", [None, "0.0.0.0"])
def test_other_machines_reach_the_server_only_where_it_is_told_and_with_the_token(tmp_path, host):
    with serve(tmp_path, "--port", "0", *(["--host", host] if host else [])) as (process, url):
        assert listened_on(process) == {host or "127.0.0.1"}
        # the token is asked for either way
        address = url.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/card", timeout=30)
        assert refused.value.code == 401
        warned = "can be reached from other machines" in (tmp_path / "log").read_text()
        assert warned == (host is not None)


def test_the_server_as_an_object_is_on_this_machine_alone_too():
    from rewardtune import load_reward, registry

    registry.load_plugin(str(HERE / "mortal.py"))
    server = serving.RewardServer(load_reward("mortal"), options={}, token=TOKEN)
    try:
        assert server.socket.getsockname()[0] == "127.0.0.1"
    finally:
        server.server_close()
