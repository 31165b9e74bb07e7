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
SLOTS = ("image", "prompt")
PAIR_SLOTS = ("image", "reference", "prompt")
TURN = re.compile(r"<\|im_start\|>(system|user)\n?(.*?)<\|im_end\|>", re.DOTALL)
SHOWN = 40
"""Characters that a message shows of a text which differs (ours)."""
TOUCHING = re.compile(r"\{(image|reference)\}(\{prompt\})?\{(image|reference)\}")


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


class Comparison(BaseModel):
    """How it is asked whether a picture is better than another one of the same prompt, in one dimension."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    template: str
    """Text before the answer: `{image}` (the candidate), `{reference}` (the other picture) and `{prompt}` once each,
    `{dimension}` and `{criteria}` where wanted."""
    yes: Annotated[str, Field(min_length=1)] = "yes"
    """The answer that the candidate is better."""
    no: Annotated[str, Field(min_length=1)] = "no"


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
    """Logits of the levels are divided by this."""
    thinking: Thinking | None = None
    """For models that reason before they score; a rubric without it is read in one pass only."""
    comparison: Comparison | None = None
    """For models that say which of two pictures is better."""

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
        if self.comparison is not None:
            templates["comparison.template"] = self.comparison.template
            if TOUCHING.search(self.comparison.template):
                raise ValueError("comparison.template needs text between {image} and {reference}: pictures that touch "
                                 "are taken for one")  # fmt: skip
        if self.thinking is not None:
            templates["thinking.template"] = self.thinking.template
            if len(self.thinking.reads) != len(self.dimensions) or any(not read for read in self.thinking.reads):
                raise ValueError("thinking.reads needs one text for each dimension, none of them empty")
        for name, template in templates.items():
            for slot in PAIR_SLOTS if name == "comparison.template" else SLOTS:
                if template.count(f"{{{slot}}}") != 1:
                    raise ValueError(f"{name} must hold {{{slot}}} exactly once")
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

    slots: `image`, `prompt` and, where two pictures are compared, `reference`, in the order in which they stand.
    pieces: ids around them, one piece more. lead: white space before the prompt, which byte-pair vocabularies keep with
    the word that follows.
    """

    slots: tuple[str, ...]
    pieces: tuple[tuple[int, ...], ...]
    lead: str

    @property
    def after(self) -> tuple[int, ...]:
        return self.pieces[-1]


@dataclass(frozen=True)
class Reading:
    """A rubric in the ids of one tokenizer.

    frame: the template, its last piece ending with the reads. positions: one per dimension, counted from the end of the
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


@dataclass(frozen=True)
class ComparisonReading:
    """The rubric's comparison part in the ids of one tokenizer.

    frames: up to the answer, one a dimension. answers: the tokens of yes and no, one of which stands next.
    """

    frames: tuple[Frame, ...]
    answers: tuple[int, int]


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


def differences(trained: Rubric, asked: Rubric) -> list[str]:
    """What an answer hangs on and is not the same in two rubrics, in words; empty where a scorer that was trained with
    the one may be read with the other.

    That leaves out what only bounds or scales: the temperature, which calibrates, and the reasoning's length. A part
    that only one of them has (`thinking`, `comparison`) contradicts nothing.
    """
    found = []
    if trained.dimensions != asked.dimensions:
        theirs, ours = (", ".join(rubric.dimensions) for rubric in (trained, asked))
        found.append(f"the dimensions (trained with {theirs}; here {ours})")
    if trained.levels != asked.levels:
        found.append(f"the levels (trained with {_said(trained.levels)}; here {_said(asked.levels)})")
    for name in ("template", "reads", "thinking.template", "thinking.close", "thinking.reads", "comparison.template",
                 "comparison.yes", "comparison.no"):  # fmt: skip
        one, other = _text(trained, name), _text(asked, name)
        if one is not None and other is not None and one != other:
            alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
            start = max(0, len([*alike]) - 15)
            found.append(f"{name} (trained with {one[start:][:SHOWN]!r}; here {other[start:][:SHOWN]!r})")
    if any("{criteria}" in (_text(rubric, name) or "") for rubric in (trained, asked) for name in
           ("template", "thinking.template", "comparison.template")):  # fmt: skip
        both = [name for name in trained.dimensions if name in asked.dimensions]
        odd = [name for name in both if trained.criteria.get(name) != asked.criteria.get(name)]
        found += [f"the criteria of {', '.join(odd)}"] if odd else []
    return found


def _said(levels: Sequence[Level]) -> str:
    return ", ".join(f"{level.token} = {level.value:g}" for level in levels)


def _text(rubric: Rubric, name: str) -> str | None:
    """A part of a rubric as text; None where there is none."""
    found: Any = rubric
    for part in name.split("."):
        found = getattr(found, part, None)
    return " | ".join(found) if isinstance(found, tuple) else found


def save_rubric(rubric: Rubric, folder: Path) -> None:
    """Write `rubric.json` into a checkpoint's folder."""
    (folder / FILE).write_text(json.dumps(rubric.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")


def reading(rubric: Rubric, tokenizer: Any) -> Reading:
    """The rubric in a tokenizer's ids.

    Every level must be one token of its own after every read, as the model would write it. Raises RecipeError that
    names the levels that are not, which half points written "3.5" are not in Qwen's vocabularies.
    """
    ids = _encoder(tokenizer)
    reads = [ids(text) for text in rubric.reads]
    frame = _frame(filled(rubric, rubric.template, rubric.dimensions), ids)
    positions, end = [], 0
    for read in reversed(reads):
        positions.append(end - 1)
        end -= len(read)
    return Reading(
        frame=replace(frame, pieces=(*frame.pieces[:-1], (*frame.after, *(i for read in reads for i in read)))),
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
    ids = _encoder(tokenizer)
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


def comparison_reading(rubric: Rubric, tokenizer: Any) -> ComparisonReading:
    """The rubric's comparison part in a tokenizer's ids.

    Raises RecipeError when the rubric has none, or when yes or no is not one token of its own where the answer stands.
    """
    asked = rubric.comparison
    if asked is None:
        raise RecipeError(
            "this rubric has no `comparison` part, so it does not say how two pictures are compared; add `comparison` "
            "with template, yes and no to its rubric.json (the shipped rewardtune/scorer/rubric.json has one), or set "
            "objective.form to pointwise."
        )
    ids = _encoder(tokenizer)
    texts = [filled(rubric, asked.template, [name]) for name in rubric.dimensions]
    frames = [_frame(text, ids, PAIR_SLOTS) for text in texts]
    if not all(frame.after for frame in frames):
        raise RecipeError("rubric: comparison.template ends with {image}, {reference} or {prompt}; end it with the "
                          "start of the turn in which the model answers.")  # fmt: skip
    endings = [re.split(r"\{(?:image|reference|prompt)\}", text)[-1] for text in texts]
    yes, no = (single_token(answer, endings, ids, tokenizer.unk_token_id) for answer in (asked.yes, asked.no))
    if yes is None or no is None or yes == no:
        wrong = " and ".join(repr(a) for a, token in ((asked.yes, yes), (asked.no, no)) if token is None)
        found = f"{wrong} is not one token" if wrong else f"{asked.yes!r} and {asked.no!r} are the same token"
        raise RecipeError(
            f"rubric: where the answer of `comparison` stands, {found} in this model's tokenizer. Take a single word "
            "or letter for each of comparison.yes and comparison.no and explain them in comparison.template."
        )
    return ComparisonReading(tuple(frames), (yes, no))


def _tails(frames: Sequence[Frame]) -> tuple[int, ...]:
    endings = [frame.after for frame in frames]
    # a tail is one token at least, the one behind which reasoning begins
    alike = min(map(len, endings)) - 1
    while any(ending[:alike] != endings[0][:alike] for ending in endings):
        alike -= 1
    if len({(frame.pieces[:-1], frame.lead) for frame in frames}) > 1:
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


def chat(template: str, *, name: str) -> tuple[str | None, str]:
    """A ChatML template as a server is asked it: text of the system turn, None without one, and of the user turn.

    The user turn keeps its slots. name: of the template, for the error. Raises RecipeError for other templates.
    """
    turns = TURN.findall(template)
    if [role for role, _ in turns] not in (["user"], ["system", "user"]) or "{image}" not in turns[-1][1]:
        raise RecipeError(
            f"this rubric cannot be asked of a server: {name} must be ChatML, an optional system turn and one user "
            "turn with {image}, each from <|im_start|> to <|im_end|>."
        )
    return (turns[0][1] if len(turns) == 2 else None), turns[-1][1]


def around_image(text: str, prompt: str) -> tuple[str, str]:
    """Text before and after {image}, with the prompt in its slot. A server's own chat template marks the image."""
    before, after = re.split(r"(?:<\|vision_start\|>)?\{image\}(?:<\|vision_end\|>)?", text)
    return before.replace("{prompt}", prompt), after.replace("{prompt}", prompt)


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _frame(template: str, ids: Callable[[str], list[int]], slots: Sequence[str] = SLOTS) -> Frame:
    # white space before {prompt} is taken off its piece and kept as the lead
    marks = [*re.finditer(rf"(\s*)\{{(prompt)\}}|\{{({'|'.join(slots)})\}}", template)]
    ends = [0, *(mark.end() for mark in marks)]
    texts = [template[end : mark.start()] for end, mark in zip(ends, marks, strict=False)] + [template[ends[-1] :]]
    lead = next((mark[1] for mark in marks if mark[2]), "")
    return Frame(tuple(mark[2] or mark[3] for mark in marks), tuple(tuple(ids(text)) for text in texts), lead)


def single_token(token: str, texts: Sequence[str], ids: Callable[[str], list[int]], unknown: int | None) -> int | None:
    """The one token that a text is behind each of these, or None where it is several, another, or unknown."""
    found = set()
    for text in texts:
        before, whole = ids(text), ids(text + token)
        single = len(whole) == len(before) + 1 and whole[:-1] == before and whole[-1] != unknown
        found.add(whole[-1] if single else None)
    return found.pop() if len(found) == 1 else None


def _level_ids(
    rubric: Rubric, reads: Sequence[str], ids: Callable[[str], list[int]], unknown: int | None
) -> tuple[int, ...]:
    found = {level: single_token(level.token, reads, ids, unknown) for level in rubric.levels}
    wrong = [f"{level.token!r} (value {level.value:g})" for level, token in found.items() if token is None]
    if wrong:
        raise RecipeError(
            f"rubric: these levels are not one token after every read in this model's tokenizer: {', '.join(wrong)}. "
            "Stand single digits, letters or words for the levels and explain them in the template."
        )
    if len(set(found.values())) != len(found):
        raise RecipeError("rubric: two levels are the same token in this model's tokenizer; every level needs its own.")
    return tuple(token for token in found.values() if token is not None)
