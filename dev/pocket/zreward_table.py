"""The Z-Reward table of the pocket world: every method at both sizes, three seeds, and what the figures say.

`make table` runs it: data, trainings, tests, and dev/results/zreward-table.{md,json}. Two jobs at a time, one a core.
Finished rows are kept under dev/results/zreward-table/ and not run again; one whose recipe has changed since is named.
`run --quick` runs one seed of shorter trainings on fewer groups into build/table-quick and leaves the results alone.
`time` measures how long a score takes, on a machine that does nothing else, into dev/results/zreward-time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from zreward_report import report

ROOT = Path(__file__).parents[2]
DATA = ROOT / "build/pocket/judgements"
RESULTS = ROOT / "dev/results"
TIMES, WORLD = RESULTS / "zreward-time.json", RESULTS / "zreward-world.json"
BASES = {"teacher": "pocket:teacher-base", "student": "pocket:student-base"}
SEEDS = 3
QUICK_SHARE, QUICK_GROUPS = 0.125, {"labelled": 300, "unlabelled": 300, "development": 40, "test": 250}
"""`--quick`: part of a recipe's steps, and groups of each set; the teacher's judgements of all 3,000 groups would take
half of the 20 minutes alone (ours)."""


def named(path: Path) -> str:
    """A path as the records of a run should have it: from the repository's root, where everything is run."""
    return os.path.relpath(path, ROOT)


@dataclass(frozen=True)
class Row:
    """One line of the table. recipe: None for the untrained base. of: the row whose export is its teacher. reasoning:
    traces per score at test. curve: its first seed is also measured at each checkpoint, on development groups. against:
    the row that a control differs from in one thing."""

    name: str
    size: str
    method: str
    recipe: str | None = None
    options: tuple[str, ...] = ()
    of: str | None = None
    reasoning: int = 0
    control: str = ""
    curve: bool = False
    against: str = ""

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
    gdso = "teacher-gdso"
    out += [
        Row("student-risd", "student", "risd", "pocket/student-risd", of=gdso),
        Row("student-opd", "student", "opd", "pocket/student-opd", of=gdso, reasoning=1),
        # controls: at the student's size, which takes half of the time
        _control("risd-sft-teacher", "from the SFT teacher, read in one pass", of="teacher-sft"),
        _control("risd-mean", "only the mean is distilled", of=gdso),
        # its pictures are a tenth of RISD's, so there is no row that it could be held against
        _control("risd-labels", "labels + KL, on the 300 labelled groups alone", of=gdso, against=""),
        _control("risd-labels-all", "labels + KL, on RISD's 3,000 groups and the 300 labelled ones", of=gdso),
        *(_control(f"risd-k{k}", f"{k} trace{'s' * (k > 1)} a picture and dimension, 300 groups", of=gdso,
                   against="risd-k1" * (k > 1)) for k in (1, 4, 8)),
        _control("gdso-no-policy", "without the policy gradient", reasoning=1),
        _control("gdso-parsed", "reward from the score in the text", reasoning=1, curve=True),
        _control("grpo-parsed", "reward from the score in the text", reasoning=1, curve=True),
        _control("gdso-soft", "targets are the annotators' histograms", reasoning=1),
        _control("sft-soft", "targets are the annotators' histograms"),
        _control("sft-five-levels", "five levels, two-hot targets"),
    ]  # fmt: skip
    return out


def _control(name: str, control: str, *, against: str | None = None, **more: Any) -> Row:
    """A row of a recipe `pocket/control-NAME`; the first word of its name is its method."""
    method = name.partition("-")[0]
    other = f"student-{method}" if against is None else against
    return Row(name, "student", method, f"pocket/control-{name}", control=control, against=other, **more)


@dataclass(frozen=True)
class Job:
    """One training and test of a row."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name}-s{self.seed}"


class Table:
    """Where data, runs and results lie. share: of the recipes' steps (`--quick`)."""

    def __init__(self, runs: Path, results: Path, *, data: Path = DATA, share: float = 1.0) -> None:
        self.runs, self.results, self.data, self.share = runs, results, data, share
        self.cores: SimpleQueue[int] = SimpleQueue()
        for core in sorted(os.sched_getaffinity(0)):
            self.cores.put(core)

    def done(self, job: Job) -> bool:
        return (self.results / f"{job.name}.json").exists()

    def trained(self, job: Job) -> bool:
        return (self.runs / job.name / "export").exists()

    def changed(self, job: Job) -> list[str]:
        """Settings that a finished row was trained with and that differ today; older rows do not say."""
        record = json.loads((self.results / f"{job.name}.json").read_text()).get("recipe")
        if job.row.recipe is None or record is None:
            return []
        from rewardtune.recipe.file import load_recipe

        now = load_recipe(job.row.recipe, self.overrides(job))
        return [] if now.sha256 == record["sha256"] else differing(record["settings"], now.resolved)

    def overrides(self, job: Job) -> list[str]:
        """What a row's recipe is run with: its seed, this table's data, its teacher in this table."""
        from rewardtune.recipe.file import load_recipe

        recipe = load_recipe(str(job.row.recipe), job.row.options).recipe
        options = [f"train.seed={job.seed}", *job.row.options]
        if job.row.curve and job.seed == 0:
            options.append("checkpoint.keep=100")
        data = recipe.data.model_dump(include={"records", "images", "held_out"}, exclude_none=True)
        options += [f"data.{name}={named(self.data / Path(file).name)}" for name, file in data.items()]
        if job.row.of is not None:
            teacher = self.runs / f"{job.row.of}-s{job.seed}"
            section: Any = recipe.teacher  # type: ignore[union-attr]
            options.append(f"teacher.model={named(teacher)}/export")
            if section.cache is not None:
                kind = Path(data["images"]).stem
                options.append(f"teacher.cache={named(teacher)}-judgements-{kind}-{section.traces}")
        if self.share < 1:
            options.append(f"train.steps={max(10, int(self.share * recipe.train.steps))}")
        return options

    def work(self, job: Job) -> None:
        """Train where needed and test, on one core of its own: two threads on a core pair are slower than one each."""
        core = self.cores.get()
        try:
            scorer, run = BASES[job.row.size], self.runs / job.name
            if job.row.recipe is not None:
                self._train(job, core)
                scorer = str(run / "export")
            if self.done(job):  # its row came with the repository, its weights did not
                return
            data = ("--data", str(self.data))
            self._call(core, sys.executable, __file__, "test", scorer, str(self.results / job.name), *data,
                       "--reasoning", str(job.row.reasoning), *(("--run", str(run)) if job.row.recipe else ()),
                       log=self.runs / f"{job.name}.test.log")  # fmt: skip
            if job.row.curve and job.seed == 0:
                self._call(core, sys.executable, __file__, "curve", scorer, str(run),
                           str(self.results / f"{job.row.name}.curve.json"), *data,
                           log=self.runs / f"{job.name}.test.log")  # fmt: skip
        finally:
            self.cores.put(core)

    def _train(self, job: Job, core: int) -> None:
        self._call(core, sys.executable, "-m", "rewardtune", "train", str(job.row.recipe), *self.overrides(job),
                   "--out", named(self.runs / job.name), log=self.runs / f"{job.name}.log")  # fmt: skip

    def _call(self, core: int, *command: str, log: Path) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        settings = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            done = subprocess.run(["taskset", "-c", str(core), *command], stdout=file, stderr=file, env=settings,
                                  cwd=ROOT, check=False)  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{log} ends with exit code {done.returncode}:\n{log.read_text()[-600:]}")


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Dotted settings of two resolved recipes that differ; one that `then` lacks has its default there."""
    from pydantic import TypeAdapter, ValidationError

    from rewardtune.recipe.sections import Recipe

    with suppress(ValidationError):  # a setting that is gone since is a difference, too
        then = TypeAdapter(Recipe).validate_python(then).model_dump(mode="json")
    one, other = _flat(then), _flat(now)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def provenance(run: Path | None) -> dict[str, Any]:
    """What a row's file says of where it comes from: the revision that tests it, and the recipe that was trained."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"], cwd=ROOT,
                           capture_output=True, text=True, check=False)  # fmt: skip
    found: dict[str, Any] = {"git_revision": asked.stdout.strip() or None}
    if run is not None:
        record = json.loads((run / "recipe.json").read_text())
        found["recipe"] = {"sha256": record["sha256"], "git_revision": record["git_revision"],
                           "settings": record["recipe"]}  # fmt: skip
    return found


def run(table: Table, jobs: Sequence[Job]) -> None:
    """All jobs, two at a time, a student when its teacher is ready."""
    for job in jobs:
        if table.done(job) and (names := table.changed(job)):
            print(f"{job.name} was trained with another recipe ({', '.join(names)} differ); it is kept. Delete "
                  f"{named(table.results / job.name)}.* to run it again.", file=sys.stderr)  # fmt: skip
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


def test(scorer: str, out: Path, *, data: Path, reasoning: int, run: Path | None = None) -> None:
    """Score the test groups; figures to OUT.json, right and counted pairs of each group to OUT.npz. run: the folder
    that the scorer was trained in."""
    from rewardtune.data.records import read_records
    from rewardtune.scorer import evaluate
    from rewardtune.scorer.model import load_scorer
    from rewardtune.scoring import agreement

    groups = read_records(data / "test.jsonl")
    loaded = load_scorer(scorer)
    predicted, tokens = evaluate.predict(loaded, groups, batch_size=64, reasoning=reasoning)
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
        **provenance(run),
    }  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


def curve(scorer: str, run: Path, out: Path, *, data: Path) -> None:
    """Pair accuracy at each checkpoint of a run and before it, by the expectation and by the score that the text says
    (drawn from the same distribution), on development groups."""
    from safetensors.torch import load_file

    from rewardtune.data.records import read_records
    from rewardtune.scorer import evaluate
    from rewardtune.scorer.model import load_scorer
    from rewardtune.scoring import agreement

    groups = read_records(data / "development.jsonl")[:100]
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


def clock(out: Path, *, data: Path, rounds: int, pictures: int = 64) -> None:
    """Time each size and kind of scoring on one thread, one after the other in turns, and write OUT.

    The rows' trainings share a machine with one another, so their own times say little. Untrained bases stand for all
    scorers of their size: training changes the weights, and of the work no more than the length of a trace. Least and
    median over the rounds; the first round, which fills caches, does not count.
    """
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    import torch

    torch.set_num_threads(1)
    from rewardtune.data.records import read_records
    from rewardtune.scorer import evaluate
    from rewardtune.scorer.model import load_scorer

    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"Something else is running (load {load:.1f}); times that others will read want an idle machine.",
              file=sys.stderr)  # fmt: skip
    groups = read_records(data / "development.jsonl")[: max(1, pictures // 4)]
    scorers = {size: load_scorer(base) for size, base in BASES.items()}
    taken: dict[tuple[str, str], list[float]] = {}
    said: dict[tuple[str, str], float] = {}
    for turn in range(rounds + 1):
        for size, scorer in scorers.items():
            for kind, traces in (("one pass", 0), ("reasoned", 1)):
                started = time.perf_counter()
                predicted, tokens = evaluate.predict(scorer, groups, batch_size=64, reasoning=traces)
                seconds = (time.perf_counter() - started) / (len(predicted) * len(scorer.dimensions))
                said[size, kind] = round(tokens, 2)
                if turn:
                    taken.setdefault((size, kind), []).append(seconds)
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
    document = {
        "pictures": sum(len(group.images) for group in groups), "rounds": rounds, "threads": 1, "load_before": load,
        "processor": _processor(), "torch": torch.__version__, **provenance(None),
        "seconds_per_score": [{"size": size, "kind": kind, "tokens": said[size, kind], "least": min(each),
                               "median": float(np.median(each))} for (size, kind), each in taken.items()],
    }  # fmt: skip
    out.write_text(json.dumps(document, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def make_data(data: Path, groups: Mapping[str, int] | None = None) -> None:
    """The groups that a table needs; `groups`: how many of each set, where not the usual."""
    if not (data / "opinions.jsonl").exists() or not (data / "test.jsonl").exists():
        sizes = [word for name, count in (groups or {}).items() for word in (f"--{name}", str(count))]
        script = Path(__file__).with_name("make_judgements.py")
        subprocess.run([sys.executable, str(script), str(data), *sizes], check=True, cwd=ROOT)
    # groups without labels first: the teacher's traces are drawn by an item's place, so these are RISD's own
    parts = [(data / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("unlabelled", "labelled")]
    mixed = data / "mixed.jsonl"
    if not mixed.exists() or mixed.read_text(encoding="utf-8") != "".join(parts):
        mixed.write_text("".join(parts), encoding="utf-8")


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
    whole.add_argument("--quick", action="store_true", help="one seed, an eighth of the steps, fewer groups")
    whole.add_argument("--rows", nargs="*", default=[], metavar="NAME", help="only these")
    whole.add_argument("--seeds", type=int, default=SEEDS)
    one = commands.add_parser("test", help="score the test groups with one scorer")
    one.add_argument("scorer")
    one.add_argument("out", type=Path)
    one.add_argument("--reasoning", type=int, default=0)
    one.add_argument("--run", type=Path, help="the folder that it was trained in, for the record")
    steps = commands.add_parser("curve", help="measure a run's checkpoints on development groups")
    steps.add_argument("scorer")
    steps.add_argument("run", type=Path)
    steps.add_argument("out", type=Path)
    times = commands.add_parser("time", help="how long a score takes; the machine should do nothing else (2 minutes)")
    times.add_argument("--out", type=Path, default=TIMES)
    times.add_argument("--rounds", type=int, default=15)
    for command in (one, steps, times):
        command.add_argument("--data", type=Path, default=DATA)
    page_of = commands.add_parser("report", help="write the page from the rows that are there")
    page_of.add_argument("--page", type=Path, default=RESULTS / "zreward-table.md")
    args = parser.parse_args()
    if args.command == "test":
        return test(args.scorer, args.out, data=args.data, reasoning=args.reasoning, run=args.run)
    if args.command == "curve":
        return curve(args.scorer, args.run, args.out, data=args.data)
    if args.command == "time":
        make_data(args.data)
        return clock(args.out, data=args.data, rounds=args.rounds)
    results, page = RESULTS / "zreward-table", RESULTS / "zreward-table.md"
    if args.command == "report":
        page = args.page
    elif args.quick:
        folder = ROOT / "build/table-quick"
        results, page = folder / "results", folder / "zreward-table.md"
        make_data(folder / "judgements", QUICK_GROUPS)
        table = Table(folder, results, data=folder / "judgements", share=QUICK_SHARE)
        run(table, list(chosen(args.rows, seeds=1, controls=False)))
    else:
        make_data(DATA)
        run(Table(ROOT / "build/table", results), list(chosen(args.rows, seeds=args.seeds, controls=True)))
    report(results, page, [(row, row.seeds) for row in rows()], times=TIMES, world=WORLD)
    print(page)
    return None


if __name__ == "__main__":
    main()
