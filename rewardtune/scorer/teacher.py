"""Who judges for a student: a reasoning scorer, a scorer that reads in one pass, or a server; as rows for the trace
cache, or live. Built from a recipe's `teacher` section by `build_reward_risd`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewardtune.data.images import open_image, read_tensors
from rewardtune.errors import RecipeError
from rewardtune.recipe.sections import TeacherSection
from rewardtune.scorer import traces
from rewardtune.scorer.model import Scorer, load_scorer
from rewardtune.scorer.reasoning import Reasoner, load_reasoner
from rewardtune.scorer.rubric import Rubric, around_image, chat, filled, load_rubric
from rewardtune.scorer.server import Conversation, Judgement, ServerJudge
from rewardtune.scorer.traces import Item, Judged, Row
from rewardtune.serving.connection import Unscorable
from rewardtune.training import runtime


@dataclass(frozen=True)
class Teacher:
    """A frozen scorer. reasoner: the same, asked to think; None reads it in one pass. count: traces per judgement."""

    scorer: Scorer
    reasoner: Reasoner | None
    count: int
    temperature: float
    max_tokens: int | None
    seed: int

    @torch.no_grad()
    def rows(self, places: Sequence[int], items: Sequence[Item]) -> list[tuple[int, Row]]:
        """Each item's place and what the journal holds of it; the randomness is keyed by the place. The traces of all
        are written together, so their rows are there together."""
        images = read_tensors((path for path, _ in items), device=self.scorer.device)
        prompts = [prompt for _, prompt in items]
        count = len(self.scorer.dimensions)
        if self.reasoner is None:
            found = self.scorer.distribution(images, prompts).float().cpu()
            empty: list[list[Any]] = [[] for _ in range(count)]
            read = (Row(empty, empty, empty, [[p.tolist()] for p in row]) for row in found)
            return list(zip(places, read, strict=True))
        drawn, shares = self.reasoner.every_dimension(
            images, prompts, traces=self.count, stream=(self.seed, "risd/trace"), places=places,
            temperature=self.temperature, max_tokens=self.max_tokens,
        )  # fmt: skip

        def by_item(values: Sequence[Any]) -> list[list[list[Any]]]:
            rows = [list(values[k : k + self.count]) for k in range(0, len(values), self.count)]
            return [rows[k : k + count] for k in range(0, len(rows), count)]

        parts = [by_item(v) for v in ([self.reasoner.text(t) for t in drawn], [t.ended for t in drawn],
                                      [len(t.ids) for t in drawn])]  # fmt: skip
        rows = (Row(*row) for row in zip(*parts, shares.float().cpu().tolist(), strict=True))
        return list(zip(places, rows, strict=True))


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher behind a server; the rubric's ChatML template is taken apart into messages."""

    judge: ServerJudge
    rubric: Rubric
    count: int
    seed: int

    def rows(self, places: Sequence[int], items: Sequence[Item]) -> Iterator[tuple[int, Row]]:
        """An item's place and what the journal holds of it, as soon as all answers about the item are there. The
        randomness is keyed by the item's content."""
        count = len(self.rubric.dimensions)
        asked = [(open_image(path), str(prompt), d) for path, prompt in items for d in range(count)]
        said: dict[int, dict[int, list[Judgement | Unscorable]]] = {}
        for number, answers in self.judge.judge_each(asked, traces=self.count, seed=self.seed):
            item, dimension = divmod(number, count)
            said.setdefault(item, {})[dimension] = answers
            if len(said[item]) == count:
                parts = said.pop(item)
                yield places[item], self._row([parts[d] for d in range(count)])

    def _row(self, answers: Sequence[Sequence[Judgement | Unscorable]]) -> Row:
        known = [[a if isinstance(a, Judgement) else None for a in part] for part in answers]
        lost = [[a.reason if isinstance(a, Unscorable) else "" for a in part] for part in answers]
        return Row(
            [[a.trace if a else "" for a in part] for part in known],
            [[bool(a and a.ended) for a in part] for part in known],
            [[(a.tokens or 0) if a else 0 for a in part] for part in known],
            [[self._tempered(a.probabilities) if a else None for a in part] for part in known],
            lost if any(reason for part in lost for reason in part) else [],
        )

    def _tempered(self, shares: Sequence[float]) -> list[float]:
        """The server gives probabilities at temperature 1."""
        raised = [share ** (1 / self.rubric.temperature) for share in shares]
        return [share / sum(raised) for share in raised]


def conversation(rubric: Rubric) -> Conversation:
    """The rubric's thinking part as a server is asked it. Raises RecipeError for a template that is not ChatML."""
    thinking = rubric.thinking
    if thinking is None:
        raise RecipeError("the teacher's rubric has no `thinking` part, so it does not say how reasoning is asked for.")
    system, asked = chat(thinking.template, name="thinking.template")

    def question(prompt: str, dimension: int) -> tuple[str, str]:
        return around_image(filled(rubric, asked, [rubric.dimensions[dimension]]), prompt)

    tokens = tuple(level.token for level in rubric.levels)
    return Conversation(question, thinking.close, thinking.reads, tokens, system)


def judgements(
    section: TeacherSection, *, items: Sequence[Item], student: Rubric, seed: int, device: str
) -> Callable[[Sequence[int], Sequence[int]], Judged]:
    """The teacher's judgements of items: from the cache, which is filled first, or drawn live.

    Raises RecipeError when teacher and student do not have the same dimensions and levels.
    """
    teacher: Teacher | ServedTeacher
    if section.server is not None:
        rubric = load_rubric(section.rubric)
        check_same(rubric, student)
        thinking = conversation(rubric)
        assert rubric.thinking is not None
        most = section.max_tokens or rubric.thinking.max_tokens
        server = ServerJudge(
            model=section.model, thinking=thinking, temperature=section.temperature, max_tokens=most,
            # the cache counts over all items, where a few bad ones in a row are no sign yet
            unscorable_share=0.5, **section.server.model_dump(),
        )  # fmt: skip
        teacher = ServedTeacher(server, rubric, section.traces, seed)
        weights, pixels = f"{section.model} at {section.server.url}", None
    else:
        scorer = load_teacher(section, student=student, device=device)
        rubric = scorer.rubric
        reasoner = load_reasoner(scorer) if section.traces else None
        teacher = Teacher(scorer, reasoner, section.traces, section.temperature, section.max_tokens, seed)
        weights, pixels = _fingerprint(scorer), [scorer.geometry.min_pixels, scorer.geometry.max_pixels]
    if not section.cache:
        return lambda indices, chosen: _judged(teacher.rows(indices, [items[i] for i in chosen]))
    # how a rubric compares pictures has no part in a judgement of one
    asked = {"teacher": section.model, "weights": weights, "pixels": pixels, "traces": section.traces,
             "temperature": section.temperature, "max_tokens": section.max_tokens, "seed": seed,
             "rubric": json.loads(rubric.model_dump_json(exclude={"comparison"}))}  # fmt: skip
    folder = Path(section.cache)
    rank, world = runtime.process()
    traces.fill(folder, items, teacher.rows, asked=asked, batch_size=section.batch_size, rank=rank, world=world)
    if world > 1:
        torch.distributed.barrier()
    found = traces.distributions(folder, len(items))
    if rank == 0 and (said := traces.report(folder, items, rubric.dimensions)):
        print(said, file=sys.stderr)
    return lambda indices, chosen: Judged(found[list(chosen)])


def load_teacher(section: TeacherSection, *, student: Rubric, device: str) -> Scorer:
    """The frozen scorer of a recipe, in this process. Raises RecipeError when it is to be read with another rubric than
    it was trained with, or when it and the student do not have the same dimensions and levels."""
    scorer = load_scorer(
        section.model, what="teacher", revision=section.revision, rubric=section.rubric, min_pixels=section.min_pixels,
        max_pixels=section.max_pixels, dtype=getattr(torch, section.dtype), device=device,
    )  # fmt: skip
    check_same(scorer.rubric, student)
    return scorer


def check_same(teacher: Rubric, student: Rubric) -> None:
    """Raises RecipeError when a distribution of one rubric means nothing in the other: other dimensions, or levels of
    other values.

    All else may differ. Prompts do by the method: the teacher is asked to reason, the student is not, and sees picture,
    prompt and dimension alone (Z-Reward, section 5). Tokens may, since Eq. 15 compares probabilities of levels, and so
    may the criteria: a student can do without them in its prompt, and learns the teacher's reading whatever it is told.
    Where it is told another one, that is said on standard error.
    """
    for what in ("dimensions", "values"):
        theirs, ours = getattr(teacher, what), getattr(student, what)
        if theirs != ours:
            name = "levels" if what == "values" else what
            raise RecipeError(
                f"teacher and student have different rubrics: the teacher's {name} are {list(theirs)}, the student's "
                f"{list(ours)}. Give both the same with teacher.rubric or scorer.rubric."
            )
    told = [name for name in student.criteria if "{criteria}" in student.template]
    other = [name for name in told if name in teacher.criteria and teacher.criteria[name] != student.criteria[name]]
    if other and runtime.process()[0] == 0:
        print(f"teacher and student have different criteria for {', '.join(other)}: the student learns to judge by the "
              "teacher's, whatever its own prompt says.", file=sys.stderr)  # fmt: skip


def _judged(said: Iterable[tuple[int, Row]]) -> Judged:
    rows = [row for _, row in said]
    return Judged(torch.tensor([row.distributions for row in rows]), traces.figures(rows))


def _fingerprint(scorer: Scorer) -> str:
    """A digest of the weights: a retrained teacher under the old name is another teacher."""
    total = hashlib.sha256()
    for name, value in scorer.model.state_dict().items():
        total.update(f"{name} {tuple(value.shape)} {float(value.double().sum()):.17g}".encode())
    return total.hexdigest()
