"""docs/your-own-reward.md, run from its own text: its files written, its commands in their order, on fewer steps."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/your-own-reward.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
FEWER = "train.steps=1 train.batch_size=2 checkpoint.every=1 'samples.prompts=[]'"
RECIPE = """\
task: direct_reward
pipeline: {model: pocket:pipeline}
lora: {rank: 2}
data: {prompts: heldout.txt}
rollout: {steps: 1}
gradient: {method: draft, last_steps: 1}
rewards: [{name: colour-count}]
train: {steps: 1}
"""


def section(title: str) -> list[tuple[str, str]]:
    """Language and text of the blocks under a heading."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


class Desk:
    """A folder with nothing in it, and a shell."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.site = folder, folder / "site"
        program = str(Path(sys.executable).parent)
        path = f"{self.site}:{os.environ.get('PYTHONPATH', '')}"
        self.settings = os.environ | {"PATH": f"{program}:{os.environ['PATH']}", "PYTHONPATH": path}

    def shell(self, line: str, *, fails: bool = False) -> str:
        """What a line prints. Only an installation is said in other words: offline, and into a folder of this test."""
        if line.startswith("pip install "):
            options = f"--quiet --no-index --no-deps --no-build-isolation --target {self.site}"
            line = line.replace("pip install", f"python -m pip install {options}")
        if line.startswith("rewardtune train"):
            line += f" {FEWER}"
        done = subprocess.run(
            ["bash", "-ec", line], cwd=self.folder, env=self.settings, capture_output=True, text=True, check=False
        )
        assert (done.returncode != 0) == fails, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def write(self, text: str) -> Path | None:
        """The file whose name the block's first line tells; None for a block that is none."""
        named = re.match(r"# (\S+\.(?:py|toml))\n", text)
        if named is None:
            return None
        file = self.folder / named[1]
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    def follow(self, blocks: list[tuple[str, str]]) -> str:
        """Write every file, run every line."""
        said = ""
        for language, text in blocks:
            if language == "sh":
                said += "".join(map(self.shell, text.splitlines()))
            elif language in ("python", "toml") and self.write(text) is None:
                (self.folder / "notebook.py").write_text(text)
                said += self.shell("python notebook.py")
        return said


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    """With the template's reward, as the page starts."""
    found = Desk(tmp_path_factory.mktemp("desk"))
    said = found.follow(section("Start from one that works"))
    assert "3 passed" in said
    return found


def trained_on(desk: Desk, run: str) -> set[str]:
    """Names of the rewards that a run of one step was trained on, with a gradient."""
    (line,) = map(json.loads, (desk.folder / "runs" / run / "metrics.jsonl").read_text().splitlines())
    assert line["skipped"] == 0 and line["grad_norm"] > 0
    return {key.removeprefix("reward/") for key in line if key.startswith("reward/")}


def test_no_block_is_left_out():
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert [block for title in titles for block in section(title)] == BLOCKS
    assert {language for language, _ in BLOCKS} == {"sh", "python", "toml", "text"}


@pytest.mark.timeout(900)
def test_a_file_and_a_function(desk: Desk):
    said = desk.follow(section("A file"))
    assert "ok    gradient equals finite differences" in said and "tensor([" in said
    assert trained_on(desk, "colours") == {"colour-match"}
    plugins = json.loads((desk.folder / "runs/colours/recipe.json").read_text())["plugins"]
    assert list(plugins) == ["colour_match.py"]

    blocks = section("A function")
    said = desk.follow(blocks)
    assert "ok    no graph, as the card says" in said and "FAIL" not in said
    compared = json.loads((desk.folder / "runs/colours/compare/compare.json").read_text())
    assert {"colour-count", "contrast"} <= set(next(iter(compared["rewards"].values())))
    (desk.folder / "functions.yaml").write_text(RECIPE)
    (refusal,) = (text for language, text in blocks if language == "text")
    assert refusal.strip() in desk.shell("rewardtune train functions.yaml --plugin functions.py", fails=True)


@pytest.mark.timeout(900)
def test_a_package(desk: Desk):
    said = desk.follow(section("A package"))
    for name in ("warmth", "brightness"):
        assert re.search(rf"^{name} +\? .*\n    from acme-rewards 0\.1\.0; ", said, re.MULTILINE), said
    assert said.count("ok    gradient equals finite differences") == 2
    assert trained_on(desk, "warm") == {"warmth", "brightness"}


@pytest.mark.timeout(900)
def test_behind_http(desk: Desk):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start, use = (text.replace("8421", port).splitlines() for _, text in section("Behind HTTP"))
    desk.shell(start[0])
    serve = f"exec {start[1]} --port {port}"
    with (desk.folder / "log").open("w") as log:
        command = ["bash", "-ec", serve]
        server = subprocess.Popen(
            command, cwd=desk.folder, env=desk.settings, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("reward colour-match on cpu, identity ")
            server.stdout.readline()
            for line in use:
                desk.shell(line)
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 130
        finally:
            server.kill()
    assert trained_on(desk, "remote") == {"colour-match"}
    record, guard = json.loads((desk.folder / "runs/remote/rewards.json").read_text())
    assert [record["role"], guard["role"]] == ["trained", "guard"]
    assert record["models"]["what is served"].startswith("identity ")
