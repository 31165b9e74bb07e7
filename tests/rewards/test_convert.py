"""`rewards convert`: a pickle that would run code becomes safetensors once, and only where its reward takes it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from reference_numbers import uniform
from safetensors import safe_open
from tiny_blip import published, write_folder
from typer.testing import CliRunner

from rewardtune.backbones.convert import convert
from rewardtune.cli.app import app
from rewardtune.errors import RecipeError
from rewardtune.scoring.reward_set import load_reward


class Runs:
    """What a pickle can hold: a call, made when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "published")


def poisoned(folder: Path, trap: Path) -> Path:
    file = folder / "ImageReward.pt"
    torch.save({"state_dict": published(), "notes": Runs(trap)}, file)
    return file


def test_nothing_runs_without_trust(folder, tmp_path):
    trap = tmp_path / "trap"
    file = poisoned(folder, trap)
    with pytest.raises(RecipeError, match=r"run the code that is in it.*--trust"):
        convert("imagereward", file, tokenizer=str(folder))
    with pytest.raises(RecipeError, match=r"cannot be read.*rewards convert imagereward .*ImageReward.pt --trust"):
        load_reward("imagereward", checkpoint=str(folder), tokenizer=str(folder))
    assert not trap.exists()


def test_trusted_it_gives_the_same_reward(folder, tmp_path):
    images = uniform("images", (2, 3, 32, 32))
    options = {"tokenizer": str(folder)}
    before = load_reward("imagereward", checkpoint=str(folder), **options).score(images, ["a fox", "a dog"]).value
    file = poisoned(folder, tmp_path / "trap")
    found = CliRunner().invoke(app, ["rewards", "convert", f"imagereward:tokenizer={folder}", str(file), "--trust"])
    assert found.exit_code == 0, found.output
    made = file.with_suffix(".safetensors")
    assert found.stdout.strip() == str(made)
    assert (tmp_path / "trap").is_dir()  # the code in it did run: the warning is no exaggeration
    after = load_reward("imagereward", checkpoint=str(made), **options).score(images, ["a fox", "a dog"]).value
    assert torch.equal(before, after)
    with safe_open(made, "pt") as stored:
        header = stored.metadata()
    assert header["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert header["reward"] == "imagereward" and header["source"] == "ImageReward.pt"
    with pytest.raises(RecipeError, match="is there already"):
        convert("imagereward", file, trust=True, **options)


def test_weights_alone_need_no_trust(folder):
    made = convert("imagereward", folder / "ImageReward.pt", tokenizer=str(folder))
    assert load_reward("imagereward", checkpoint=str(made), tokenizer=str(folder)).card.native_resolution == 32


def test_what_the_reward_does_not_take_is_not_kept(folder):
    file = folder / "other.pt"
    torch.save({"layers.0.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(RecipeError, match=r"other\.pt holds the weights of another model"):
        convert("imagereward", file, tokenizer=str(folder))
    torch.save({"epoch": 3, "lr": 1.0}, file)
    with pytest.raises(RecipeError, match="no tensors: epoch, lr"):
        convert("imagereward", file, tokenizer=str(folder))
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(RecipeError, match="is damaged or no checkpoint"):
        convert("imagereward", file, trust=True, tokenizer=str(folder))
    with pytest.raises(RecipeError, match="there is no file"):
        convert("imagereward", folder / "nothing.pt")
    assert sorted(path.name for path in folder.iterdir() if "safetensors" in path.name) == []
