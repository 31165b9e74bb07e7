"""`rewardtune compare` from start to end; `cli.py` and notebooks call `compare`.

Sampling, scoring, numbers and page each leave files in the output folder, and each reads what the one before left.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardtune import devices
from rewardtune.compare.page import write_page
from rewardtune.compare.report import add_votes, measure_diversity, report_id, signed, summarise
from rewardtune.compare.sampling import Plan, require_pipelines, sample_sides
from rewardtune.compare.scores import Panel, Scored, choose_rewards, read_scores, require_rewards, score_sides
from rewardtune.compare.sides import Side, first_recipe, resolve_sides
from rewardtune.compare.votes import read_votes
from rewardtune.errors import CheckFailed, DataError, RecipeError
from rewardtune.pages.files import plain, write_bytes
from rewardtune.recipe.rewards import RewardSection
from rewardtune.recipe.sections import CompareSection
from rewardtune.scoring.score import best_device, parse_spec, parse_specs
from rewardtune.training.run_folder import lock
from rewardtune.types import Prompt

FILE = "compare.json"


@dataclass(frozen=True)
class Report:
    """A finished comparison. document: what `compare.json` holds."""

    folder: Path
    document: dict[str, Any]

    @property
    def page(self) -> Path:
        return self.folder / "report.html"

    @property
    def headline(self) -> str:
        """The verdict in a few sentences, safe for a terminal."""
        return plain(self.document["headline"])

    @property
    def warnings(self) -> list[str]:
        """What to know before believing the headline, safe for a terminal; a sentence or two each."""
        return [plain(warning) for warning in self.document["warnings"]]

    def require(self, net: float) -> None:
        """Raises CheckFailed when the first pair's net win rate is below `net`, RecipeError without a verdict."""
        pair = next(iter(self.document["pairs"]), None)
        if pair is None:
            raise RecipeError("--fail-under needs a judge: this report has no verdict.")
        if pair["net"] < net:
            raise CheckFailed(
                f"net win rate of {pair['a']} over {pair['b']} is {signed(pair['net'])}, below "
                f"--fail-under {signed(net)} ({self.page})."
            )


def compare(
    sides: Sequence[str | Path] = (),
    *,
    prompts: str | Path | None = None,
    seeds: int | None = None,
    rewards: str | Sequence[str] | None = None,
    judge: str | None = None,
    out: str | Path | None = None,
    num_prompts: int | None = None,
    votes: Sequence[str | Path] = (),
    needs_verdict: bool = False,
    device: str | None = None,
) -> Report:
    """Draw the same prompts and seeds with each side, score the images, and write the report.

    sides: run folders, exported LoRAs, plain pipelines, or `base`, the start of the first run among them. What is left
    out comes from the `compare:` section of the first run's recipe; seeds: images a prompt. rewards: names or
    NAME:option=value specs, separated by commas; rewards that a side was trained on are always scored. out: the first
    run's `compare/`, or `compare/` here. votes: files from the page's blind mode; without sides they are merged into
    the report that is in `out`. needs_verdict: refuse to start without a judge (for `Report.require` afterwards).
    """
    # a shell turns `--votes *.json` into one option and further arguments
    votes = [*votes, *(s for s in sides if _is_vote_file(s))]
    sides = [s for s in sides if not _is_vote_file(s)]
    if not sides:
        return _merge(Path(out) if out is not None else None, votes)
    chosen = resolve_sides(sides)
    recipe = first_recipe(chosen)
    defaults = recipe.compare if recipe is not None else CompareSection()
    panel = _panel(chosen, defaults, rewards, judge)
    if needs_verdict and panel.judge is None:
        raise RecipeError("--fail-under needs a judge: name one with --judge.")
    plan = _plan(defaults, prompts=prompts, seeds=seeds, num_prompts=num_prompts)
    folder = Path(out) if out is not None else _folder(chosen)
    wanted = device or (recipe.train.device if recipe is not None else None)
    key = "--device" if device else "train.device of the first run"
    device = str(devices.find(wanted, key=key)) if wanted else best_device()
    names = [side.name for side in chosen]
    require_pipelines(chosen)
    require_rewards(panel, device=device)

    with _locked(folder), _told_what_is_kept(folder):
        script = Path(__file__).with_name("reproduce.py")
        write_bytes(folder / script.name, script.read_bytes())
        sample_sides(chosen, plan, folder, device=device)
        scored = score_sides(names, plan, folder, panel=panel, device=device)
        diversity = measure_diversity(names, plan, folder)
        identity = report_id(names, plan, folder)
        document = summarise(chosen, plan, scored, diversity, judge=panel.judge, report=identity)
        return _finish(folder, document, scored, plan, votes)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold its lock: of two comparisons in it, each would remove the other's images."""
    descriptor = lock(folder, "rewardtune compare")
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _told_what_is_kept(folder: Path) -> Iterator[None]:
    """An interruption that says what became of the images: whoever stops after an hour fears for them."""
    try:
        yield
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the progress line has no end yet
        raise KeyboardInterrupt(
            f"interrupted. The images drawn so far are kept in {folder / 'images'}, and the same command goes on "
            "from there."
        ) from None


def _finish(
    folder: Path, document: dict[str, Any], scored: Sequence[Scored], plan: Plan, votes: Sequence[str | Path]
) -> Report:
    """Merge votes, then write the two files that people and scripts read."""
    if votes:
        files = read_votes(
            votes, report=document["report"], sides=document["sides"], prompts=len(plan.prompts), seeds=plan.seeds
        )
        add_votes(document, files, scored, plan)
    write_bytes(folder / FILE, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    write_page(folder, document, scored, plan)
    return Report(folder, document)


def _merge(folder: Path | None, votes: Sequence[str | Path]) -> Report:
    """Votes into a report that is there already; nothing is drawn or scored again."""
    if not votes or folder is None:
        raise RecipeError(
            "compare needs sides, e.g. `rewardtune compare base runs/demo`; or, to merge votes into a finished report, "
            "`rewardtune compare --votes votes-*.json --out runs/demo/compare`."
        )
    if not (folder / FILE).is_file():
        raise DataError(
            f"{folder}: there is no finished comparison here to add votes to ({FILE} is missing). Name the folder of "
            "one with --out, or name its sides to finish it first."
        )
    with _locked(folder):
        document, plan = _read(folder)
        return _finish(folder, document, read_scores(folder), plan, votes)


def _read(folder: Path) -> tuple[dict[str, Any], Plan]:
    """What a finished comparison left in `folder`."""
    try:
        document: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        sampling, texts = document["sampling"], document["prompt_texts"]
        plan = Plan(
            prompts=tuple(Prompt(text) for text in texts),
            seeds=document["seeds"],
            steps=sampling["steps"],
            guidance_scale=sampling["guidance_scale"],
            embedded_guidance=sampling.get("embedded_guidance"),
            batch_size=sampling["batch_size"],
            size=tuple(sampling["size"]) if sampling["size"] else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / FILE}: not the document of a finished comparison ({type(error).__name__}: {error}). Run the "
            "comparison again with its sides."
        ) from error
    return document, plan


def _panel(
    sides: Sequence[Side], defaults: CompareSection, rewards: str | Sequence[str] | None, judge: str | None
) -> Panel:
    """What to score with: named here, else by the recipe; and whatever the sides were trained on."""
    if rewards is None:
        wanted = list(defaults.rewards)
    else:
        specs = parse_specs(rewards) if isinstance(rewards, str) else list(rewards)
        wanted = [RewardSection(name=name, options=options) for name, options in map(parse_spec, specs)]
    trained = [section for side in sides for section in side.trained_on]
    return choose_rewards(wanted, trained, judge or defaults.judge)


def _plan(defaults: CompareSection, *, prompts: str | Path | None, seeds: int | None, num_prompts: int | None) -> Plan:
    from rewardtune.data.records import read_prompts

    source = prompts if prompts is not None else defaults.prompts
    if source is None:
        raise RecipeError("compare needs prompts: give --prompts FILE, or `compare.prompts` in the recipe.")
    seeds = seeds if seeds is not None else defaults.seeds
    count = num_prompts if num_prompts is not None else defaults.num_prompts
    if seeds < 1:
        raise RecipeError(f"--seeds {seeds}: give 1 or more images of each prompt.")
    if count is not None and count < 1:
        raise RecipeError(f"{count} prompts asked for: give 1 or more.")
    return Plan(
        prompts=tuple(read_prompts(str(source))[:count]),
        seeds=seeds,
        steps=defaults.steps,
        guidance_scale=defaults.guidance_scale,
        embedded_guidance=defaults.embedded_guidance,
        batch_size=defaults.batch_size,
    )


def _is_vote_file(side: str | Path) -> bool:
    return Path(side).suffix == ".json"


def _folder(sides: Sequence[Side]) -> Path:
    """The first run's `compare/`, or `compare/` here."""
    for side in sides:
        folder = Path(side.given).expanduser()
        if side.recipe is not None and (folder / "recipe.json").is_file():
            return folder / "compare"
    return Path("compare")
