"""Which weights a reward is: commits that are pinned, those that the hub's cache gave, and what a run keeps of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rewardtune.rewards import TABLE
from tiny_vlm import write_vlm

import rewardtune
from rewardtune import registry
from rewardtune.data.references import version
from rewardtune.errors import RecipeError

COMMITS = ("1a" * 20, "2b" * 20)
TINY = {
    "data.prompts": "pocket:prompts/train", "rollout.steps": 1, "gradient.last_steps": 1, "lora.rank": 2,
    "train.steps": 1, "train.batch_size": 1, "train.device": "cpu", "checkpoint.every": 1, "samples.prompts": [],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TABLE))
def test_no_card_names_a_branch(name):
    """Hub ids are at commits of 40 digits; what is of another kind says so."""
    for model, revision in dict(registry.rewards.card(name).models).items():
        if (
            model.count("/") == 1
            and "github" not in model
            and model != "christophschuhmann/improved-aesthetic-predictor"
        ):
            assert re.fullmatch("[0-9a-f]{40}", revision), f"{model}: {revision}"
        assert revision != "main"


@pytest.mark.parametrize("name", ["hpsv3", "imagereward", "detection-counts", "qrealign", "vqascore"])
def test_the_pinned_commit_is_the_one_that_is_asked_for(name, monkeypatch):
    """Down to the hub's own functions, which find an empty cache and no network here."""
    import huggingface_hub
    import transformers.utils.hub

    asked = []

    def record(repository, *_, revision=None, **__):
        asked.append((repository, revision))
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", record)
    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", record)
    with pytest.raises(RecipeError):
        rewardtune.load_reward(name)
    first, wanted = asked[0], dict(registry.rewards.card(name).models)
    assert wanted[first[0]] == first[1]


def hub_cache(folder: Path) -> Path:
    """The layout of the hub's cache: two commits of a repository, `main` at the first."""
    root = folder / "models--team--judge"
    write_vlm(root / "snapshots" / COMMITS[0], "qwen2_5_vl")
    shutil.copytree(root / "snapshots" / COMMITS[0], root / "snapshots" / COMMITS[1])
    (root / "refs").mkdir()
    (root / "refs/main").write_text(COMMITS[0])
    return folder


def offline(cache: Path) -> dict[str, str]:
    return os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def test_what_a_branch_was_when_it_was_loaded(tmp_path):
    cache = hub_cache(tmp_path / "cache")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures/a.png")
    (tmp_path / "prompts.txt").write_text("a red square\n")

    def models(spec: str) -> dict[str, str]:
        command = [sys.executable, "-m", "rewardtune", "score", "--reward", f"vqascore:{spec},dtype=float32"]
        command += ["--images", "pictures", "--prompts", "prompts.txt", "--device", "cpu", "--json"]
        done = subprocess.run(command, cwd=tmp_path, env=offline(cache), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(done.stdout)["reward"]["models"])

    assert models("checkpoint=team/judge") == {"team/judge": f"main, not pinned: loaded at {COMMITS[0]}"}
    assert models(f"checkpoint=team/judge,revision={COMMITS[1]}") == {"team/judge": COMMITS[1]}
    folder = cache / "models--team--judge/snapshots" / COMMITS[1]
    assert models(f"checkpoint={folder}") == {str(folder): "local"}


def test_a_run_keeps_them_and_goes_on_with_no_others(tmp_path):
    cache = hub_cache(tmp_path / "cache")
    options = {"checkpoint": "team/judge", "dtype": "float32"}

    def train(steps: int, *more: str) -> subprocess.CompletedProcess[str]:
        given = {**TINY, "train.steps": steps, "rewards": [{"name": "vqascore", "options": options}]}
        words = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        command = [sys.executable, "-m", "rewardtune", "train", "pocket/zreward", *words, "--out", "run", *more]
        return subprocess.run(command, cwd=tmp_path, env=offline(cache), capture_output=True, text=True, timeout=280)

    first = train(1)
    assert first.returncode == 0, first.stderr[-3000:]
    kept = json.loads((tmp_path / "run/rewards.json").read_text())
    assert kept == [
        {"name": "vqascore", "role": "trained", "models": {"team/judge": f"main, not pinned: loaded at {COMMITS[0]}"}},
        # the demo's
        {"name": "zreward", "role": "guard", "models": {"pocket:held-out-scorer": "shipped"}},
    ]
    (cache / "models--team--judge/refs/main").write_text(COMMITS[1])
    moved = train(2, "--allow-changed", "train.steps")
    assert moved.returncode == 2
    assert "started with other weights of its rewards" in moved.stderr and "--allow-changed rewards" in moved.stderr
    meant = train(2, "--allow-changed", "train.steps,rewards")
    assert meant.returncode == 0, meant.stderr[-3000:]
    assert COMMITS[1] in (tmp_path / "run/rewards.json").read_text()


def test_a_version_in_words(tmp_path):
    assert version("pocket:zreward", None) == "shipped"
    assert version(str(tmp_path), None) == "local"
    assert version("team/none-of-this-machine", None) == "main, not pinned"
    assert version("team/none-of-this-machine", "v2") == "v2, not pinned"
    assert version("team/none-of-this-machine", "a" * 40) == "a" * 40
