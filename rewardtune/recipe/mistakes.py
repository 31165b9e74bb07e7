"""Mistakes in a recipe, in words that its author uses: pydantic's errors become sentences with suggestions.

`file.py` uses this for the sections, `validate.py` for the options of plug-ins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from rewardtune.recipe.suggest import closest

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Mistake:
    """Something wrong at one place of a recipe. `data`: the fault lies in a data file, not in the recipe."""

    loc: Loc
    message: str
    data: bool = False


def schema_mistakes(error: ValidationError, cls: type[BaseModel], data: Any, *, at: Loc = ()) -> list[Mistake]:
    """pydantic's errors, one mistake a place. `data` is what `cls` refused; it stands at `at` in the recipe."""
    found: dict[Loc, list[Any]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_loc_in(data, detail["loc"], missing=detail["type"] == "missing"), []).append(detail)
    return [Mistake((*at, *loc), _say(details, loc, cls, data, at)) for loc, details in found.items()]


def _loc_in(data: Any, loc: tuple[str | int, ...], *, missing: bool) -> Loc:
    """pydantic's location without the names of union members, which are not in the file."""
    path: Loc = ()
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if inside:
            path, data = (*path, part), data[part]
        elif missing and last:
            path = (*path, part)
    return path


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number that is not infinite",
    "bool_parsing": "true or false",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section of keys and values",
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
}
_BOUNDS = {
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def _say(details: list[Any], loc: Loc, cls: type[BaseModel], data: Any, at: Loc) -> str:
    """One sentence for what pydantic found at one place."""
    value, where = value_at(data, loc), dotted((*at, *loc))
    detail = details[0]
    kind, context = detail["type"], detail.get("ctx", {})
    if len(details) > 1:
        return f"{where} is {shown(value)}; expected {' or '.join(dict.fromkeys(map(_wanted, details)))}"
    if kind == "extra_forbidden":
        return _unknown_key(loc, cls, data, at)
    if kind == "missing":
        return f"key '{loc[-1]}' is missing{f' in {dotted((*at, *loc)[:-1])}' if at or len(loc) > 1 else ''}"
    if kind == "union_tag_not_found":
        return f"key {context['discriminator']} is missing in {where}"
    if kind == "union_tag_invalid":
        key, known = context["discriminator"].strip("'"), context["expected_tags"].replace("'", "")
        return f"{where}.{key} is '{context['tag']}' (it can be {known}){closest(context['tag'], known.split(', '))}"
    if kind == "value_error":
        return f"{where}: {context['error']}" if at or loc else str(context["error"])
    if kind == "literal_error":
        known = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"{where} is {shown(value)} (it can be {known}){closest(str(value), known.split(', '))}"
    return f"{where} is {shown(value)}; expected {_wanted(detail)}{_instead(value, (*at, *loc), cls)}"


_SWITCHED_OFF: Mapping[Loc, str] = {("samples",): "no samples are drawn with samples.prompts=[]"}
"""Sections that people try to switch off with a word in their place, and what does it."""


def _instead(value: Any, loc: Loc, cls: type[BaseModel]) -> str:
    """What to write for a section that has nothing in it, or that is meant to be off."""
    if loc in _SWITCHED_OFF and value in (None, False, "off", "none", "no"):
        return f"; {_SWITCHED_OFF[loc]}"
    field = cls.model_fields.get(str(loc[0])) if len(loc) == 1 else None
    if value is None and field is not None and isinstance(field.default, BaseModel):
        return "; leave it out, or write {}, for its defaults"
    return ""


def _wanted(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _BOUNDS:
        return f"{_BOUNDS[kind]} {next(iter(context.values())):g}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "too_short":
        return f"at least {context['min_length']} {'entry' if context['min_length'] == 1 else 'entries'}"
    return str(detail["msg"])


def _unknown_key(loc: Loc, cls: type[BaseModel], data: Any, at: Loc) -> str:
    """Suggest a key of the same section, else the section where this very key belongs."""
    *parent, key = loc
    section = _class_at(cls, parent, data)
    where = dotted((*at, *parent)) if at or parent else f"a recipe of task {data.get('task')}"
    said = f"key '{key}' unknown in {where}"
    if section is None:
        return said
    if guess := closest(str(key), section.model_fields):
        return said + guess
    homes = [n for n, field in cls.model_fields.items() if key in _keys_of(field.annotation) and n != dotted(parent)]
    if homes and parent:
        return f"{said}; it belongs to {' or '.join(homes)}"
    return f"{said}, which takes {', '.join(section.model_fields) or 'no keys'}"


def _keys_of(annotation: Any) -> set[str]:
    return {key for section in _sections(annotation) for key in section.model_fields}


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The section classes that an annotation (optional, list, union) may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]


def _class_at(cls: type[BaseModel], loc: Iterable[str | int], data: Any) -> type[BaseModel] | None:
    """The section class that the schema has at a place of this data."""
    found: type[BaseModel] | None = cls
    annotation: Any = cls
    for part in loc:
        data = value_at(data, (part,))
        if isinstance(part, str):
            field = found.model_fields.get(part) if found else None
            if field is None:
                return None
            annotation = field.annotation
        found = next((section for section in _sections(annotation) if _fits(section, data)), None)
    return found


def _fits(section: type[BaseModel], data: Any) -> bool:
    """Whether the section's own `kind: Literal[...]` key (if it has one) agrees with the data."""
    for name, field in section.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            return value_at(data, (name,)) in (*get_args(field.annotation), None)
    return True


def value_at(data: Any, loc: Loc) -> Any:
    """What stands at a place of plain data, or None."""
    for part in loc:
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def dotted(loc: Iterable[str | int]) -> str:
    """A place as overrides write it."""
    return ".".join(map(str, loc)) or "the recipe"


def shown(value: Any) -> str:
    """A value as the file's author would recognise it, with its kind, cut to a line."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text '{value if len(value) < 60 else value[:57] + '...'}'"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a section"
    return str(value)
