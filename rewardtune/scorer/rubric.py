"""What a scorer is asked and where its answer is read: data that lies beside the weights as `rubric.json`.

`model.py` turns it, once per checkpoint and with that checkpoint's own tokenizer, into token ids.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


class Criterion(BaseModel):
    """What one dimension judges, and what each anchor looks like: error patterns, not "minor" or "major"."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    judges: Annotated[str, Field(min_length=1)]
    anchors: Annotated[dict[str, str], Field(min_length=2)]
    """Score as text -> what a picture of that score shows, best first."""

    @property
    def text(self) -> str:
        return "\n".join([self.judges, *(f"{score}: {looks}" for score, looks in self.anchors.items())])


class Thinking(BaseModel):
    """How a judgement with reasoning is asked for and read; it is about one dimension."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    template: str
    """Text before the reasoning: `{image}` and `{prompt}` once each, `{dimension}` and `{criteria}` where wanted."""
    close: Annotated[str, Field(min_length=1)]
    """Text that ends the reasoning, whether the model came to it or was cut off; sampling stops at its first token."""
    reads: tuple[str, ...]
    """For each dimension the score prefix after `close`, whose next token is the level."""
    max_tokens: Annotated[int, Field(gt=0)] = 1024
    """Most tokens of a reasoning."""


class Rubric(BaseModel):
    """A rubric. The score of dimension d is read after `reads[d]`'s last token; no level stands between the reads.

    Several dimensions therefore cost one forward pass: every read sees image, prompt and the names before it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    version: Literal[1] = 1
    dimensions: Annotated[tuple[str, ...], Field(min_length=1)]
    levels: Annotated[tuple[Level, ...], Field(min_length=2)]
    criteria: dict[str, Criterion] = {}
    """Dimension -> what it judges; goes where a template says `{criteria}`."""
    template: str
    """Text before the reads, with `{image}` and `{prompt}` once each; special tokens are written out."""
    reads: tuple[str, ...]
    """For each dimension, the text whose next token is its level."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Logits are divided by this."""
    thinking: Thinking | None = None
    """For models that reason before they score; a rubric without it is read in one pass only."""

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
        templates = {"the template": self.template}
        if self.thinking is not None:
            templates["thinking.template"] = self.thinking.template
            if len(self.thinking.reads) != len(self.dimensions) or any(not read for read in self.thinking.reads):
                raise ValueError("thinking.reads needs one text for each dimension, none of them empty")
        for name, template in templates.items():
            for slot in ("{image}", "{prompt}"):
                if template.count(slot) != 1:
                    raise ValueError(f"{name} must hold {slot} exactly once")
            if "{criteria}" in template and sorted(self.criteria) != sorted(self.dimensions):
                raise ValueError(f"{name} asks for {{criteria}}, so every dimension needs an entry in criteria")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """Value of each level, rising."""
        return tuple(level.value for level in self.levels)


@dataclass(frozen=True)
class Frame:
    """A template in the ids of one tokenizer.

    before, between, after: ids around image and prompt. lead: white space before the prompt, which byte-pair
    vocabularies keep with the word that follows. image_first: whether the image stands before the prompt.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    lead: str
    image_first: bool


@dataclass(frozen=True)
class Reading:
    """A rubric in the ids of one tokenizer.

    frame: the template, its `after` ending with the reads. positions: one per dimension, counted from the end of the
    sequence (-1 is the last). level_ids: one token per level.
    """

    frame: Frame
    positions: tuple[int, ...]
    level_ids: tuple[int, ...]


@dataclass(frozen=True)
class ThinkingReading:
    """The rubric's thinking part in the ids of one tokenizer; one entry a dimension.

    frames: up to the first token of the reasoning. closings: what is put behind every reasoning; the level is read
    after its last token. stop: the closing's first token, at which sampling ends. tails: how many tokens at the end of
    each frame are its own; what stands before them is one text in all frames.
    """

    frames: tuple[Frame, ...]
    closings: tuple[tuple[int, ...], ...]
    stop: int
    tails: tuple[int, ...]


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

    reads = [ids(text) for text in rubric.reads]
    frame = _frame(filled(rubric, rubric.template, rubric.dimensions), ids)
    positions, end = [], 0
    for read in reversed(reads):
        positions.append(end - 1)
        end -= len(read)
    return Reading(
        frame=replace(frame, after=(*frame.after, *(i for read in reads for i in read))),
        positions=tuple(reversed(positions)),
        level_ids=_level_ids(rubric, rubric.reads, ids, tokenizer.unk_token_id),
    )


def thinking_reading(rubric: Rubric, tokenizer: Any) -> ThinkingReading:
    """The rubric's thinking part in a tokenizer's ids.

    Raises RecipeError when the rubric has none, when the closing text and the score prefix melt into other tokens, or
    when a level is not the same single token as in the one-pass reads.
    """
    thinking = rubric.thinking
    if thinking is None:
        raise RecipeError(
            "this rubric has no `thinking` part, so it does not say how reasoning is asked for; add `thinking:` with "
            "template, close and reads to its rubric.json, or use a task that reads in one pass (reward_sft)."
        )

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return found

    close = ids(thinking.close)
    closings = [ids(thinking.close + read) for read in thinking.reads]
    if any(closing[: len(close)] != close for closing in closings):
        raise RecipeError("rubric: the end of thinking.close and the start of thinking.reads are one token in this "
                          "model's tokenizer; end the one or start the other with a line break.")  # fmt: skip
    after = [thinking.close + read for read in thinking.reads]
    levels = _level_ids(rubric, after, ids, tokenizer.unk_token_id)
    if levels != reading(rubric, tokenizer).level_ids:
        raise RecipeError("rubric: the levels are other tokens after thinking.reads than after the one-pass reads; let "
                          "both end alike, with or without a space.")  # fmt: skip
    frames = [_frame(filled(rubric, thinking.template, [name]), ids) for name in rubric.dimensions]
    if not all(frame.after for frame in frames):
        raise RecipeError("rubric: thinking.template ends with {image} or {prompt}; end it with the start of the turn "
                          "in which the model reasons.")  # fmt: skip
    return ThinkingReading(tuple(frames), tuple(map(tuple, closings)), close[0], _tails(frames))


def _tails(frames: Sequence[Frame]) -> tuple[int, ...]:
    endings = [frame.after for frame in frames]
    # a tail is one token at least, the one behind which reasoning begins
    alike = min(map(len, endings)) - 1
    while any(ending[:alike] != endings[0][:alike] for ending in endings):
        alike -= 1
    if len({(frame.before, frame.between, frame.lead) for frame in frames}) > 1:
        return tuple(1 for _ in frames)
    return tuple(len(ending) - alike for ending in endings)


def filled(rubric: Rubric, template: str, dimensions: Sequence[str]) -> str:
    """The template with names and criteria of the dimensions that it asks about."""
    several = len(dimensions) > 1
    criteria = "\n\n".join(
        f"{name}: {rubric.criteria[name].text}" if several else rubric.criteria[name].text
        for name in dimensions if name in rubric.criteria
    )  # fmt: skip
    return template.replace("{criteria}", criteria).replace("{dimension}", ", ".join(dimensions))


def _frame(template: str, ids: Callable[[str], list[int]]) -> Frame:
    # the groups are the white space before {prompt}; the one before {image} is empty
    before, lead_1, between, lead_2, after = re.split(r"(\s*)\{prompt\}|\{image\}", template)
    first = template.index("{image}") < template.index("{prompt}")
    return Frame(tuple(ids(before)), tuple(ids(between)), tuple(ids(after)), lead_1 or lead_2 or "", first)


def _level_ids(
    rubric: Rubric, reads: Sequence[str], ids: Callable[[str], list[int]], unknown: int | None
) -> tuple[int, ...]:
    found: list[int] = []
    wrong: list[str] = []
    for level in rubric.levels:
        after = set()
        for text in reads:
            read, whole = ids(text), ids(text + level.token)
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
