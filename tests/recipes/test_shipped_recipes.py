"""Every recipe that ships validates, and its editor header leads to a schema that is current."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rewardtune import registry
from rewardtune.recipe.file import load_recipe, recipe_schema
from rewardtune.recipe.shipped import shipped_recipes

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = sorted(shipped_recipes())


def test_no_recipe_is_missed():
    files = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.y*ml"))
    assert files == NAMES
    assert "pocket/zreward" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_validates(name):
    loaded = load_recipe(name)
    assert loaded.name == name.rpartition("/")[2]
    # But for a team's own data, earlier runs and what `make pocket` makes first, all it refers to is in the package.
    load_recipe(name, files=not re.search(r"\b(build|data|runs)/", loaded.text))


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_with_the_editor_header_and_says_what_it_is_for(name):
    header, summary, *_ = shipped_recipes()[name].read_text().splitlines()
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", header)
    assert found, header
    assert (shipped_recipes()[name].parent / found[1]).resolve() == FOLDER / "recipe.schema.json"
    assert len(summary.lstrip("# ")) > 20


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("zreward/")])
def test_a_recipe_of_real_size_says_first_what_it_needs(name):
    _, *head = shipped_recipes()[name].read_text().splitlines()
    first = " ".join(line.lstrip("# ") for line in head[:4] if line.startswith("#"))
    assert re.search(r"\. Memory: about \d+ GiB\b.*\. Hardware: (one|\d+ x) \d+ GB\b", first), first
    # what the header counts on
    recipe = load_recipe(name).recipe
    assert recipe.scorer.dtype == "bfloat16" and recipe.scorer.lora and recipe.train.gradient_checkpointing
    # 1,024 tokens a picture; what a teacher in process was trained with stands in its export
    assert recipe.scorer.max_pixels == 1024 * 32 * 32


def test_every_size_has_its_baselines():
    for stem in ("student-9b", "teacher-27b"):
        assert {f"zreward/{stem}-{method}" for method in ("sft", "dance", "grpo", "gdso")} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_judge_is_trained_on(name):
    recipe = load_recipe(name).recipe
    for section in getattr(recipe, "rewards", ()):
        assert not registry.rewards.card(section.name).held_out


def readme_blocks(language: str) -> list[str]:
    text = (FOLDER.parent / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_readmes_recipe_validates(tmp_path):
    (block,) = readme_blocks("yaml")
    (tmp_path / "readme.yaml").write_text(block)
    assert load_recipe(tmp_path / "readme.yaml").recipe.task == "direct_reward"


def test_the_readmes_reward_keeps_the_contract_when_pasted(tmp_path):
    (block,) = (block for block in readme_blocks("python") if "register_reward" in block)
    (tmp_path / "warmth.py").write_text(block)
    command = [sys.executable, "-m", "rewardtune", "rewards", "test", "warmth", "--plugin", "warmth.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_file_is_current():
    stored = json.loads((FOLDER / "recipe.schema.json").read_text())
    assert stored == recipe_schema(), "run: rewardtune schema > recipes/recipe.schema.json"
