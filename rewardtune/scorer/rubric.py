"""What a scorer is asked and where its answer is read: data that lies beside the weights as `rubric.json`.

`model.py` turns it, once per checkpoint and with that checkpoint's own tokenizer, into token ids.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rewardtune.errors import RecipeError

FILE = "rubric.json"


class Level(BaseModel):
    """One score level: the text that stands for it, and its value."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    token: Annotated[str, Field(min_length=1)]
    value: float


class Rubric(BaseModel):
    """A rubric. The score of dimension d is read after `reads[d]`'s last token; no level stands between the reads.

    Several dimensions therefore cost one forward pass: every read sees image, prompt and the names before it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    version: Literal[1] = 1
    dimensions: Annotated[tuple[str, ...], Field(min_length=1)]
    levels: Annotated[tuple[Level, ...], Field(min_length=2)]
    template: str
    """Text before the reads, with `{image}` and `{prompt}` once each; special tokens are written out."""
    reads: tuple[str, ...]
    """For each dimension, the text whose next token is its level."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Logits are divided by this."""

    @model_validator(mode="after")
    def _fits(self) -> Rubric:
        if len(self.reads) != len(self.dimensions):
            raise ValueError(f"{len(self.dimensions)} dimensions need as many reads; there are {len(self.reads)}")
        if any(not read for read in self.reads):
            raise ValueError("a read may not be empty: the level is read after its last token")
        if len(set(self.dimensions)) != len(self.dimensions):
            raise ValueError("the dimensions' names must differ")
        values = self.values
        if any(b <= a for a, b in itertools.pairwise(values)):
            raise ValueError("the levels' values must rise")
        for slot in ("{image}", "{prompt}"):
            if self.template.count(slot) != 1:
                raise ValueError(f"the template must hold {slot} exactly once")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """Value of each level, rising."""
        return tuple(level.value for level in self.levels)


@dataclass(frozen=True)
class Reading:
    """A rubric in the ids of one tokenizer.

    before, between, after: ids of the template around image and prompt; `after` ends with the reads.
    lead: white space before the prompt, which byte-pair vocabularies keep with the word that follows. image_first:
    whether the image stands before the prompt. positions: one per dimension, counted from the end of the sequence (-1
    is the last). level_ids: one token per level.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    lead: str
    image_first: bool
    positions: tuple[int, ...]
    level_ids: tuple[int, ...]


def load_rubric(path: str | Path | None = None) -> Rubric:
    """The rubric in a file, or in a folder's `rubric.json`; the shipped one for real models when None.

    Raises RecipeError with every mistake in it.
    """
    if path is None:
        text, where = (resources.files("rewardtune.scorer") / FILE).read_text(), "the shipped rubric"
    else:
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            text, where = file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file}: the rubric cannot be read ({error}). Give the path of a rubric.json.") from None
    try:
        return Rubric.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}: not JSON: {error}.") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'rubric'}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"{where} is not a rubric: {wrong}.") from None


def save_rubric(rubric: Rubric, folder: Path) -> None:
    """Write `rubric.json` into a checkpoint's folder."""
    (folder / FILE).write_text(json.dumps(rubric.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")


def reading(rubric: Rubric, tokenizer: Any) -> Reading:
    """The rubric in a tokenizer's ids.

    Every level must be one token of its own after every read, as the model would write it. Raises RecipeError that
    names the levels that are not, which half points written "3.5" are not in Qwen's vocabularies.
    """

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return found

    # the groups are the white space before {prompt}; the one before {image} is empty
    before, lead_1, between, lead_2, after = re.split(r"(\s*)\{prompt\}|\{image\}", rubric.template)
    reads = [ids(text) for text in rubric.reads]
    levels = _level_ids(rubric, reads, ids, tokenizer.unk_token_id)
    positions, end = [], 0
    for read in reversed(reads):
        positions.append(end - 1)
        end -= len(read)
    return Reading(
        before=tuple(ids(before)),
        between=tuple(ids(between)),
        after=(*ids(after), *(i for read in reads for i in read)),
        lead=lead_1 or lead_2 or "",
        image_first=rubric.template.index("{image}") < rubric.template.index("{prompt}"),
        positions=tuple(reversed(positions)),
        level_ids=levels,
    )


def _level_ids(
    rubric: Rubric, reads: Sequence[list[int]], ids: Callable[[str], list[int]], unknown: int | None
) -> tuple[int, ...]:
    found: list[int] = []
    wrong: list[str] = []
    for level in rubric.levels:
        after = set()
        for text, read in zip(rubric.reads, reads, strict=True):
            whole = ids(text + level.token)
            single = len(whole) == len(read) + 1 and whole[:-1] == read and whole[-1] != unknown
            after.add(whole[-1] if single else None)
        if len(after) != 1 or None in after:
            wrong.append(f"{level.token!r} (value {level.value:g})")
        found.append(next(iter(after)) or 0)
    if wrong:
        raise RecipeError(
            f"rubric: these levels are not one token after every read in this model's tokenizer: {', '.join(wrong)}. "
            "Stand single digits, letters or words for the levels and explain them in the template."
        )
    if len(set(found)) != len(found):
        raise RecipeError("rubric: two levels are the same token in this model's tokenizer; every level needs its own.")
    return tuple(found)
