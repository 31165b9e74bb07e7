"""`make table`'s script: what it runs and in which order, a row's test on real weights, and what its page says."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewardtune.recipe.file import load_recipe

SCRIPTS = Path(__file__).parents[2] / "dev/pocket"
FEW = ["--labelled", "3", "--unlabelled", "3", "--development", "2", "--test", "8"]
RISD, GDSO, GRPO, SFT = "student-risd", "teacher-gdso", "teacher-grpo", "teacher-sft"
STUDENT = {"scorer.model": "pocket:student-base"}
JUDGEMENTS = "build/pocket/judgements/"
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "risd-sft-teacher": (RISD, {"teacher.traces": 0}),
    "risd-mean": (RISD, {"objective.match": "mean"}),
    "risd-labels": (RISD, {"objective.labels": 1.0, "data.images": JUDGEMENTS + "labelled.jsonl"}),
    "risd-labels-all": (RISD, {"objective.labels": 1.0, "data.images": JUDGEMENTS + "mixed.jsonl"}),
    "risd-k1": (RISD, {"teacher.traces": 1, "data.images": JUDGEMENTS + "few.jsonl"}),
    "risd-k4": (RISD, {"teacher.traces": 4, "data.images": JUDGEMENTS + "few.jsonl"}),
    "risd-k8": (RISD, {"teacher.traces": 8, "data.images": JUDGEMENTS + "few.jsonl"}),
    "gdso-no-policy": (GDSO, {"objective.policy": 0.0, **STUDENT}),
    "gdso-parsed": (GDSO, {"objective.reward": "parsed", **STUDENT}),
    "grpo-parsed": (GRPO, {"objective.reward": "parsed", **STUDENT}),
    "gdso-soft": (GDSO, {"objective.target": "histogram", "data.records": JUDGEMENTS + "histograms.jsonl", **STUDENT}),
    "sft-soft": (SFT, {"objective.target": "histogram", "data.records": JUDGEMENTS + "histograms.jsonl", **STUDENT}),
    "sft-five-levels": (
        SFT, {"objective.target": "two-hot", "scorer.rubric": "dev/pocket/five_levels.json", **STUDENT}
    ),
}  # fmt: skip
"""Control -> the recipe that it varies, and all that differs."""
PLACES = {"teacher.model", "teacher.cache"}
"""Folders of a run, which the table names for each row."""


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("zreward_table")


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("zreward_report")


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """A few groups of each set."""
    folder: Path = tmp_path_factory.mktemp("judgements")
    subprocess.run([sys.executable, str(SCRIPTS / "make_judgements.py"), str(folder), *FEW], check=True)
    return folder


# ------------------------------------------------------------------------------------------------------------ recipes


def test_every_control_is_a_recipe_that_ships(table):
    rows = [row for row in table.rows() if row.control]
    assert {row.name for row in rows} == CONTROLS.keys()
    for row in rows:
        assert row.recipe == f"pocket/control-{row.name}" and row.options == (), row


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_differs_from_its_method_in_what_it_says_and_nothing_else(table, name):
    method, expected = CONTROLS[name]
    control, other = (table._flat(load_recipe(f"pocket/{n}").resolved) for n in (f"control-{name}", method))
    differs = {key for key in control | other if control.get(key) != other.get(key)}
    assert {key: control[key] for key in differs - PLACES} == expected


def test_a_row_is_run_with_this_tables_data_teacher_and_cache(table, tmp_path):
    by_name = {row.name: row for row in table.rows()}

    def settings(runs, name, seed, **options):
        job = table.Job(by_name[name], seed)
        return load_recipe(job.row.recipe, table.Table(runs, tmp_path, **options).overrides(job)).recipe

    runs = table.ROOT / "build/table"
    recipe = settings(runs, "risd-k4", 0)
    assert recipe.train.seed == 0 and recipe.data.images == JUDGEMENTS + "few.jsonl"
    assert recipe.teacher.model == "build/table/teacher-gdso-s0/export"
    assert recipe.teacher.cache == "build/table/teacher-gdso-s0-judgements-few-4"
    recipe = settings(runs, "student-risd", 2)
    assert recipe.train.seed == 2 and recipe.train.steps == 1000
    assert recipe.teacher.cache == "build/table/teacher-gdso-s2-judgements-unlabelled-2"
    assert settings(runs, "student-opd", 1).teacher.cache is None
    assert settings(runs, "gdso-parsed", 0).checkpoint.keep == 100  # its curve is drawn from them
    assert settings(runs, "student-gdso", 1).checkpoint.keep == 1
    quick = table.ROOT / "build/table-quick"
    recipe = settings(quick, "student-risd", 0, data=quick / "judgements", share=table.QUICK_SHARE)
    assert recipe.train.steps == 125 and recipe.data.images == "build/table-quick/judgements/unlabelled.jsonl"
    assert recipe.data.held_out == "build/table-quick/judgements/development.jsonl"


def test_quick_draws_few_groups(table, tmp_path, monkeypatch):
    """The teacher's judgements of all groups without labels would take half of its time."""
    calls = []

    def run(command, **_):
        calls.append([str(word) for word in command])
        for name in ("unlabelled", "labelled"):
            (tmp_path / f"{name}.jsonl").write_text(name + "\n")

    monkeypatch.setattr(table.subprocess, "run", run)
    table.make_data(tmp_path, table.QUICK_GROUPS)
    (command,) = calls
    sizes = {word: int(command[i + 1]) for i, word in enumerate(command) if word.startswith("--")}
    assert sizes.keys() == {"--labelled", "--unlabelled", "--development", "--test"}
    assert sizes["--unlabelled"] <= 300 and sizes["--test"] <= 300
    assert (tmp_path / "mixed.jsonl").read_text() == "unlabelled\nlabelled\n"


@pytest.mark.timeout(300)
def test_labels_beside_pictures_without_them(table, few, tmp_path):
    """`control-risd-labels-all` on a few pictures: a batch in which only some have labels has a finite loss of both."""
    table.make_data(few)
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "rewardtune", "train", "pocket/control-risd-labels-all", "--out", str(out),
        f"data.images={few}/mixed.jsonl", f"data.held_out={few}/development.jsonl", "train.steps=2",
        "train.batch_size=24", "teacher.model=pocket:student-base", "teacher.traces=1",
        f"teacher.cache={tmp_path}/said",
    ]  # fmt: skip
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=table.ROOT, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        assert math.isfinite(line["kl"]) and line["labels_loss"] > 0.1  # 0 where no picture has a label


# --------------------------------------------------------------------------------------------------------------- rows


def test_a_student_waits_for_its_teacher_even_where_that_row_is_there(table, tmp_path, monkeypatch):
    """A clone brings rows but no weights."""
    (tmp_path / "results").mkdir()
    for row in table.rows():
        for seed in range(row.seeds):
            if row.name != "student-risd":
                (tmp_path / f"results/{row.name}-s{seed}.json").write_text("{}")
    done: list[str] = []

    def work(self, job):
        if job.row.of:
            assert (self.runs / f"{job.row.of}-s{job.seed}/export").is_dir()
        (self.runs / job.name / "export").mkdir(parents=True)
        done.append(job.name)

    monkeypatch.setattr(table.Table, "work", work)
    runs = table.Table(tmp_path / "runs", tmp_path / "results")
    table.run(runs, list(table.chosen(["student-risd"], seeds=2, controls=True)))
    assert sorted(done) == ["student-risd-s0", "student-risd-s1", "teacher-gdso-s0", "teacher-gdso-s1"]


def test_a_row_is_measured_and_says_where_it_comes_from(table, few, tmp_path):
    """The student's base on eight groups: all figures are there and the pairs add up."""
    record = {"sha256": "abc", "git_revision": "def+", "recipe": {"task": "reward_sft"}, "run_id": "x"}
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    table.test("pocket:student-base", tmp_path / "row", data=few, reasoning=0, run=tmp_path)
    figures = json.loads((tmp_path / "row.json").read_text())
    assert figures["groups"] == 8 and figures["tokens_per_score"] == 1
    assert {"hpa", "margin_hpa", "near_hpa", "plcc", "srcc", "ece"} <= set(figures)
    # taken beside other trainings, it would say little: `time` measures it
    assert "seconds_per_score" not in figures
    assert figures["recipe"] == {"sha256": "abc", "git_revision": "def+", "settings": {"task": "reward_sft"}}
    assert figures["git_revision"] is None or len(figures["git_revision"].rstrip("+")) == 40
    right_wide, wide, right_near, near = np.load(tmp_path / "row.npz")["pairs"].sum(0).tolist()
    assert wide + near and (right_wide + right_near) / (wide + near) == pytest.approx(figures["hpa"], abs=1e-6)


def test_a_finished_row_of_another_recipe_is_named_and_kept(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table.Table, "work", lambda *_: pytest.fail("a finished row was run again"))
    runs = table.Table(tmp_path / "runs", tmp_path)
    (job,) = table.chosen(["student-sft"], seeds=1, controls=False)
    loaded = load_recipe(job.row.recipe, runs.overrides(job))

    def finish(sha256, settings):
        record = {"sha256": sha256, "git_revision": None, "settings": settings}
        (tmp_path / f"{job.name}.json").write_text(json.dumps({"recipe": record}))
        table.run(runs, [job])
        return capsys.readouterr().err

    assert finish(loaded.sha256, loaded.resolved) == ""
    # a setting that came later had its default then
    older = {**loaded.resolved, "objective": {"target": "hard"}}
    assert finish("older", older) == ""
    other = {**loaded.resolved, "train": {**loaded.resolved["train"], "steps": 7}}
    said = finish("other", other)
    assert job.name in said and "train.steps" in said and "optimizer" not in said
    (tmp_path / f"{job.name}.json").write_text("{}")  # of before this was recorded
    table.run(runs, [job])
    assert capsys.readouterr().err == ""


def test_scoring_time_is_taken_for_every_size_and_kind(table, few, tmp_path):
    shutil.copytree(few, tmp_path / "data")
    command = [sys.executable, str(SCRIPTS / "zreward_table.py"), "time", "--data", str(tmp_path / "data"),
               "--out", str(tmp_path / "time.json"), "--rounds", "2"]  # fmt: skip
    subprocess.run(command, check=True)
    document = json.loads((tmp_path / "time.json").read_text())
    each = {(e["size"], e["kind"]): e for e in document["seconds_per_score"]}
    assert each.keys() == {(size, kind) for size in ("teacher", "student") for kind in ("one pass", "reasoned")}
    assert all(0 < e["least"] <= e["median"] for e in each.values())
    assert each["teacher", "one pass"]["tokens"] == 1 < each["teacher", "reasoned"]["tokens"]


# --------------------------------------------------------------------------------------------------------------- page


def row_of(page, name, accuracies, *, seeds=None, groups=400, of=None, rng=0, control="", against=""):
    """A row of made-up groups, four wide and two near pairs each; one accuracy a seed."""
    drawn = np.random.default_rng(rng)
    counts = np.stack([
        np.stack([column for n in (4, 2) for column in (drawn.binomial(n, a, groups), np.full(groups, n))], 1)
        for a in accuracies
    ]).astype(float)  # fmt: skip
    figures = [{"hpa": a, "margin_hpa": a, "near_hpa": a, "plcc": a, "srcc": a, "ece": 0.1, "ci95": {},
                "tokens_per_score": 1.0, "seconds_per_score": 99.0} for a in accuracies]  # fmt: skip
    places = tuple(range(len(accuracies))) if seeds is None else tuple(seeds)
    return page.Found(name, "student", "risd", control, figures, counts, places, of, against)


def test_a_student_and_its_teacher_are_compared_seed_by_seed(page):
    """Teachers differ a lot by seed, and each student is behind its own by the same: the gap is known well."""
    teacher = row_of(page, "t", [0.6, 0.75, 0.9])
    behind = teacher.counts.copy()
    behind[:, ::10, 0] -= 1
    student = page.replace(teacher, name="s", of="t", counts=behind)
    stranger = page.replace(student, of=None)
    own, other = page.difference(student, teacher), page.difference(stranger, teacher)
    assert own.mean == pytest.approx(other.mean) == pytest.approx(100 * -40 / 2400)
    assert own.high - own.low < 2 < 10 < other.high - other.low
    assert own.seeds == pytest.approx({0: own.mean, 1: own.mean, 2: own.mean})
    # two students of one teacher share its luck as well
    sibling = page.replace(student, name="s2", counts=teacher.counts)
    assert page.difference(student, sibling).low == pytest.approx(own.low)


def test_seeds_that_one_of_the_two_lacks_are_left_out(page):
    teacher = row_of(page, "t", [0.6, 0.75, 0.9])
    student = page.replace(teacher.at([0, 2]), name="s", of="t")
    found = page.difference(student, teacher)
    assert found.seeds == {0: 0.0, 2: 0.0} and (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_papers_margins_are_those_of_its_table(page):
    method = {"dance": "rewarddance"}
    for claim in page.CLAIMS:
        one, other = (
            page.PAPER[size, method.get(name, name)][0]
            for size, _, name in (row.partition("-") for row in (claim.one, claim.other))
        )
        assert 100 * (one - other) == pytest.approx(claim.paper, abs=0.051), claim.text
        assert claim.tried in page.TRIED


def written(page, table, folder: Path, found: list[Any], **options: Any) -> tuple[str, dict[str, Any]]:
    for row in found:
        for seed, figures, counts in zip(row.seeds, row.figures, row.counts, strict=True):
            (folder / f"{row.name}-s{seed}.json").write_text(json.dumps({**figures, "reliability": [[1, 0.5, 0.5]]}))
            np.savez(folder / f"{row.name}-s{seed}.npz", pairs=counts)
    page.report(folder, folder / "page.md", [(row, row.seeds) for row in table.rows()], **options)
    return (folder / "page.md").read_text(), json.loads((folder / "page.json").read_text())


def test_the_page_shows_seeds_margins_and_the_clock(page, table, tmp_path):
    pytest.importorskip("matplotlib")
    clock = {"rounds": 3, "pictures": 8, "processor": "an abacus", "load_before": 0.0, "seconds_per_score": [
        {"size": "student", "kind": "one pass", "tokens": 1.0, "least": 0.0025, "median": 0.003}]}  # fmt: skip
    (tmp_path / "time.json").write_text(json.dumps(clock))
    found = [row_of(page, "teacher-gdso", [0.8, 0.81, 0.82], rng=1), row_of(page, "student-sft", [0.7, 0.71], rng=2),
             row_of(page, "student-risd", [0.81, 0.8, 0.82], rng=3),
             row_of(page, "risd-mean", [0.7], rng=4), row_of(page, "risd-labels", [0.7], rng=5)]  # fmt: skip
    text, document = written(page, table, tmp_path, found, times=tmp_path / "time.json", world=table.WORLD)
    lines = text.splitlines()
    (risd,) = (line for line in lines if line.startswith("| student | risd |"))
    assert "| 0.810, 0.800, 0.820 |" in risd and risd.endswith("| 2.5 (3.0) |") and "99" not in risd
    (claim,) = (line for line in lines if line.startswith("| RISD above SFT"))
    assert "holds" in claim and "| +14.1 | no | RISD |" in claim
    assert "None of the paper's margins is beaten" in text and "Four traces on the 12,000 pictures: not tried" in text
    (mean,) = (line for line in lines if line.startswith("| risd-mean |"))
    assert "to student-risd |" in mean
    (labels,) = (line for line in lines if line.startswith("| risd-labels |"))
    assert "to student-risd" not in labels and "does not measure what labels add" in text
    # the world's own check, as measured
    assert "**It does not, over all dimensions.**" in text and "| teacher | -0.0 [-1.5, +1.4] |" in text
    assert document["rows"][-1]["seconds_per_score"] == 0.0025
    (made,) = (c for c in document["claims"] if c["claim"].startswith("RISD above SFT"))
    assert made["paper_points"] == 14.1 and made["above_the_papers"] == "no" and set(made["seeds"]) == {"0", "1"}


def test_a_margin_above_the_papers_is_said_to_be(page, table, tmp_path):
    pytest.importorskip("matplotlib")
    found = [row_of(page, "student-opd", [0.6] * 3, rng=1), row_of(page, "student-risd", [0.8] * 3, rng=2)]
    text, document = written(page, table, tmp_path, found)
    assert "Above the paper's margin: RISD above OPD." in text and "None of the paper's margins" not in text
    assert document["claims"][0]["above_the_papers"] == "yes"
    assert "Scoring time is not measured yet" in text
