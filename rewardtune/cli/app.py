"""The command line: each command parses, then imports the function that does it. No torch before that.

Lists of what is there (rewards, pipelines, recipes, environment) are `lists.py`'s.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rewardtune import __version__
from rewardtune.cli import calibrate as _calibrate  # noqa: F401  # these hang themselves under `rewards`
from rewardtune.cli import convert as _convert  # noqa: F401
from rewardtune.cli import new as _new  # noqa: F401
from rewardtune.cli import probe as _probe  # noqa: F401
from rewardtune.cli.command import Json, command, printable, quiet_stdout, show, show_json, show_table
from rewardtune.cli.data import data
from rewardtune.cli.lists import add_lists
from rewardtune.cli.serve import serve
from rewardtune.errors import RecipeError, RewardTuneError

app = typer.Typer(
    name="rewardtune",
    help="Post-train diffusion models with differentiable, distributional rewards, and compare honestly.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

DATA_SUFFIXES = (".jsonl", ".parquet", ".txt")


RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one: pocket/zreward")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key.path=value]...", help="Settings to change: train.steps=50")
]


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        show(f"rewardtune {__version__}")
        raise typer.Exit


# ----------------------------------------------------------------------------------------------------------- recipes


@command(app, "train")
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder; runs/<name> by default.")
    ] = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, do one step, save and reload it; leave nothing behind.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an existing run folder aside and start anew.")] = False,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option("--allow-changed", metavar="KEY", help="Continue although this key has changed. Repeatable."),
    ] = None,
) -> None:
    """Run a recipe. An unfinished run folder of the same recipe is continued from its newest valid checkpoint."""
    from rewardtune.recipe.file import load_recipe
    from rewardtune.registry import loaded_plugins

    loaded = load_recipe(recipe, overrides or (), files=True)
    from rewardtune.training.run import train_recipe

    folder = train_recipe(
        loaded,
        out=out,
        fresh=fresh,
        allow_changed=allow_changed or (),
        dry_run=dry_run,
        nproc=nproc,
        plugins=[plugin.source for plugin in loaded_plugins()],
    )
    if not dry_run:
        show(str(folder))


@command(app, "validate")
def validate(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [key.path=value]...", help="Recipes, or data files (.jsonl, .parquet, .txt)."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Check recipes (schema, joins, paths, first rows of data) or data files, without loading a model."""
    overrides = [word for word in given if "=" in word and not Path(word).exists()]
    results = [_validated(word, overrides) for word in given if word not in overrides]
    if not results:
        raise RecipeError("validate: name at least one recipe or data file.")
    if as_json:
        show_json([{key: value for key, value in result.items() if key != "exit_code"} for result in results])
    for result in results:
        for notice in result["notices"]:
            print(f"note: {printable(notice)}", file=sys.stderr)
        if not as_json and result["ok"]:
            show(f"ok: {result['summary']}")
        elif not result["ok"]:
            print(f"error: {printable(result['error'])}", file=sys.stderr)
    worst = [result["exit_code"] for result in results if not result["ok"]]
    if worst:
        raise typer.Exit(min(worst))


def _validated(word: str, overrides: list[str]) -> dict[str, Any]:
    """One entry of `validate --json`."""
    result: dict[str, Any] = {"file": word, "ok": True, "summary": "", "notices": [], "error": None, "exit_code": 0}
    try:
        if word.endswith(DATA_SUFFIXES):
            from rewardtune.data.records import validate_file

            result["summary"] = validate_file(word).describe()
        else:
            from rewardtune.recipe.file import load_recipe

            loaded = load_recipe(word, overrides, files=True)
            result["notices"] = list(loaded.notices)
            result["summary"] = f"{loaded.source}: task {loaded.recipe.task}, {loaded.recipe.train.steps} steps"
    except RewardTuneError as error:
        result |= {"ok": False, "error": str(error), "exit_code": error.exit_code}
    return result


@command(app, "audit")
def audit(
    recipe: RecipeName,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="a,b", help="NAME[:option=value,...] each; the usual ones by default."),
    ] = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Micro-batches to average over.")] = 4,
    as_json: Json = False,
) -> None:
    """Compare ways to take the reward gradient with the exact one: cosine, norm, seconds, memory. Trains nothing."""
    from rewardtune.recipe.file import load_recipe

    loaded = load_recipe(recipe, overrides or (), files=True)
    with quiet_stdout():
        from rewardtune.audit import audit as run_audit
        from rewardtune.scoring.score import best_device, parse_specs

        document = run_audit(
            loaded.recipe,  # type: ignore[arg-type]
            methods=parse_specs(methods) if methods else (),
            batches=batches,
            device=loaded.recipe.train.device or best_device(),
            progress=lambda what: print(what, file=sys.stderr),
        )
    if as_json:
        show_json(document)
        return
    show_table(
        ["method", "precision", "cosine", "per batch", "norm ratio", "seconds", "peak MiB"],
        [
            [row["method"], row["precision"], f"{row['cosine']:.4f}", f"{row['batch_cosine']:.4f}",
             f"{row['norm_ratio']:.3f}", f"{row['seconds']:.2f}", f"{row['peak_live_bytes'] / 2**20:.1f}"]
            for row in document["rows"]
        ],
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- judging


@command(app, "compare")
def compare(
    sides: Annotated[
        list[str] | None,
        typer.Argument(metavar="A B...", help="Run folders (RUN@0.6: at this scale), exports, pipelines, or `base`."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="One prompt a line, or .jsonl.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Images of each prompt.")] = None,
    num_prompts: Annotated[int | None, typer.Option("--num-prompts", min=1, help="Only the first so many.")] = None,
    rewards: Annotated[
        str | None, typer.Option("--rewards", metavar="a,b", help="Rewards to show, NAME[:option=value,...] each.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", metavar="NAME", help="The reward that gives verdicts.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Report folder; the first run's compare/ by default.")
    ] = None,
    votes: Annotated[
        list[Path] | None, typer.Option("--votes", metavar="JSON", help="Votes from the page's blind mode. Repeatable.")
    ] = None,
    fail_under: Annotated[
        float | None, typer.Option("--fail-under", help="Exit 1 when the first pair's net win rate is below this.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; the best one by default.")] = None,
    as_json: Json = False,
) -> None:
    """Draw the same prompts and seeds with each side, score the images, and write report.html and compare.json."""
    with quiet_stdout():
        from rewardtune.compare.run import compare as compare_sides

        report = compare_sides(
            sides or (),
            prompts=prompts,
            seeds=seeds,
            num_prompts=num_prompts,
            rewards=rewards,
            judge=judge,
            out=out,
            votes=votes or (),
            needs_verdict=fail_under is not None,
            device=device,
        )
    if as_json:
        show_json(report.document)
        for warning in report.warnings:
            print(f"warning: {printable(warning)}", file=sys.stderr)
    else:
        show(report.headline)
        for warning in report.warnings:
            show(f"warning: {warning}")
        show(str(report.page))
    if fail_under is not None:
        report.require(fail_under)


@command(app, "score")
def score(
    reward: Annotated[
        list[str], typer.Option("--reward", metavar="NAME[:option=value,...]", help="A name of `rewards list`.")
    ],
    images: Annotated[
        str, typer.Option("--images", metavar="PATH", help="A folder, a picture, or a manifest: rows with `image`.")
    ],
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="A line for each image in order, or one for all.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; the best one by default.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at once.")] = 8,
    as_json: Json = False,
) -> None:
    """Score images on disk, one row an image."""
    with quiet_stdout():
        from rewardtune.scoring.score import score_images

        if len(reward) > 1:
            raise RecipeError(
                f"score takes one --reward, not {len(reward)} ({', '.join(reward)}). Score with each in turn; "
                "`rewardtune rewards calibrate` sets several beside people's labels."
            )
        document = score_images(reward[0], images=images, prompts=prompts, device=device, batch_size=batch_size)
    if as_json:
        show_json(document)
        return
    dimensions = list(document["rows"][0]["dimensions"] or ())
    rows = [
        [row["image"], f"{row['value']:.4f}", *(f"{row['dimensions'][name]:.2f}" for name in dimensions)]
        for row in document["rows"]
    ]
    show_table(["image", document["reward"]["name"], *dimensions], rows)


@command(app, "evaluate")
def evaluate(
    scorer: Annotated[str, typer.Option("--scorer", metavar="DIR", help="A scorer's export, or pocket:zreward.")],
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Preference records (docs/data.md).")],
    reasoning: Annotated[
        int,
        typer.Option("--reasoning", metavar="N", min=0, help="Let it reason N times before each score; 0: one pass."),
    ] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option("--dtype", help="Of the weights; bfloat16 takes half the memory.")
    ] = "float32",
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; the best one by default.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a scorer against people: pair accuracies, correlations and calibration, with 95 % intervals."""
    with quiet_stdout():
        from rewardtune.scorer.evaluate import evaluate_scorer

        document = evaluate_scorer(scorer, data=data, device=device, reasoning=reasoning, dtype=dtype)
    if as_json:
        show_json(document)
        return
    names = [name for name in ("hpa", "margin_hpa", "near_hpa", "plcc", "srcc", "ece") if name in document]
    parts = {"pooled": document, **document.get("dimensions", {})}
    show_table(["", *names], [[part, *(_figure(numbers, name) for name in names)] for part, numbers in parts.items()])
    if reasoning:
        ended, empty = document["trace_ended"], document["trace_empty"]
        print(f"traces: {ended:.1%} ended by the scorer itself, the others cut off; {empty:.1%} empty; all are read")


def _figure(numbers: dict[str, Any], name: str) -> str:
    """`0.812 [0.790, 0.833]`, or a dash where the data allow no such figure."""
    value, interval = numbers.get(name), (numbers.get("ci95") or {}).get(name)
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


command(app, "serve")(serve)


# ----------------------------------------------------------------------------------------------------------- results


@command(app, "export")
def export(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to; the run's export/ by default.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="diffusers, or comfyui: adapters under its names.")
    ] = "diffusers",
    merge: Annotated[bool, typer.Option("--merge", help="A whole pipeline with the adapters folded in.")] = False,
    scale: Annotated[
        float, typer.Option("--scale", metavar="S", help="How much of the adapters to keep: near 0 the start, 1 all.")
    ] = 1.0,
    push: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Upload to the hub, OWNER/NAME; private when new.")
    ] = None,
) -> None:
    """Write a run's newest weights for other tools, with card and metadata; reloads them before it is done."""
    with quiet_stdout():
        from rewardtune.training.run import export_run

        folder = export_run(run, out=out, format=form, merge=merge, scale=scale, push=push)
    show(str(folder))


app.add_typer(data, name="data", no_args_is_help=True)
add_lists(app)


def main() -> None:
    """The console script and `python -m rewardtune`."""
    app()
