"""The Z-Reward table of the pocket world: every method at both sizes, three seeds, and what the figures say.

`make table` runs it: data, trainings, tests, and dev/results/zreward-table.{md,json}. Two jobs at a time, one a core.
Finished rows are kept under dev/results/zreward-table/ and not run again; `--quick` runs one seed of shorter trainings
into build/table-quick and leaves the results alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from zreward_report import report

ROOT = Path(__file__).parents[2]
DATA = ROOT / "build/pocket/judgements"
BASES = {"teacher": "pocket:teacher-base", "student": "pocket:student-base"}
SEEDS, FEW = 3, 300


def named(path: Path) -> str:
    """A path as the records of a run should have it: from the repository's root, where everything is run."""
    return os.path.relpath(path, ROOT)


@dataclass(frozen=True)
class Row:
    """One line of the table. recipe: None for the untrained base. of: the row whose export is its teacher. reasoning:
    traces per score at test. curve: its first seed is also measured at each checkpoint, on development groups."""

    name: str
    size: str
    method: str
    recipe: str | None = None
    options: tuple[str, ...] = ()
    of: str | None = None
    reasoning: int = 0
    control: str = ""
    curve: bool = False

    @property
    def seeds(self) -> int:
        return 1 if self.control or self.recipe is None else SEEDS


def rows() -> list[Row]:
    """The table's rows, teachers before students."""
    out: list[Row] = []
    for size in ("teacher", "student"):
        base = (f"scorer.model={BASES[size]}",)
        out += [
            Row(f"{size}-zero-shot", size, "zero-shot"),
            Row(f"{size}-zero-shot-reasoned", size, "zero-shot, reasoned", reasoning=1),
            Row(f"{size}-sft", size, "sft", "pocket/teacher-sft", base),
            Row(f"{size}-dance", size, "rewarddance", "pocket/teacher-dance", base),
            Row(f"{size}-grpo", size, "grpo", "pocket/teacher-grpo", base, reasoning=1, curve=size == "student"),
            Row(f"{size}-gdso", size, "gdso", "pocket/teacher-gdso", base, reasoning=1, curve=size == "student"),
        ]
    student, gdso = "pocket/student-risd", "teacher-gdso"
    out += [
        Row("student-risd", "student", "risd", student, of=gdso),
        Row("student-opd", "student", "opd", "pocket/student-opd", of=gdso, reasoning=1),
    ]
    # controls at the student's size, which takes half of the time
    base = (f"scorer.model={BASES['student']}",)
    parsed = (*base, "objective.reward=parsed")
    out += [
        Row("risd-sft-teacher", "student", "risd", student, ("teacher.traces=0",), of="teacher-sft",
            control="from the SFT teacher, read in one pass"),
        Row("risd-mean", "student", "risd", student, ("objective.match=mean",), of=gdso,
            control="only the mean is distilled"),
        Row("risd-labels", "student", "risd", student,
            ("objective.labels=1.0", f"data.images={named(DATA)}/labelled.jsonl"), of=gdso,
            control="labelled pictures only, labels + KL"),
        *(Row(f"risd-k{k}", "student", "risd", student, (f"teacher.traces={k}", f"data.images={named(DATA)}/few.jsonl"),
              of=gdso, control=f"{k} traces a picture and dimension, {FEW} groups") for k in (1, 4, 8)),
        Row("gdso-no-policy", "student", "gdso", "pocket/teacher-gdso", (*base, "objective.policy=0"), reasoning=1,
            control="without the policy gradient"),
        Row("gdso-parsed", "student", "gdso", "pocket/teacher-gdso", parsed, reasoning=1, curve=True,
            control="reward from the score in the text"),
        Row("grpo-parsed", "student", "grpo", "pocket/teacher-grpo", parsed, reasoning=1, curve=True,
            control="reward from the score in the text"),
        Row("gdso-two-hot", "student", "gdso", "pocket/teacher-gdso", (*base, "objective.target=two-hot"),
            reasoning=1, control="two-hot targets"),
        Row("sft-soft", "student", "sft", "pocket/teacher-sft",
            (*base, "objective.target=histogram", f"data.records={named(DATA)}/histograms.jsonl"),
            control="targets are the annotators' histograms"),
        Row("sft-five-levels", "student", "sft", "pocket/teacher-sft",
            (*base, "objective.target=two-hot", "scorer.rubric=dev/pocket/five_levels.json"),
            control="five levels, two-hot targets"),
    ]  # fmt: skip
    return out


@dataclass(frozen=True)
class Job:
    """One training and test of a row."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name}-s{self.seed}"


class Table:
    """Where runs and results lie. share: of the recipes' steps and of the test groups (`--quick`)."""

    def __init__(self, runs: Path, results: Path, *, share: float) -> None:
        self.runs, self.results, self.share = runs, results, share
        self.cores: SimpleQueue[int] = SimpleQueue()
        for core in sorted(os.sched_getaffinity(0)):
            self.cores.put(core)

    def done(self, job: Job) -> bool:
        return (self.results / f"{job.name}.json").exists()

    def trained(self, job: Job) -> bool:
        return (self.runs / job.name / "export").exists()

    def work(self, job: Job) -> None:
        """Train where needed and test, on one core of its own: two threads on a core pair are slower than one each."""
        core = self.cores.get()
        try:
            scorer = BASES[job.row.size]
            if job.row.recipe is not None:
                self._train(job, core)
                scorer = str(self.runs / job.name / "export")
            if self.done(job):  # its row came with the repository, its weights did not
                return
            self._call(core, sys.executable, __file__, "test", scorer, str(self.results / job.name),
                       "--reasoning", str(job.row.reasoning), "--share", str(self.share),
                       log=self.runs / f"{job.name}.test.log")  # fmt: skip
            if job.row.curve and job.seed == 0:
                self._call(core, sys.executable, __file__, "curve", scorer, str(self.runs / job.name),
                           str(self.results / f"{job.row.name}.curve.json"), "--share", str(self.share),
                           log=self.runs / f"{job.name}.test.log")  # fmt: skip
        finally:
            self.cores.put(core)

    def _train(self, job: Job, core: int) -> None:
        out = named(self.runs / job.name)
        options = [f"train.seed={job.seed}", *job.row.options]
        if job.row.curve and job.seed == 0:
            options.append("checkpoint.keep=100")
        if not any(o.startswith("data.") for o in options):
            name = f"images={named(DATA)}/unlabelled.jsonl" if job.row.of else f"records={named(DATA)}/labelled.jsonl"
            options.append(f"data.{name}")
        if job.row.of is not None:
            teacher = self.runs / f"{job.row.of}-s{job.seed}"
            options.append(f"teacher.model={named(teacher)}/export")
            if "student-risd" in str(job.row.recipe):
                traces = next((o.partition("=")[2] for o in options if o.startswith("teacher.traces=")), "2")
                kind = next(Path(o.partition("=")[2]).stem for o in options if o.startswith("data.images="))
                options.append(f"teacher.cache={named(teacher)}-judgements-{kind}-{traces}")
        if self.share < 1:
            options.append(f"train.steps={max(10, int(self.share * _steps(str(job.row.recipe))))}")
        self._call(core, sys.executable, "-m", "rewardtune", "train", str(job.row.recipe), *options, "--out", out,
                   log=self.runs / f"{job.name}.log")  # fmt: skip

    def _call(self, core: int, *command: str, log: Path) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        settings = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            done = subprocess.run(["taskset", "-c", str(core), *command], stdout=file, stderr=file, env=settings,
                                  cwd=ROOT, check=False)  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{log} ends with exit code {done.returncode}:\n{log.read_text()[-600:]}")


def _steps(recipe: str) -> int:
    from rewardtune.recipe.file import load_recipe

    return load_recipe(recipe, files=False).recipe.train.steps


def run(table: Table, jobs: Sequence[Job]) -> None:
    """All jobs, two at a time, a student when its teacher is ready."""
    waiting = [job for job in jobs if not table.done(job)]
    of = {(job.row.of, job.seed) for job in waiting}
    teachers = [Job(row, seed) for row in rows() for seed in range(row.seeds) if (row.name, seed) in of]
    waiting = [job for job in teachers if job not in waiting and not table.trained(job)] + waiting
    running: dict[Future[None], Job] = {}
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        while waiting or running:
            ready = [j for j in waiting if len(running) < 2 and _ready(j, waiting, running.values())]
            for job in ready[: 2 - len(running)]:
                waiting.remove(job)
                running[pool.submit(table.work, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                future.result()
                minutes = (time.monotonic() - started) / 60
                print(f"{minutes:5.0f} min  {job.name} done, {len(waiting) + len(running)} left", flush=True)


def _ready(job: Job, *unfinished: Iterable[Job]) -> bool:
    """Whether a job's teacher, if it has one, is trained."""
    if job.row.of is None:
        return True
    teacher = (job.row.of, job.seed)
    return teacher not in {(j.row.name, j.seed) for jobs in unfinished for j in jobs}


def test(scorer: str, out: Path, *, reasoning: int, share: float) -> None:
    """Score the test groups; figures to OUT.json, right and counted pairs of each group to OUT.npz."""
    from rewardtune.data.records import read_records
    from rewardtune.scorer import evaluate
    from rewardtune.scorer.model import load_scorer
    from rewardtune.scoring import agreement

    groups = read_records(DATA / "test.jsonl")
    groups = groups[: max(100, int(share * len(groups)))]
    loaded = load_scorer(scorer)
    started = time.perf_counter()
    predicted, tokens = evaluate.predict(loaded, groups, batch_size=64, reasoning=reasoning)
    seconds = time.perf_counter() - started
    ratings = evaluate.beside_people(loaded, groups, predicted)
    figures = agreement.measure(ratings, loaded.dimensions)
    pairs = agreement.pairs_of(ratings)
    right, wide = pairs.predicted * pairs.human > 0, np.abs(pairs.human) > agreement.MARGIN + 1e-9
    counts = [np.bincount(pairs.group, weights=w, minlength=len(groups))
              for w in (right & wide, wide, right & ~wide, ~wide)]  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out.with_suffix(".npz"), pairs=np.stack(counts, 1).astype(np.uint16))
    bins = np.minimum((ratings.confidence * agreement.BINS).astype(int), agreement.BINS - 1)
    reliability = [[int((bins == b).sum()), float(ratings.confidence[bins == b].sum()),
                    float(ratings.agreed[bins == b].sum())] for b in range(agreement.BINS)]  # fmt: skip
    document = {
        **figures, "tokens_per_score": round(tokens, 2), "groups": len(groups), "reliability": reliability,
        "seconds_per_score": seconds / (len(predicted) * len(loaded.dimensions)),
    }  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


def curve(scorer: str, run: Path, out: Path, *, share: float) -> None:
    """Pair accuracy at each checkpoint of a run and before it, by the expectation and by the score that the text says
    (drawn from the same distribution), on development groups."""
    from safetensors.torch import load_file

    from rewardtune.data.records import read_records
    from rewardtune.scorer import evaluate
    from rewardtune.scorer.model import load_scorer
    from rewardtune.scoring import agreement

    groups = read_records(DATA / "development.jsonl")[: max(20, int(100 * share))]
    config = json.loads((run / "recipe.json").read_text())
    loaded = load_scorer(config["recipe"]["scorer"]["model"], rubric=scorer)
    levels = np.asarray(loaded.rubric.values)
    rows: list[dict[str, float]] = []
    for step, file in [(0, None), *((int(f.parent.name.rpartition("-")[2]), f) for f in sorted(
            run.glob("checkpoints/step-*/parameters.safetensors")))]:  # fmt: skip
        if file is not None:
            weights = {name.removeprefix("scorer."): value for name, value in load_file(file).items()}
            loaded.model.load_state_dict(weights, strict=False)
        predicted, _ = evaluate.predict(loaded, groups, batch_size=64, reasoning=1)
        chance = np.random.default_rng(0).random((*predicted.shape[:2], 1))
        said = np.minimum((predicted.cumsum(-1) <= chance).sum(-1), len(levels) - 1)
        row: dict[str, float] = {"step": step}
        for name, shares in (("expectation", predicted), ("text", np.eye(len(levels))[said])):
            figures = agreement.measure(evaluate.beside_people(loaded, groups, shares), loaded.dimensions, resamples=0)
            row |= {f"{name}/hpa": figures["hpa"], f"{name}/margin_hpa": figures["margin_hpa"]}
        rows.append(row)
    out.write_text(json.dumps({"groups": len(groups), "rows": rows}, indent=1) + "\n")


def make_data() -> None:
    if not (DATA / "opinions.jsonl").exists() or not (DATA / "test.jsonl").exists():
        script = Path(__file__).with_name("make_judgements.py")
        subprocess.run([sys.executable, str(script), str(DATA)], check=True, cwd=ROOT)


def chosen(names: Sequence[str], *, seeds: int, controls: bool) -> Iterator[Job]:
    """Jobs in the order of their seeds, so that an interrupted table has whole seeds."""
    table = [row for row in rows() if not names or row.name in names]
    for seed in range(seeds):
        yield from (Job(row, seed) for row in table if not row.control and seed < row.seeds)
    if controls:
        yield from (Job(row, 0) for row in table if row.control)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("run", help="all rows, then the report")
    whole.add_argument("--quick", action="store_true", help="one seed, an eighth of the steps and test groups")
    whole.add_argument("--rows", nargs="*", default=[], metavar="NAME", help="only these")
    whole.add_argument("--seeds", type=int, default=SEEDS)
    one = commands.add_parser("test", help="score the test groups with one scorer")
    one.add_argument("scorer")
    one.add_argument("out", type=Path)
    one.add_argument("--reasoning", type=int, default=0)
    one.add_argument("--share", type=float, default=1.0)
    steps = commands.add_parser("curve", help="measure a run's checkpoints on development groups")
    steps.add_argument("scorer")
    steps.add_argument("run", type=Path)
    steps.add_argument("out", type=Path)
    steps.add_argument("--share", type=float, default=1.0)
    commands.add_parser("report", help="write the page from the rows that are there")
    args = parser.parse_args()
    results = ROOT / "dev/results/zreward-table"
    if args.command == "test":
        return test(args.scorer, args.out, reasoning=args.reasoning, share=args.share)
    if args.command == "curve":
        return curve(args.scorer, args.run, args.out, share=args.share)
    page = results.with_suffix(".md")
    if args.command == "run":
        make_data()
        quick: dict[str, Any] = {}
        if args.quick:
            results = ROOT / "build/table-quick/results"
            page, quick = ROOT / "build/table-quick/zreward-table.md", {"seeds": 1, "controls": False}
        table = Table(results.parent if args.quick else ROOT / "build/table", results, share=0.125 if args.quick else 1)
        run(table, list(chosen(args.rows, **{"seeds": args.seeds, "controls": True, **quick})))
    report(results, page, [(row, row.seeds) for row in rows()])
    print(page)
    return None


if __name__ == "__main__":
    main()
