"""`remote` in recipes, and `rewardtune serve` as a process: validate asks nobody, training takes the same steps."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from served import TOKEN, serving
from test_direct_reward import build

from rewardtune import build as builder
from rewardtune import load_reward, registry
from rewardtune.errors import RecipeError
from rewardtune.recipe.file import load_recipe
from rewardtune.recipe.rewards import RewardSection
from rewardtune.scoring.reward_set import RewardSet, Term

RECIPE = """\
task: direct_reward
pipeline: {model: some/hub-id}
lora: {}
data: {prompts: prompts.txt}
gradient: {method: refl}
rewards:
  - name: remote
    options: {url: "URL"}
    statistic: {kind: mean-minus-deviation}
    dimensions: {realism: 2.0}
train: {steps: 10}
"""


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv("REWARDTUNE_TOKEN", TOKEN)


def write(folder, url):
    (folder / "prompts.txt").write_text("a dog\n")
    (folder / "recipe.yaml").write_text(RECIPE.replace("URL", url))
    return str(folder / "recipe.yaml")


def test_validate_takes_a_remote_reward_and_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("validate opened a connection"))
    recipe = load_recipe(write(tmp_path, "http://127.0.0.1:8421"), (), files=True).recipe
    assert recipe.rewards[0].name == "remote"
    with pytest.raises(RecipeError, match=r"url.*without user, password"):
        load_recipe(write(tmp_path, "http://me:secret@host"), (), files=True)


def section(url, **more):
    return RewardSection(name="remote", options={"url": url, "retries": 0}, **more)


def test_what_only_the_loaded_card_knows_is_checked_when_it_is_loaded():
    registry.load_plugin(str(Path(__file__).with_name("redness.py")))
    with serving(load_reward("redness")) as served:
        assert builder.build_term(section(served.url), device="cpu").reward.card.name == "redness"
        with pytest.raises(RecipeError, match="statistic needs a distributional reward; 'redness' gives one number"):
            builder.build_term(section(served.url, statistic={"kind": "exceedance", "threshold": 3}), device="cpu")
        with pytest.raises(RecipeError, match="has no dimension realism"):
            builder.build_term(section(served.url, dimensions={"realism": 1.0}), device="cpu")
    judge = load_reward("redness").reward
    judge.card = replace(judge.card, differentiable=False)
    with serving(judge) as served:
        term = builder.build_term(section(served.url), device="cpu")
        with pytest.raises(RecipeError, match=r"'redness' returns no gradient .*compare.rewards"):
            builder._trained_on(term)


def steps(reward, count=3):
    task = build("draft", {"last_steps": 2, "memory": "flat"}, rewards=RewardSet([Term(reward)]))
    parameters = [p for m in task.trainable.values() for p in m.parameters() if p.requires_grad]
    optimizer, seen = torch.optim.Adam(parameters, 1e-2), []
    for step in range(count):
        out = task.step(task.batch(step, range(step * 2, step * 2 + 2)))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        seen.append(dict(out.metrics))
    return seen, [p.detach().clone() for p in parameters]


def test_training_takes_the_same_steps_as_in_one_process():
    here, weights = steps(load_reward("zreward"))
    with serving(load_reward("zreward")) as served:
        there, others = steps(load_reward("remote", url=served.url, retries=0))
        asked = [line.split()[2] for line in served.lines if "POST" in line]
    assert here == there and all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert asked == ["/score", "/gradient"] * 3


def test_the_command_serves_until_a_signal(tmp_path):
    """As people start it: the token that it prints opens it, and SIGTERM ends it with its own code."""
    settings = {k: v for k, v in os.environ.items() if k != "REWARDTUNE_TOKEN"}
    command = [sys.executable, "-m", "rewardtune", "serve", "--reward", "zreward", "--port", "0", "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=settings)
        try:
            said = dict(process.stdout.readline().rstrip().partition(": ")[::2] for _ in range(3))
            (tmp_path / "token").write_text(said["token"])
            reward = load_reward("remote", url=said["url"], token_file=str(tmp_path / "token"), retries=0)
            leaf = torch.rand(2, 3, 64, 64).requires_grad_()
            score = reward.score(leaf, ["a red fox", "two keys"])
            score.value.sum().backward()
            mine = leaf.detach().clone().requires_grad_()
            own = load_reward("zreward").score(mine, ["a red fox", "two keys"])
            own.value.sum().backward()
            assert torch.equal(own.value, score.value) and torch.equal(mine.grad, leaf.grad)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        finally:
            process.kill()
    log = (tmp_path / "log").read_text()
    assert "POST /gradient 200: 2 x 64 x 64 float32" in log and "SIGTERM: no more requests" in log
    assert said["token"] not in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reward", "zrewrad"], "is unknown"),
        (["--reward", "zreward", "--token-file", "nowhere"], "the key cannot be read"),
        (["--reward", "zreward:checkpoint=nowhere"], "there is no such folder"),
    ],
)
def test_a_wrong_command_ends_with_a_paragraph(words, said, capsys):
    from rewardtune.cli.app import app

    with pytest.raises(SystemExit) as left:
        app(["serve", *words, "--port", "0", "--device", "cpu"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
