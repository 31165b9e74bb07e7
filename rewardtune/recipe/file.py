"""From a recipe's text to a checked recipe: find the file, apply overrides, validate, and name every mistake at once.

`cli/app.py` and `training/run.py` call `load_recipe`; the sections themselves are `sections.py`'s, joins and paths
`validate.py`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rewardtune.errors import DataError, RecipeError, RewardTuneError
from rewardtune.recipe import strict_yaml
from rewardtune.recipe.mistakes import Loc, Mistake, dotted, schema_mistakes, shown
from rewardtune.recipe.sections import TASKS, DirectRewardRecipe, Recipe, RewardSftRecipe, SftRecipe
from rewardtune.recipe.shipped import find_recipe, read_recipe
from rewardtune.recipe.strict_yaml import Document
from rewardtune.recipe.suggest import closest
from rewardtune.recipe.validate import check_files, check_joins, unused

MAX_SHOWN = 30


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that passed every check, with what is needed to say later where it came from."""

    recipe: SftRecipe | DirectRewardRecipe | RewardSftRecipe
    source: Path
    text: str
    """The file as given, before overrides."""
    name: str
    """`name:` of the recipe, else the file's name."""
    overrides: tuple[str, ...] = ()
    """`a.b=c` as given on the command line."""
    notices: tuple[str, ...] = ()
    """A sentence each for what is no mistake and may not be meant."""

    @property
    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, defaults included; plain JSON data."""
        return self.recipe.model_dump(mode="json")

    @property
    def sha256(self) -> str:
        """Hash of the resolved content: equal recipes have equal hashes, whatever their comments and key order."""
        return hashlib.sha256(json.dumps(self.resolved, sort_keys=True).encode()).hexdigest()


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = (), *, files: bool = False) -> LoadedRecipe:
    """Read, override and check a recipe: a YAML file, or the name of a shipped one (`pocket/zreward`).

    overrides: `a.b=c` or `rewards.0.weight=2`, values written as in YAML. files: also check that what it refers to
    exists and that data files begin well (`validate.check_files`). Imports no torch unless a third party's reward does.
    Raises RecipeError with every mistake, each with file, line and, where one can be guessed, what was meant;
    DataError when only data files are at fault.
    """
    source = find_recipe(path_or_name)
    text = read_recipe(source)
    recipe, found = _checked(source, text, overrides, files=files)
    if found:
        raise _error(source, _brought_about(found, source, text, overrides, files=files))
    assert recipe is not None
    return LoadedRecipe(
        recipe=recipe,
        source=source,
        text=text,
        name=recipe.name or source.stem,
        overrides=tuple(overrides),
        notices=unused(recipe),
    )


def _checked(source: Path, text: str, overrides: Sequence[str], *, files: bool) -> tuple[Any, list[_Located]]:
    """The recipe, None where the schema refuses it, and every mistake of the file with these overrides."""
    document = strict_yaml.parse(text, name=str(source))
    found = [_Located(Mistake(loc, message), line, "") for loc, line, message in document.mistakes]
    applied: dict[Loc, str] = {}
    for override in overrides:
        found += _override(document, override, applied)
    data = document.data
    if not isinstance(data, dict):
        raise RecipeError(
            f"{source}: a recipe is a mapping of sections (task, pipeline, data, ...); this holds none. "
            "`rewardtune recipes copy pocket/zreward my.yaml` gives one to start from."
        )
    recipe, mistakes = _validate(data)
    told = {mistake.loc for mistake in mistakes}
    further = check_joins(data) + (check_files(data) if files else [])
    mistakes += [mistake for mistake in further if mistake.loc not in told]
    return recipe, found + [_located(mistake, document, applied) for mistake in mistakes]


# -------------------------------------------------------------------------------------------------------- overrides


def format_overrides(values: Mapping[str, Any]) -> list[str]:
    """`{"train.steps": 50}` as the command line would write it."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


@dataclass(frozen=True)
class _Located:
    """A mistake and where its author finds it: a line of the file, an override, or both where they do not fit."""

    mistake: Mistake
    line: int | None
    override: str


def _brought_about(
    found: Sequence[_Located], source: Path, text: str, overrides: Sequence[str], *, files: bool
) -> list[_Located]:
    """Name the overrides without which a mistake would not be there, where it lies between settings: what an override
    says may be right by itself and not fit a line of the file, which its author has no reason to look at."""
    if all(one.override for one in found):
        return list(found)
    everything = {one.mistake for one in found}
    without: dict[str, set[Mistake]] = {}
    for left_out in dict.fromkeys(overrides):
        try:
            _, rest = _checked(source, text, [other for other in overrides if other != left_out], files=files)
        except RewardTuneError:
            continue  # the others cannot be read without it
        left = {one.mistake for one in rest}
        if left <= everything:  # else what is wrong without it may hide what is looked for
            without[f"override {left_out!r}"] = left
    told = []
    for one in found:
        culprits = [] if one.override else [place for place, left in without.items() if one.mistake not in left]
        told.append(_Located(one.mistake, one.line, " and ".join(culprits) or one.override))
    return told


def _override(document: Document, override: str, applied: dict[Loc, str]) -> list[_Located]:
    """Set one value in the document; sections on the way are made, list entries must exist."""
    key, equals, text = override.partition("=")
    place = f"override {override!r}"
    if not equals or not key or "" in key.split("."):
        raise RecipeError(f"{place}: write it as section.key=value, for example train.steps=100.")
    if not isinstance(document.data, dict):
        document.data = {}
    parsed = strict_yaml.parse(text, name=place, numbered=False)
    loc: Loc = ()
    target: Any = document.data
    parts = key.split(".")
    for position, part in enumerate(parts):
        step: str | int = part
        if isinstance(target, list):
            if not part.isdecimal() or int(part) >= len(target):
                known = f"entries 0 to {len(target) - 1}" if target else "no entries"
                message = f"'{part}' is no entry of {dotted(loc)}, which has {known}"
                return [_Located(Mistake(loc, message), None, place)]
            step = int(part)
        elif not isinstance(target, dict):
            return [_Located(Mistake(loc, f"{dotted(loc)} is {shown(target)}, so it has no '{part}'"), None, place)]
        loc = (*loc, step)
        if position == len(parts) - 1:
            target[step] = parsed.data
        else:
            if isinstance(target, dict) and target.get(part) is None:
                target[part] = {}
                applied[loc] = place  # a section that the file does not have, so nothing wrong with it is the file's
            target = target[step]
    for below in [other for other in applied if other[: len(loc)] == loc]:
        del applied[below]  # what an earlier override said there is gone
    applied[loc] = place
    return [_Located(Mistake((*loc, *inner), message), None, place) for inner, _, message in parsed.mistakes]


# ----------------------------------------------------------------------------------------------- schema and wording


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of all recipes, told apart by `task`. Every key has a description, which editors show."""
    adapter: TypeAdapter[Any] = TypeAdapter(Recipe)
    schema = adapter.json_schema()
    for section in schema["$defs"].values():
        for key in section["properties"].values():
            if "description" not in key:
                key["description"] = _described_by(key, section, schema["$defs"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "rewardtune recipe"} | schema


def _described_by(key: Mapping[str, Any], section: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """What stands for a docstring that a key lacks: its section's where it only names that section (`task`, `method`,
    `kind`), else that of the section which is its value."""
    if "const" in key:
        return str(section["description"])
    (target,) = {value["$ref"].rpartition("/")[2] for value in (key, *key.get("anyOf", ())) if "$ref" in value}
    return str(sections[target]["description"])


def _validate(data: dict[str, Any]) -> tuple[Any, list[Mistake]]:
    """The recipe, or None and the mistakes. Strict: a number in quotes is text, and true is no number."""
    task = data.get("task")
    if not isinstance(task, str) or task not in TASKS:
        if task is None:
            return None, [Mistake((), f"key 'task' is missing; it says what to train: {', '.join(TASKS)}")]
        guess = closest(str(task), TASKS)
        return None, [Mistake(("task",), f"task {task!r} is unknown (there are {', '.join(TASKS)}){guess}")]
    cls: Any = TASKS[task]
    try:
        # As JSON, because pydantic's strict mode takes a list for a tuple there.
        return cls.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        return None, schema_mistakes(error, cls, data)


def _located(mistake: Mistake, document: Document, applied: Mapping[Loc, str]) -> _Located:
    """The override that put the value there, or the line of the key, or of the nearest section around it."""
    around = [mistake.loc[:length] for length in range(len(mistake.loc), 0, -1)]
    # an override replaces all that the file says below its key, so it is asked first
    for loc in around:
        if loc in applied:
            return _Located(mistake, None, applied[loc])
    for loc in around:
        if loc in document.lines:
            return _Located(mistake, document.lines[loc], "")
    return _Located(mistake, None, "")


def _error(source: Path, found: Sequence[_Located]) -> RecipeError | DataError:
    """One line a mistake, in the order of the file, overrides last."""
    lines = []
    for one in sorted(found, key=lambda one: (bool(one.override), one.line or 0)):
        line = f"{source}:{one.line}" if one.line else ""
        place = " with ".join(part for part in (one.override, line) if part) or str(source)
        message = one.mistake.message
        lines.append(f"{place}: {message}" + ("" if message.endswith((".", "?")) else "."))
    if len(lines) > MAX_SHOWN:
        lines[MAX_SHOWN:] = [f"... and {len(lines) - MAX_SHOWN} more."]
    if len(lines) > 1:
        by_override = [bool(one.override) for one in found]
        whose = "The overrides have" if all(by_override) else f"{source} has"
        if any(by_override) and not all(by_override):
            whose = f"{source} and the overrides have"
        lines.insert(0, f"{whose} {len(found)} mistakes.")
    return (DataError if all(one.mistake.data for one in found) else RecipeError)("\n".join(lines))
