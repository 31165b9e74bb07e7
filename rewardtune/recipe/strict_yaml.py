"""YAML as recipes use it: the core schema of YAML 1.2, bounded in size, with the line of every key.

`file.py` reads recipes and the values of overrides through here. 1e-4 is a number, only true and false are
booleans, a repeated key is a mistake, and a file that would grow when its aliases are expanded is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from rewardtune.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_ALIASES = 100
MAX_NODES = 10_000
"""Values, counted after aliases are expanded: a hundred aliases can stand for billions."""

Path = tuple[str | int, ...]
At = Callable[[int], str]
"""A line, from 1, as a message names it; 0 for none."""


@dataclass
class Document:
    """Plain data, the line of each key and list entry (from 1), and the mistakes that did not stop the reading."""

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)
    mistakes: list[tuple[Path, int, str]] = field(default_factory=list)
    size: int = 0


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2 does; dates, merge keys, octal 010 and yes/no/on/off are ordinary text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def _resolves(kind: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), list(first) or [""])


_resolves("null", r"~|null|Null|NULL|", "~nN")
_Loader.yaml_implicit_resolvers.setdefault("", []).extend(_Loader.yaml_implicit_resolvers["~"])
_resolves("bool", r"true|True|TRUE|false|False|FALSE", "tTfF")
_resolves("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
_resolves(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+.0123456789",
)


def parse(text: str, *, name: str, numbered: bool = True) -> Document:
    """Data of one YAML document.

    `name` is the file in messages, with the line; not numbered: a text without lines of a file, such as an override.
    Raises RecipeError for what cannot be read at all: syntax, tags, limits.
    """

    def at(line: int) -> str:
        return f"{name}:{line}" if numbered and line else name

    if len(text) > MAX_BYTES:
        raise RecipeError(f"{name}: {len(text):,} characters are more than a recipe may have ({MAX_BYTES:,}).")
    try:
        _check_events(text, at=at)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = "; ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in reason:
            reason += "; indent with spaces, for YAML takes no tabs"
        raise RecipeError(f"{at(mark.line + 1 if mark else 0)}: this is not valid YAML: {reason}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: this is not valid YAML: {' '.join(str(error).split())}.") from error
    document = Document(None)
    if node is not None:
        document.data = _construct(node, (), document, at=at)
    return document


def _check_events(text: str, *, at: At) -> None:
    """Refuse tags, deep nesting, many aliases and endless lists before any tree is built."""
    depth = aliases = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if count > MAX_NODES:
            raise RecipeError(f"{at(line)}: more than {MAX_NODES:,} values; this is not a recipe.")
        if (tag := getattr(event, "tag", None)) is not None:
            raise RecipeError(f"{at(line)}: a YAML tag ({tag}) is not allowed in a recipe; write plain values.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        if depth > MAX_DEPTH:
            raise RecipeError(f"{at(line)}: nested deeper than {MAX_DEPTH} levels; a recipe needs five or six.")
        if aliases > MAX_ALIASES:
            raise RecipeError(f"{at(line)}: more than {MAX_ALIASES} aliases (*name); write the values out.")


def _construct(node: yaml.Node, path: Path, document: Document, *, at: At) -> Any:
    """The value of a node; every alias gives a copy, so that overrides change one place only."""
    document.size += 1
    line = node.start_mark.line + 1
    if document.size > MAX_NODES:
        raise RecipeError(f"{at(line)}: aliases (*name) expand to more than {MAX_NODES:,} values; write them out.")
    if len(path) > MAX_DEPTH:
        raise RecipeError(f"{at(line)}: nested deeper than {MAX_DEPTH} levels (does an alias contain itself?).")
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            document.lines[(*path, index)] = item.start_mark.line + 1
            items.append(_construct(item, (*path, index), document, at=at))
        return items
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document, at=at)
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, path, document)


def _mapping(node: yaml.MappingNode, path: Path, document: Document, *, at: At) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.mistakes.append((path, line, "a key must be a word, not a list or a mapping"))
            continue
        key = key_node.value
        if key in mapping:
            first = document.lines[(*path, key)]
            where = f" (first on line {first})" if first != line else ""
            document.mistakes.append(((*path, key), line, f"key '{key}' is given twice{where}"))
            continue
        document.lines[(*path, key)] = line
        mapping[key] = _construct(value_node, (*path, key), document, at=at)
    return mapping


def _scalar(node: yaml.ScalarNode, path: Path, document: Document) -> Any:
    kind = node.tag.rpartition(":")[2]
    text: str = node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        if len(text) > 100:  # Python refuses to convert thousands of digits, and no setting needs them
            document.mistakes.append((path, node.start_mark.line + 1, f"a number of {len(text)} digits is too long"))
            return 0
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if kind == "float":
        value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if not math.isfinite(value):
            document.mistakes.append((path, node.start_mark.line + 1, f"{text} is not a finite number"))
            return 0.0
        return value
    return text
