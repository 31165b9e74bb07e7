"""Recipes by name: those that come with the package, and the file behind what a user typed."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rewardtune.errors import RecipeError
from rewardtune.recipe.strict_yaml import MAX_BYTES
from rewardtune.recipe.suggest import closest


def shipped_recipes() -> dict[str, Path]:
    """Name (`pocket/zreward`) -> file of every recipe that comes with the package."""
    root = Path(str(resources.files("rewardtune.recipes")))
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in sorted(root.rglob("*.yaml"))}


def read_recipe(source: Path) -> str:
    """A recipe's text. Raises RecipeError for a file that is no UTF-8 text, too large or cannot be read."""
    try:
        size = source.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(f"{source}: {size:,} bytes are more than a recipe may have ({MAX_BYTES:,}).")
        return source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{source}: this is not UTF-8 text ({error.reason} at byte {error.start}), so it is no recipe. Give a YAML "
            "file, saved as UTF-8."
        ) from error
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}.") from error


def find_recipe(path_or_name: str | Path) -> Path:
    """The file behind a path or a shipped name. Raises RecipeError with the nearest names when there is none."""
    given = str(path_or_name)
    if not given:
        raise RecipeError("the recipe's name is empty; give a .yaml file or a name of `rewardtune recipes list`.")
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
    nearby = [str(file) for file in path.parent.glob("*.y*ml") if file.is_file()] if path.parent.is_dir() else []
    guess = closest(given, [*shipped, *nearby])
    raise RecipeError(
        f"recipe {given!r}: there is no such file, and no shipped recipe has this name{guess or '.'} "
        "`rewardtune recipes list` lists them."
    )
