"""Recipes by name: those that come with the package, and the file behind what a user typed."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rewardtune.errors import RecipeError
from rewardtune.recipe.suggest import closest


def shipped_recipes() -> dict[str, Path]:
    """Name (`pocket/zreward`) -> file of every recipe that comes with the package."""
    root = Path(str(resources.files("rewardtune.recipes")))
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in sorted(root.rglob("*.yaml"))}


def find_recipe(path_or_name: str | Path) -> Path:
    """The file behind a path or a shipped name. Raises RecipeError with the nearest names when there is none."""
    given = str(path_or_name)
    path = Path(given).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    name = given.removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    if path.exists():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise RecipeError(f"recipe {given!r} is {kind}; give a .yaml file or a name of `rewardtune recipes list`.")
    nearby = [str(file) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    guess = closest(given, [*shipped, *nearby])
    raise RecipeError(
        f"recipe {given!r}: there is no such file, and no shipped recipe has this name{guess or '.'} "
        "`rewardtune recipes list` lists them."
    )
