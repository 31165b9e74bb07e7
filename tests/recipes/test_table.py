"""`make table`'s script: what it runs and in which order, and a row's test on real weights."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "dev/pocket"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("zreward_table")


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
    runs = table.Table(tmp_path / "runs", tmp_path / "results", share=1)
    table.run(runs, list(table.chosen(["student-risd"], seeds=2, controls=True)))
    assert sorted(done) == ["student-risd-s0", "student-risd-s1", "teacher-gdso-s0", "teacher-gdso-s1"]


def test_a_row_is_measured(table, tmp_path, monkeypatch):
    """The student's base on four groups: all figures are there and the pairs add up."""
    few = ["--labelled", "2", "--unlabelled", "2", "--development", "2", "--test", "8"]
    subprocess.run([sys.executable, str(SCRIPTS / "make_judgements.py"), str(tmp_path), *few], check=True)
    monkeypatch.setattr(table, "DATA", tmp_path)
    table.test("pocket:student-base", tmp_path / "row", reasoning=0, share=1)
    figures = json.loads((tmp_path / "row.json").read_text())
    assert figures["groups"] == 8 and figures["tokens_per_score"] == 1
    assert {"hpa", "margin_hpa", "near_hpa", "plcc", "srcc", "ece", "seconds_per_score"} <= set(figures)
    import numpy as np

    right_wide, wide, right_near, near = np.load(tmp_path / "row.npz")["pairs"].sum(0).tolist()
    assert wide + near and (right_wide + right_near) / (wide + near) == pytest.approx(figures["hpa"], abs=1e-6)
