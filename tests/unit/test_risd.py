"""RISD and its trace cache, on-policy distillation, RewardDance: second formulations, interruptions, bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_scorer import COMPARISON, NAMES, pictures, write_reasoner

from rewardtune.build import build_task
from rewardtune.data.images import to_pil
from rewardtune.errors import DataError, RecipeError
from rewardtune.recipe.sections import TASKS
from rewardtune.scorer import traces
from rewardtune.scorer.model import load_scorer
from rewardtune.scorer.reasoning import Trace, load_reasoner
from rewardtune.scorer.rubric import load_rubric
from rewardtune.scorer.teacher import Teacher, conversation
from rewardtune.scorer.traces import Item, Row
from rewardtune.tasks.reward_dance import RewardDance
from rewardtune.tasks.reward_opd import RewardOpd
from rewardtune.tasks.reward_risd import RewardRisd
from rewardtune.types import Prompt


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reasoner(tmp_path_factory.mktemp("teacher"), layers=["full_attention"] * 2)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reasoner(tmp_path_factory.mktemp("student"), layers=["full_attention"])


def write_images(folder: Path, count: int, *, critique: bool = False, scored: bool = False) -> Path:
    rows = []
    for i, picture in enumerate(to_pil(pictures(count))):
        picture.save(folder / f"{i}.png")
        row: dict[str, Any] = {"group": f"g{i // 2}", "prompt": f"a dog {i // 2}", "image": f"{i}.png"}
        if scored:
            row["scores"] = dict.fromkeys(NAMES, 1.0 + i % 5)
        if critique and i % 2:
            row["critique"] = "the dog is missing"
        rows.append(row)
    path = folder / "images.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(task: str, **sections: Any) -> Any:
    train = {"steps": 2, "batch_size": 2}
    return build_task(TASKS[task].model_validate({"task": task, "train": train, **sections}), device="cpu")


def risd(student: Path, teacher: Path, images: Path, *, objective: Mapping[str, Any] | None = None,
         **options: Any) -> RewardRisd:  # fmt: skip
    return build("reward_risd", scorer={"model": str(student)}, teacher={"model": str(teacher), **options},
                 data={"images": str(images)}, objective=objective or {})  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- RISD


def test_the_loss_is_the_kl_to_the_reasoned_distributions(student: Path, teacher: Path, tmp_path: Path):
    made = risd(student, teacher, write_images(tmp_path, 4), traces=3, cache=str(tmp_path / "cache"))
    batch = made.batch(0, [0, 1])
    assert batch.teacher.shape == (2, 4, 3, 9)
    p = made.scorer.distribution(batch.images, batch.prompts)
    wanted = (batch.teacher * (batch.teacher.log() - p[:, :, None].log())).sum(-1).mean()
    torch.testing.assert_close(made.step(batch).loss, wanted, atol=1e-5, rtol=1e-4)
    # traces differ, so the teacher's distribution is not that of one of them
    assert (batch.teacher[:, :, 0] - batch.teacher[:, :, 1]).abs().max() > 1e-4


def test_the_cache_holds_what_the_teacher_says_of_these_pictures(student: Path, teacher: Path, tmp_path: Path):
    made = risd(student, teacher, write_images(tmp_path, 3), traces=1, cache=str(tmp_path / "cache"))
    batch = made.batch(0, [0])
    from rewardtune.scorer.reasoning import Question

    reasoner = load_reasoner(load_scorer(teacher))
    place = made.items.index((Path(made.items[0][0]).with_name(f"{_number(made, batch)}.png"), batch.prompts[0]))
    questions = [Question(0, batch.prompts[0], d) for d in range(4)]
    drawn = reasoner.sample(batch.images, questions, [(0, "risd/trace", place, d, 0) for d in range(4)])
    wanted = reasoner.read(batch.images, questions, drawn).logits.softmax(-1)
    torch.testing.assert_close(batch.teacher[0, :, 0], wanted.detach(), atol=1e-5, rtol=1e-4)


def _number(made: RewardRisd, batch: Any) -> int:
    from rewardtune.data.images import open_image, to_tensor

    shown = [to_tensor([open_image(path)])[0] for path, _ in made.items]
    return next(i for i, image in enumerate(shown) if torch.equal(image, batch.images[0]))


def test_drawn_live_the_traces_are_new_at_every_visit(student: Path, teacher: Path, tmp_path: Path):
    made = risd(student, teacher, write_images(tmp_path, 1), traces=1)
    first, second, again = made.batch(0, [0]), made.batch(1, [1]), made.batch(0, [0])
    assert torch.equal(first.teacher, again.teacher) and not torch.equal(first.teacher, second.teacher)


def test_without_reasoning_the_teacher_is_read_in_one_pass(student: Path, teacher: Path, tmp_path: Path):
    made = risd(student, teacher, write_images(tmp_path, 2), traces=0)
    batch = made.batch(0, [0, 1])
    wanted = load_scorer(teacher).distribution(batch.images, batch.prompts)
    torch.testing.assert_close(batch.teacher[:, :, 0], wanted, atol=1e-5, rtol=1e-4)


def test_the_controls_match_the_mean_or_add_labels(student: Path, teacher: Path, tmp_path: Path):
    images = write_images(tmp_path, 2, scored=True)
    mean = risd(student, teacher, images, traces=0, objective={"match": "mean"})
    batch = mean.batch(0, [0, 1])
    levels = mean.scorer.levels
    p = mean.scorer.distribution(batch.images, batch.prompts)
    wanted = (((p @ levels) - (batch.teacher[:, :, 0] @ levels)) / 4).square().mean()
    torch.testing.assert_close(mean.step(batch).loss, wanted, atol=1e-6, rtol=1e-4)
    both = risd(student, teacher, images, traces=0, objective={"labels": 0.5})
    plain = risd(student, teacher, images, traces=0)
    ratings = torch.tensor([1.0, 2.0])[[_number(both, replace(batch, images=[x])) for x in batch.images]]
    level = (levels[None] - ratings[:, None]).abs().argmin(1)
    supervised = -p[torch.arange(2)[:, None], torch.arange(4)[None], level[:, None]].log().mean()
    alone, beside = plain.step(plain.batch(0, [0, 1])).loss, both.step(both.batch(0, [0, 1])).loss
    torch.testing.assert_close(beside, alone + 0.5 * supervised, atol=1e-5, rtol=1e-4)


def test_the_student_sees_moved_and_noisy_views_of_what_the_teacher_judged(
    student: Path, teacher: Path, tmp_path: Path
):
    images, cache = write_images(tmp_path, 4), str(tmp_path / "cache")
    plain = risd(student, teacher, images, cache=cache).batch(0, [0, 1])
    noisy = risd(student, teacher, images, objective={"noise": 0.2}, cache=cache)
    seen, later = noisy.batch(0, [0, 1]), noisy.batch(0, [4, 5])  # 4 and 5 are another visit
    assert torch.equal(seen.teacher, plain.teacher)
    off = [(view - image).std().item() for view, image in zip(seen.images, plain.images, strict=True)]
    assert all(0 < x < 0.2 for x in off) and off[0] != off[1]
    assert all(torch.equal(a, b) for a, b in zip(seen.images, noisy.batch(0, [0, 1]).images, strict=True))
    assert not any(torch.equal(a, b) for a in seen.images for b in later.images)
    (moved,) = risd(student, teacher, images, objective={"shift": 0.1}, cache=cache).batch(0, [0]).images
    reach = round(0.1 * moved.shape[-1])
    border = torch.nn.functional.pad(plain.images[0], (reach,) * 4, mode="replicate")
    windows = border.unfold(1, moved.shape[1], 1).unfold(2, moved.shape[2], 1).movedim(0, 2).flatten(0, 1)
    assert any(torch.equal(moved, window) for window in windows)


def test_labels_that_are_not_there_cannot_be_used(student: Path, teacher: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"Leave objective\.labels out"):
        risd(student, teacher, write_images(tmp_path, 2), traces=0, objective={"labels": 1.0})


def with_rubric(scorer: Path, to: Path, **changes: Any) -> Path:
    """A copy of a scorer whose own rubric differs."""
    made = shutil.copytree(scorer, to)
    rubric = json.loads((made / "rubric.json").read_text())
    (made / "rubric.json").write_text(json.dumps({**rubric, **changes}))
    return made


def opd(student: Path, teacher: Path, images: Path, **options: Any) -> RewardOpd:
    return build("reward_opd", scorer={"model": str(student)}, teacher={"model": str(teacher), **options},
                 data={"images": str(images)})  # fmt: skip


VALUES = [{"token": str(1 + k), "value": 1.0 + k} for k in range(9)]
LETTERS = [{"token": "abcdefghi"[k], "value": 1 + k / 2} for k in range(9)]


@pytest.mark.parametrize("task", [risd, opd])
def test_teacher_and_student_must_share_dimensions_and_levels(
    student: Path, teacher: Path, tmp_path: Path, task: Callable[..., Any]
):
    images = write_images(tmp_path, 2)
    other = with_rubric(teacher, tmp_path / "values", levels=VALUES)
    with pytest.raises(RecipeError, match=r"the teacher's levels are \[1\.0, 2\.0.*student's \[1\.0, 1\.5"):
        task(student, other, images)
    other = with_rubric(teacher, tmp_path / "names", dimensions=[*NAMES[:3], "fun"])
    with pytest.raises(RecipeError, match=r"different rubrics: the teacher's dimensions are .*'fun'"):
        task(student, other, images)


@pytest.mark.parametrize("task", [risd, opd])
def test_a_teacher_is_read_with_its_own_rubric_only(
    student: Path, teacher: Path, tmp_path: Path, task: Callable[..., Any]
):
    other = with_rubric(teacher, tmp_path / "other", levels=LETTERS) / "rubric.json"
    with pytest.raises(RecipeError, match=r"teacher .* was made for another rubric: .* here a = 1, b = 1\.5"):
        task(student, teacher, write_images(tmp_path, 2), rubric=str(other))


def test_prompts_tokens_and_criteria_of_teacher_and_student_may_differ(
    student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Eq. 15 compares probabilities of levels, whatever they are called and whatever was asked before."""
    images, template = write_images(tmp_path, 2), json.loads((student / "rubric.json").read_text())["template"]

    def criteria(judges: str) -> dict[str, Any]:
        return {name: {"judges": judges, "anchors": {"5": "good", "1": "bad"}} for name in NAMES}

    letters = with_rubric(student, tmp_path / "letters", levels=LETTERS, template=f"Rate. {template}")
    made = risd(letters, teacher, images, traces=0)
    batch = made.batch(0, [0, 1])
    wanted = load_scorer(teacher).distribution(batch.images, batch.prompts)
    torch.testing.assert_close(batch.teacher[:, :, 0], wanted, atol=1e-5, rtol=1e-4)
    p = made.scorer.distribution(batch.images, batch.prompts)
    kl = (wanted * (wanted.log() - p.log())).sum(-1).mean()
    torch.testing.assert_close(made.step(batch).loss, kl, atol=1e-5, rtol=1e-4)
    # criteria that only one of them is told are no contradiction; other ones are said
    strict = with_rubric(teacher, tmp_path / "strict", criteria=criteria("faults"))
    risd(letters, strict, images, traces=0)
    assert "different criteria" not in capsys.readouterr().err
    told = with_rubric(student, tmp_path / "told", criteria=criteria("beauty"), template=template + "{criteria}")
    risd(told, strict, images, traces=0)
    assert "different criteria for alignment, realism, aesthetics, plausibility" in capsys.readouterr().err


def test_the_teacher_sees_pictures_in_its_own_bounds(student: Path, teacher: Path, tmp_path: Path):
    def fixed(folder: Path, to: Path) -> Path:
        made = shutil.copytree(folder, to)
        file = made / "preprocessor_config.json"
        size = {"shortest_edge": 64, "longest_edge": 4096}
        file.write_text(json.dumps({**json.loads(file.read_text()), "size": size}))
        return made

    wide, images = fixed(teacher, tmp_path / "wide"), write_images(tmp_path, 2)
    cache = str(tmp_path / "cache")
    made = risd(student, wide, images, traces=1, max_pixels=64, cache=cache)
    fine = risd(student, wide, images, traces=1, max_pixels=256, cache=str(tmp_path / "fine"))
    coarse, sharp = (task.judge([0, 1], [0, 1]).distributions for task in (made, fine))
    assert (coarse - sharp).abs().max() > 1e-4
    # 16 x 16 pixels at most: what the same teacher says whose own bounds these are
    plain = risd(student, teacher, images, traces=1, cache=str(tmp_path / "plain"))
    torch.testing.assert_close(sharp, plain.judge([0, 1], [0, 1]).distributions, atol=1e-6, rtol=0)
    # bounds are part of what was asked, but for books from before they could be set
    with pytest.raises(RecipeError, match=r"drawn for another question; pixels differ \(there \[64, 64\], here"):
        risd(student, wide, images, traces=1, max_pixels=256, cache=cache)
    book = Path(cache) / "book.json"
    book.write_text(json.dumps({k: v for k, v in json.loads(book.read_text()).items() if k != "pixels"}))
    again = risd(student, wide, images, traces=1, cache=cache).judge([0, 1], [0, 1])
    assert torch.equal(again.distributions, coarse)
    assert opd(student, wide, images, max_pixels=64).teacher.scorer.geometry.max_pixels == 64


# ---------------------------------------------------------------------------------------------------------- the cache


def items(folder: Path, count: int) -> list[Item]:
    return [(folder / f"{i}.png", Prompt(f"a dog {i // 2}")) for i in range(count)]


def say(places: Sequence[int], _: Sequence[Item]) -> list[tuple[int, Row]]:
    return [(p, Row([[f"trace {p}"]], [[True]], [[2]], [[[p / 10, 1 - p / 10]]])) for p in places]


def fill(folder: Path, pictures: list[Item], **options: Any) -> list[int]:
    asked: list[int] = []

    def counted(places: Sequence[int], some: Sequence[Item]) -> list[tuple[int, Row]]:
        asked.extend(places)
        return say(places, some)

    traces.fill(folder, pictures, counted, **{"asked": {"traces": 1}, "batch_size": 2, **options})
    return asked


def test_an_interrupted_cache_goes_on_where_it_was(tmp_path: Path):
    write_images(tmp_path, 6)
    cache, pictures = tmp_path / "cache", items(tmp_path, 6)

    def dies(places: Sequence[int], some: Sequence[Item]) -> list[tuple[int, Row]]:
        if 4 in places:
            raise KeyboardInterrupt
        return say(places, some)

    with pytest.raises(KeyboardInterrupt):
        traces.fill(cache, pictures, dies, asked={"traces": 1}, batch_size=2)
    journal = cache / "journal-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])  # torn while it was written
    with pytest.raises(DataError, match="lacks the teacher's judgement of 3 of 6 items, the first is item 3"):
        traces.distributions(cache, 6)
    assert fill(cache, pictures) == [3, 4, 5]
    found = traces.distributions(cache, 6)
    assert found[:, 0, 0, 0].tolist() == pytest.approx([p / 10 for p in range(6)])
    assert fill(cache, pictures) == []


def test_an_altered_line_is_drawn_again_and_the_packed_file_is_not_trusted(tmp_path: Path):
    write_images(tmp_path, 3)
    cache, pictures = tmp_path / "cache", items(tmp_path, 3)
    fill(cache, pictures)
    assert traces.distributions(cache, 3)[2, 0, 0, 0] == pytest.approx(0.2)
    journal = cache / "journal-0.jsonl"
    journal.write_text(journal.read_text().replace("0.2", "0.9"))
    with pytest.raises(DataError, match="the first is item 2"):
        traces.distributions(cache, 3)
    assert fill(cache, pictures) == [2]
    assert traces.distributions(cache, 3)[2, 0, 0, 0] == pytest.approx(0.2)


def test_a_damaged_packed_file_is_packed_again(tmp_path: Path):
    write_images(tmp_path, 2)
    fill(tmp_path / "cache", items(tmp_path, 2))
    whole = traces.distributions(tmp_path / "cache", 2)
    (tmp_path / "cache/distributions.safetensors").write_bytes(b"torn")
    assert torch.equal(traces.distributions(tmp_path / "cache", 2), whole)


@pytest.mark.parametrize("change", ["question", "picture"])
def test_a_cache_of_another_question_is_refused(tmp_path: Path, change: str):
    write_images(tmp_path, 2)
    fill(tmp_path / "cache", items(tmp_path, 2))
    if change == "picture":
        to_pil(pictures(1, seed=5))[0].save(tmp_path / "0.png")
    with pytest.raises(RecipeError, match=r"drawn for another question; (traces|pictures) differ"):
        fill(tmp_path / "cache", items(tmp_path, 2), asked={"traces": 4 if change == "question" else 1})


def test_a_teacher_that_was_moved_is_the_same_and_a_trained_one_is_another(
    student: Path, teacher: Path, tmp_path: Path
):
    images, cache = write_images(tmp_path, 2), str(tmp_path / "cache")
    drawn = risd(student, teacher, images, traces=1, cache=cache).batch(0, [0])
    moved = shutil.copytree(teacher, tmp_path / "moved")
    again = risd(student, moved, images, traces=1, cache=cache).batch(0, [0])
    assert torch.equal(again.teacher, drawn.teacher)
    weights = load_file(moved / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    save_file({**weights, name: weights[name] + 0.5}, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="drawn for another question; weights differ"):
        risd(student, moved, images, traces=1, cache=cache)


def test_a_rubric_that_learns_to_compare_keeps_its_judgements(student: Path, teacher: Path, tmp_path: Path):
    images, cache = write_images(tmp_path, 2), str(tmp_path / "cache")
    drawn = risd(student, teacher, images, traces=1, cache=cache).batch(0, [0])
    rubric = json.loads((teacher / "rubric.json").read_text())
    other = tmp_path / "rubric.json"
    other.write_text(json.dumps({**rubric, "comparison": COMPARISON}))
    again = risd(student, teacher, images, traces=1, cache=cache, rubric=str(other)).batch(0, [0])
    assert torch.equal(again.teacher, drawn.teacher)
    other.write_text(json.dumps({**rubric, "temperature": 2.0}))
    with pytest.raises(RecipeError, match="drawn for another question; rubric differ"):
        risd(student, teacher, images, traces=1, cache=cache, rubric=str(other))


def test_processes_share_the_work_and_read_each_others_journals(tmp_path: Path):
    write_images(tmp_path, 5)
    shares = [fill(tmp_path / "cache", items(tmp_path, 5), rank=rank, world=2) for rank in (0, 1)]
    assert shares == [[0, 2, 4], [1, 3]]
    assert traces.distributions(tmp_path / "cache", 5)[:, 0, 0, 0].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_unread_judgements_are_listed_and_too_many_refused(tmp_path: Path):
    write_images(tmp_path, 30)

    def forgetful(bad: set[int]) -> traces.Teacher:
        return lambda places, _: [
            (p, Row([["x", ""]] * 4, [[True, False]] * 4, [[3, 1]] * 4,
                    [[[0.5, 0.5], None if p in bad and d == 2 else [0.5, 0.5]] for d in range(4)],
                    [["", "the answer was cut off" if d == 2 else ""] for d in range(4)] if p in bad else []))
            for p in places
        ]  # fmt: skip

    pictures = items(tmp_path, 30)
    traces.fill(tmp_path / "a", pictures, forgetful({7, 9}), asked={}, batch_size=5)
    found = traces.distributions(tmp_path / "a", 30)
    assert found[7, 2, 1].isnan().all() and int(found.isnan().any(-1).sum()) == 2
    said = traces.report(tmp_path / "a", pictures, NAMES)
    # of the 240, the two that could not be read are no traces: they are neither empty nor cut off
    assert "238 traces of 2.0 tokens on average; 118 are empty and 118 were cut off at the limit" in said
    assert "2 of 240 judgements could not be read and are left out" in said
    assert "because the answer was cut off: 2 (item 7 (7.png) in aesthetics; item 9 (9.png) in aesthetics)" in said
    traces.fill(tmp_path / "b", pictures, forgetful(set(range(8))), asked={}, batch_size=5)
    said = traces.report(tmp_path / "b", pictures, NAMES)
    assert "item 4 (4.png) in aesthetics; and 3 more)" in said and "item 5" not in said
    traces.fill(tmp_path / "c", pictures, forgetful(set(range(13))), asked={}, batch_size=5)
    with pytest.raises(DataError, match="5% of the teacher's judgements could not be read, more than 5%"):
        traces.distributions(tmp_path / "c", 30)


def test_empty_and_endless_traces_are_judged_and_counted(
    student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The cache's own words against a count of what stands in its journal, whose traces are a tiny model's."""
    images, cache = write_images(tmp_path, 6), tmp_path / "cache"
    made = risd(student, teacher, images, traces=4, cache=str(cache), max_tokens=2)
    rows = [json.loads(line[9:]) for line in (cache / "journal-0.jsonl").read_text().splitlines()]
    texts = [text for row in rows for part in row["traces"] for text in part]
    ended = [end for row in rows for part in row["ended"] for end in part]
    empty, cut = texts.count(""), ended.count(False)
    assert len(texts) == 96 and empty > 0 and cut > 0
    mean = sum(count for row in rows for part in row["tokens"] for count in part) / 96
    said = f"96 traces of {mean:.1f} tokens on average; {empty} are empty and {cut} were cut off"
    assert said in capsys.readouterr().err
    # every one of them has a distribution, and the loss takes them all
    assert made.judge([0], list(range(6))).distributions.isfinite().all()


def test_traces_that_are_drawn_live_are_counted_at_every_step(student: Path, teacher: Path, tmp_path: Path):
    images, cache = write_images(tmp_path, 6), tmp_path / "cache"
    options = {"traces": 4, "max_tokens": 2}
    batch = risd(student, teacher, images, **options).batch(0, range(6))
    made = risd(student, teacher, images, **options)
    # the same pictures under the same places, as a cache would keep them
    shown = [made.items[_number(made, replace(batch, images=[image]))] for image in batch.images]
    scorer = load_scorer(teacher)
    judge = Teacher(scorer, load_reasoner(scorer), count=4, temperature=1.0, max_tokens=2, seed=0)
    traces.fill(cache, shown, judge.rows, asked={}, batch_size=2)
    rows = [json.loads(line[9:]) for line in (cache / "journal-0.jsonl").read_text().splitlines()]
    texts = [text for row in rows for part in row["traces"] for text in part]
    ended = [end for row in rows for part in row["ended"] for end in part]
    metrics = made.step(batch).metrics
    assert metrics["trace_empty"] == pytest.approx(texts.count("") / 96) and 0 < metrics["trace_empty"] < 1
    assert metrics["trace_ended"] == pytest.approx(sum(ended) / 96) and 0 < metrics["trace_ended"] < 1
    # what comes from a cache was counted when it was drawn
    cached = risd(student, teacher, images, traces=1, cache=str(tmp_path / "other"))
    assert "trace_empty" not in cached.step(cached.batch(0, [0])).metrics
    assert "trace_empty" not in (one := risd(student, teacher, images, traces=0)).step(one.batch(0, [0])).metrics


def start_and_kill(script: str, at: str) -> None:
    """Run a script and kill it, as -9 does, when it prints a line."""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == at:
                os.kill(process.pid, signal.SIGKILL)


def test_killed_while_caching_loses_the_batch_in_flight_at_most(student: Path, teacher: Path, tmp_path: Path):
    """A teacher in process writes the traces of a batch together, so the batch is what is in flight."""
    images, cache = write_images(tmp_path, 7), tmp_path / "cache"
    section = {"model": str(teacher), "traces": 1, "cache": str(cache), "batch_size": 3}
    start_and_kill(f"""
import time
from rewardtune.build import build_task
from rewardtune.recipe.sections import TASKS
from rewardtune.scorer import teacher

def rows(self, places, items, judge=teacher.Teacher.rows):
    if places[0] == 6:
        print("third batch", flush=True)
        time.sleep(60)
    return judge(self, places, items)

teacher.Teacher.rows = rows
build_task(TASKS["reward_risd"].model_validate({{
    "task": "reward_risd", "train": {{"steps": 1}}, "scorer": {{"model": {str(student)!r}}},
    "teacher": {section!r}, "data": {{"images": {str(images)!r}}},
}}), device="cpu")
""", "third batch")  # fmt: skip
    with pytest.raises(DataError, match="judgement of 1 of 7 items, the first is item 6"):
        traces.distributions(cache, 7)
    kept = (cache / "journal-0.jsonl").read_bytes()
    made = risd(student, teacher, images, **{name: value for name, value in section.items() if name != "model"})
    assert (cache / "journal-0.jsonl").read_bytes().startswith(kept)
    # what was drawn after the interruption is what would have been drawn without it
    whole = risd(student, teacher, images, traces=1, batch_size=3, cache=str(tmp_path / "other"))
    everything = list(range(7))
    found, wanted = (task.judge(everything, everything).distributions for task in (made, whole))
    assert torch.equal(found, wanted)


# ---------------------------------------------------------------------------------------------------------- OPD, dance


def test_opd_moves_each_token_by_the_difference_of_log_probabilities(student: Path, teacher: Path, tmp_path: Path):
    made: RewardOpd = build("reward_opd", scorer={"model": str(student)}, teacher={"model": str(teacher)},
                            data={"images": str(write_images(tmp_path, 2))}, objective={"samples": 2})  # fmt: skip
    with torch.no_grad():
        batch = made.batch(0, [0, 1])
    ours = made.student.read(batch.images, batch.questions, batch.traces, tokens=True)
    theirs = made.teacher.read(batch.images, batch.questions, batch.traces, tokens=True)
    total = 0.0
    for n in range(4):
        share = ours.logits[n].softmax(-1).cumsum(-1)
        level = int((share <= batch.drawn[n] * share[-1]).sum())
        pi = [*ours.log_probs[n][ours.mask[n]], ours.logits[n].log_softmax(-1)[level]]
        q = [*theirs.log_probs[n][theirs.mask[n]], theirs.logits[n].log_softmax(-1)[level]]
        total = total - sum((float((b - a).detach())) * a for a, b in zip(pi, q, strict=True)) / len(pi) / 4
    output = made.step(batch)
    torch.testing.assert_close(output.loss, total, atol=1e-5, rtol=1e-4)
    weight = made.student.scorer.model.get_input_embeddings().weight
    a, b = (torch.autograd.grad(x, weight)[0] for x in (output.loss, total))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_opd_counts_the_traces_that_are_empty_and_that_end(student: Path, teacher: Path, tmp_path: Path):
    made = build("reward_opd", scorer={"model": str(student)}, teacher={"model": str(teacher)},
                 data={"images": str(write_images(tmp_path, 2))}, objective={"samples": 4})  # fmt: skip
    batch = made.batch(0, [0, 1])
    line_break = tuple(made.student.scorer.tokenizer.encode("\n", add_special_tokens=False))
    # one trace is nothing, one is white space, and two of the eight were cut off
    given = [Trace((), True), Trace(line_break, True), *[Trace((9, 10), i > 1) for i in range(6)]]
    with torch.no_grad():
        teacher_read = made.teacher.read(batch.images, batch.questions, given, tokens=True)
    metrics = made.step(replace(batch, traces=given, teacher=teacher_read.log_probs)).metrics
    assert metrics["trace_empty"] == 0.25 and metrics["trace_ended"] == 0.75 and metrics["trace_tokens"] == 13 / 8


def test_opd_of_oneself_has_nothing_to_learn(student: Path, tmp_path: Path):
    made = build("reward_opd", scorer={"model": str(student)}, teacher={"model": str(student)},
                 data={"images": str(write_images(tmp_path, 2))})  # fmt: skip
    output = made.step(made.batch(0, [0]))
    assert abs(float(output.loss.detach())) < 1e-5 and abs(output.metrics["reverse_kl"]) < 1e-5


def test_dance_trains_the_score_before_the_explanation(student: Path, tmp_path: Path):
    images = write_images(tmp_path, 4, critique=True, scored=True)
    made: RewardDance = build("reward_dance", scorer={"model": str(student)}, data={"records": str(images)})
    batch = [made.rows[0], made.rows[1]]
    output = made.step(batch)
    from rewardtune.data.images import open_image, to_tensor
    from rewardtune.scorer.patches import patchify

    scorer = made.scorer
    shown = [to_tensor([open_image(row.image)])[0] for row in batch]
    # the explanation stands behind the reads, so they are those of the one-pass scorer
    p = scorer.distribution(shown, [row.prompt for row in batch])
    scored = -(torch.stack([row.target for row in batch]) * p.log()).sum(-1).mean()
    assert output.metrics["score_loss"] == pytest.approx(float(scored.detach()), abs=1e-4)
    ids = scorer.tokens(scorer.reading.frame, batch[1].prompt, 4)
    words = [*scorer.tokenizer.encode("\nthe dog is missing", add_special_tokens=False), scorer.tokenizer.eos_token_id]
    rows, grid = patchify([shown[1]], scorer.geometry)
    whole = torch.tensor([[*ids, *words]])
    logits = scorer.model(
        input_ids=whole, mm_token_type_ids=(whole == scorer.image_token).int(), pixel_values=rows,
        image_grid_thw=grid, use_cache=False,
    ).logits[0]  # fmt: skip
    each = [-float(logits[len(ids) - 1 + k].log_softmax(-1)[w].detach()) for k, w in enumerate(words)]
    assert output.metrics["explanation_loss"] == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_dance_without_any_critique_is_refused(student: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no rated picture of the records has a `critique`"):
        build("reward_dance", scorer={"model": str(student)},
              data={"records": str(write_images(tmp_path, 2, scored=True))})  # fmt: skip


# ------------------------------------------------------------------------------------------------ a teacher on a server


class Served(BaseHTTPRequestHandler):
    """Answers as vLLM does: a trace, then the levels' log-probabilities where the assistant's message is continued."""

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.asked.append(body)
        if server.hold and "a dog 1" in json.dumps(body["messages"]):
            server.held.set()
            server.let_go.wait(60)
        says = "once <think> more" if server.odd and server.odd in json.dumps(body["messages"]) else server.says
        message: dict[str, Any] = {"role": "assistant", "content": says}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        if body["messages"][-1]["role"] == "assistant":
            dimension = [name for name in NAMES if body["messages"][-1]["content"].endswith(f"{name}:")]
            peak = NAMES.index(dimension[0])
            shares = [0.6 if k == peak else 0.05 for k in range(9)]
            top = [{"token": str(k + 1), "logprob": math.log(p), "bytes": None} for k, p in enumerate(shares)]
            choice |= {"message": {**message, "content": str(peak + 1)}, "finish_reason": "length",
                       "logprobs": {"content": [{**top[peak], "top_logprobs": top}]}}  # fmt: skip
        usage = {"completion_tokens": 5, "prompt_tokens": 9, "total_tokens": 14}
        answer = {"id": "x", "object": "chat.completion", "model": "teacher", "choices": [choice], "usage": usage}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("no_proxy", "*")
    httpd: Any = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    httpd.daemon_threads = True
    httpd.asked, httpd.says, httpd.odd, httpd.hold = [], "it has a dog<|im_end|>", None, False
    httpd.held, httpd.let_go = threading.Event(), threading.Event()
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.let_go.set()
    httpd.shutdown()
    httpd.server_close()


def from_server(served: Any, student: Path, images: Path, cache: Path, **options: Any) -> dict[str, Any]:
    """Sections of a recipe with a teacher on the server."""
    url = f"http://127.0.0.1:{served.server_address[1]}/v1"
    teacher = {"model": "teacher", "server": {"url": url, **options.pop("server", {})}, "cache": str(cache),
               "rubric": str(student / "rubric.json"), **options}  # fmt: skip
    return {"scorer": {"model": str(student)}, "data": {"images": str(images)}, "teacher": teacher}


def test_a_teacher_on_a_server_fills_the_cache(student: Path, served: Any, tmp_path: Path):
    images, cache = write_images(tmp_path, 2), tmp_path / "cache"
    made = build("reward_risd", **from_server(served, student, images, cache, traces=2))
    batch = made.batch(0, [0, 1])
    assert batch.teacher.shape == (2, 4, 2, 9)
    assert batch.teacher.argmax(-1)[0, :, 0].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(batch.teacher[0, 2, 1, 2], torch.tensor(0.6))
    first = next(body for body in served.asked if body["messages"][-1]["role"] == "user")
    text = [part["text"] for part in first["messages"][0]["content"] if part["type"] == "text"]
    assert text in ([" a dog 0 rate alignment"], [" a dog 0 rate realism"], [" a dog 0 rate aesthetics"],
                    [" a dog 0 rate plausibility"])  # fmt: skip
    row = json.loads((cache / "journal-0.jsonl").read_text().splitlines()[0][9:])
    assert row["traces"][0] == ["it has a dog"] * 2 and row["tokens"][0] == [5, 5]


def test_an_empty_trace_of_a_served_teacher_is_a_judgement_too(
    student: Path, served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    served.says = "<|im_end|>"
    images, cache = write_images(tmp_path, 2), tmp_path / "cache"
    made = build("reward_risd", **from_server(served, student, images, cache, traces=2))
    assert made.batch(0, [0, 1]).teacher.isfinite().all()
    assert "16 traces of 5.0 tokens on average; 16 are empty and 0 were cut off" in capsys.readouterr().err


def test_what_a_server_could_not_say_is_named_with_its_reason(
    student: Path, served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    served.says = "once <think> more"
    images = write_images(tmp_path, 2)
    with pytest.raises(DataError, match="more than the 50% allowed: the trace writes <think> again"):
        build("reward_risd", **from_server(served, student, images, tmp_path / "all"))
    # one picture of twelve: few enough to go on without it
    served.says, served.odd = "it has a dog<|im_end|>", "a dog 3 rate realism"
    images = write_images(tmp_path, 12)
    made = build("reward_risd", **from_server(served, student, images, tmp_path / "some"))
    assert made.judge([0], [6]).distributions.isnan().any(-1).flatten().tolist() == [False, True, False, False]
    said = capsys.readouterr().err
    assert "2 of 48 judgements could not be read and are left out" in said
    names = "item 6 (6.png) in realism; item 7 (7.png) in realism"
    assert f"because the trace writes <think> again: 2 ({names})" in said


def test_killed_while_a_server_answers_loses_the_pictures_in_flight_at_most(student: Path, served: Any, tmp_path: Path):
    """Of a batch of six pictures two are judged when the third has to wait: they are on disk."""
    images, cache = write_images(tmp_path, 6), tmp_path / "cache"
    served.hold = True
    sections = from_server(served, student, images, cache, traces=1, batch_size=6, server={"concurrency": 1})
    code = f"""
from rewardtune.build import build_task
from rewardtune.recipe.sections import TASKS
recipe = {{"task": "reward_risd", "train": {{"steps": 1}}, **{sections!r}}}
build_task(TASKS["reward_risd"].model_validate(recipe), device="cpu")
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert served.held.wait(120)
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="judgement of 4 of 6 items, the first is item 2"):
        traces.distributions(cache, 6)
    served.hold, before = False, len(served.asked)
    served.let_go.set()
    build("reward_risd", **sections)
    # a trace and a score for each dimension of the four pictures that are lacking
    assert len(served.asked) - before == 4 * 4 * 2
    assert len(traces.distributions(cache, 6)) == 6


def test_a_served_teacher_without_a_cache_is_refused(student: Path):
    with pytest.raises(ValueError, match="needs `cache`"):
        TASKS["reward_risd"].model_validate({
            "task": "reward_risd", "scorer": {"model": str(student)}, "train": {"steps": 1}, "data": {"images": "x"},
            "teacher": {"model": "t", "server": {"url": "http://localhost/v1"}},
        })  # fmt: skip


def test_the_shipped_rubric_can_be_asked_of_a_server():
    rubric = load_rubric()
    asked = conversation(rubric)
    before, after = asked.question("a {image} of a dog", 1)
    assert before == "" and "a {image} of a dog" in after and rubric.criteria["realism"].judges in after
    assert rubric.criteria["alignment"].judges not in after and "<|" not in before + after + str(asked.system)
