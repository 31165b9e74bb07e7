"""Which text a picture is to show, read from its prompt: the metadata `text` and `box`, or what stands in quotes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewardtune.errors import DataError

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»|「([^」]+)」')

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class WantedLine:
    """One line of text. box: left, top, right, bottom as shares of width and height; None: anywhere."""

    text: str
    box: Box | None = None


def wanted_lines(prompt: str, *, reward: str) -> list[WantedLine]:
    """The lines that a prompt wants, at least one, none of them empty.

    Metadata `text` (a string, or a list of one string a line) counts before quotes; a line break begins a new line.
    Metadata `box` is four numbers for a single line, or a list with four numbers or null for each line. Each pair of
    double quotes in the prompt is a line. Raises DataError, naming the reward and the prompt.
    """
    metadata = getattr(prompt, "metadata", {})
    given = metadata.get("text")
    where = f"{reward}: the prompt {_short(prompt)}"
    if given is None:
        texts = [next(filter(None, groups)) for groups in _QUOTED.findall(prompt)]
        if not texts:
            raise DataError(
                f"{where} says no text to write. Give it `text` beside `prompt` in the JSONL file, or put the text "
                'into double quotes: a sign that says "OPEN".'
            )
    elif isinstance(given, str):
        texts = [given]
    elif isinstance(given, Sequence) and given and all(isinstance(line, str) for line in given):
        texts = list(given)
    else:
        raise DataError(f"{where} has `text` {given!r}; expected a string, or a list of one string a line.")
    lines = [line.strip() for text in texts for line in text.splitlines() or [""]]
    if not all(lines):
        raise DataError(f"{where} has `text` {given!r} with an empty line; take it out.")
    boxes = _boxes(metadata.get("box"), len(lines), where)
    return [WantedLine(text, box) for text, box in zip(lines, boxes, strict=True)]


def _boxes(given: Any, count: int, where: str) -> list[Box | None]:
    if given is None:
        return [None] * count
    rows = [given] if count == 1 and _is_box(given) else given
    if not isinstance(rows, Sequence) or len(rows) != count or not all(row is None or _is_box(row) for row in rows):
        raise DataError(
            f"{where} has `box` {given!r}; expected left, top, right, bottom between 0 and 1 (left < right, top < "
            f"bottom) for each of its {count} line(s), or null."
        )
    return [None if row is None else (row[0], row[1], row[2], row[3]) for row in rows]


def _is_box(row: Any) -> bool:
    if not isinstance(row, Sequence) or len(row) != 4:
        return False
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1 for x in row):
        return False
    return bool(row[0] < row[2] and row[1] < row[3])


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else f"{prompt[:77]}...")
