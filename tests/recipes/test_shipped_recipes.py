"""Every recipe that ships validates, and its editor header leads to a schema that is current."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rewardtune import registry
from rewardtune.recipe_file import load_recipe, recipe_schema
from rewardtune.shipped import shipped_recipes

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
    # Without the files that `make pocket` makes first, everything it refers to must be in the package.
    load_recipe(name, files="build/" not in loaded.text)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_with_the_editor_header_and_says_what_it_is_for(name):
    header, summary, *_ = shipped_recipes()[name].read_text().splitlines()
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", header)
    assert found, header
    assert (shipped_recipes()[name].parent / found[1]).resolve() == FOLDER / "recipe.schema.json"
    assert len(summary.lstrip("# ")) > 20


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_judge_is_trained_on(name):
    recipe = load_recipe(name).recipe
    for section in getattr(recipe, "rewards", ()):
        assert not registry.rewards.card(section.name).held_out


def test_the_schema_file_is_current():
    stored = json.loads((FOLDER / "recipe.schema.json").read_text())
    assert stored == recipe_schema(), "run: rewardtune schema > recipes/recipe.schema.json"
