"""Commands that say what is there: `rewards`, `pipelines`, `recipes`, `schema`, `env`, `doctor`. None imports torch
to list something.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from rewardtune.cli.command import Json, command, quiet_stdout, show, show_json, show_table
from rewardtune.errors import CheckFailed, DataError, DiskError, PluginError, RecipeError
from rewardtune.registry import BUILT_IN

rewards = typer.Typer(help="Rewards: what there is, what each one is, and whether it keeps the contract.")
pipelines = typer.Typer(help="Families of text-to-image pipelines.")
recipes = typer.Typer(help="Recipes that ship with the package.")
RewardName = Annotated[str, typer.Argument(help="A name of `rewards list`.")]


# ------------------------------------------------------------------------------------------------------------ rewards


@command(rewards, "list")
def rewards_list(as_json: Json = False) -> None:
    """Every reward there is: built in, from installed packages, and from --plugin."""
    from rewardtune import registry

    rows = [reward_row(name) for name in registry.rewards.names()]
    if as_json:
        show_json(rows)
        return
    _show_rewards(rows, shutil.get_terminal_size((0, 0)).columns or None)  # None: a pipe or a file


PROSE = 100
"""Ours: columns of sentences."""


def _show_rewards(rows: list[dict[str, Any]], width: int | None) -> None:
    """A line of facts and one of what it measures for each, cut to `width`, then what is missing and how to get it."""
    from rewardtune.scoring.at_hand import how_to_fetch

    table = [["name", "gradient", "prompt", "range", "weights", "licence"]]
    table += [
        [row["name"], _yes_no(row["differentiable"]), _yes_no(row["needs_prompt"]), _range(row["range"]),
         _state(row), row["licence"] or "?"]
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for i, line in enumerate(table):
        cells = "  ".join(cell.ljust(wide) for cell, wide in zip(line, widths, strict=True))
        show(_cut(cells.rstrip(), width))
        if i:
            row = rows[i - 1]
            source = "" if row["source"] == BUILT_IN else f"from {row['source']}; "
            show(_cut(f"    {source}{row['summary'] or 'not known before it is loaded: rewards show NAME'}", width))
    show()
    prose = min(PROSE, width or PROSE)
    if absent := [row for row in rows if row["to_fetch"]]:
        _wrapped(how_to_fetch([row["name"] for row in absent], absent[0]["offline"]), prose)
    for row in rows:
        for why in row["missing"]:
            _wrapped(f"{row['name']} {why}", prose)
    _wrapped("`rewardtune rewards show NAME` tells all of one, with its options.", prose)


def _state(row: dict[str, Any]) -> str:
    if row["weights"] is None:
        return "?" if row["available"] else "no"
    from rewardtune.scoring.at_hand import Weights, in_words

    words = in_words(Weights(**one) for one in row["weights"])
    return words if row["available"] else f"no package; {words}"


def _cut(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else f"{text[: width - 1].rstrip()}…"


def _wrapped(text: str, width: int) -> None:
    show(textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False))


def reward_row(name: str) -> dict[str, Any]:
    """One entry of `rewards list --json`. A third party's code is not run for it: what only its card knows is None."""
    from rewardtune import registry

    row: dict[str, Any] = {
        "name": name,
        "source": registry.rewards.source(name),
        "summary": None,
        "differentiable": None,
        "needs_prompt": None,
        "range": None,
        "higher_is_better": None,
        "licence": None,
        "extra": None,
        "available": True,
        "why_not": None,
        "weights": None,
        "needs_options": None,
        "to_fetch": [],
        "offline": None,
        "missing": [],
    }
    why_not = registry.rewards.trouble(name)
    if why_not is None and registry.rewards.is_at_hand(name):
        from rewardtune.recipe.validate import missing_requirement
        from rewardtune.scoring.at_hand import at_hand

        try:
            card = registry.rewards.card(name)
            found = at_hand(card, registry.rewards.load_class(name).Config)
        except PluginError as error:
            why_not = str(error)
        else:
            row |= {
                "summary": card.summary,
                "differentiable": card.differentiable,
                "needs_prompt": card.needs_prompt,
                "range": list(card.range) if card.range else None,
                "higher_is_better": card.higher_is_better,
                "licence": _licence(card.licence_code, card.licence_weights),
                "extra": card.extra,
                **json.loads(json.dumps(dataclasses.asdict(found))),
            }
            why_not = missing_requirement(card)
    if why_not is not None and not row["missing"]:
        row["missing"] = [f"does not load: {why_not}"]
    return row | {"available": why_not is None, "why_not": why_not}


@command(rewards, "show")
def rewards_show(name: RewardName, as_json: Json = False) -> None:
    """One reward's card and the options that a recipe may give it."""
    from rewardtune import registry
    from rewardtune.scoring.at_hand import at_hand, how_to_fetch, in_words
    from rewardtune.scoring.score import card_document

    plugin: Any = registry.rewards.load_class(name)
    document = card_document(plugin.card) | {"source": registry.rewards.source(name)}
    if as_json:
        show_json(document | {"options": plugin.Config.model_json_schema()})
        return
    width = max(map(len, document))
    for key, value in document.items():
        show(f"{key:<{width}}  {_plain(value)}")
    if not plugin.card.commercial_use:
        code, weights = plugin.card.licence_code, plugin.card.licence_weights
        show(f"warning: its licence forbids commercial use (code: {code}; weights: {weights})")
    found = at_hand(plugin.card, plugin.Config)
    for one in found.weights:
        show(f"weights of {one.model}: {in_words([one])}")
    if found.to_fetch:
        show(how_to_fetch(found.to_fetch, found.offline))
    for why in found.missing:
        show(f"missing here: {why}")
    fields = plugin.Config.model_fields
    show("options:" if fields else "options: none")
    for key, field in fields.items():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        show(f"  {key} ({default}): {' '.join((field.description or '').split())}")


@command(rewards, "test")
def rewards_test(
    spec: Annotated[str, typer.Argument(metavar="NAME[:option=value,...]", help="A reward, with options.")],
    device: Annotated[str, typer.Option("--device", help="Where to run it.")] = "cpu",
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Three prompts or more, for a reward that needs metadata.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the contract checks on this machine: gradients, independence of the batch, sizes, precision, odd prompts."""
    from rewardtune import registry
    from rewardtune.scoring.score import parse_spec

    name, options = parse_spec(spec)
    registry.rewards.load_class(name)
    with quiet_stdout():
        from rewardtune.data.records import read_prompts
        from rewardtune.scoring.checks import COUNT, check_loaded

        given = read_prompts(prompts) if prompts is not None else None
        if given is not None and len(given) < COUNT:
            raise DataError(f"{prompts}: the checks need {COUNT} prompts, and there are {len(given)}.")
        checks = check_loaded(name, options, device=device, prompts=given)
    if as_json:
        show_json([{"check": check.name, "passed": check.passed, "found": check.found} for check in checks])
    else:
        # one cause may fail many checks; it is said once
        causes: dict[str, list[str]] = {}
        for check in checks:
            if check.passed:
                show(f"ok    {check.name}: {check.found}")
            else:
                causes.setdefault(check.found, []).append(check.name)
        for cause, names in causes.items():
            show(f"FAIL  {'; '.join(names)}: {cause}")
        show(f"{sum(check.passed for check in checks)} of {len(checks)} checks passed")
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise CheckFailed(f"reward {name!r} fails {len(failed)} of {len(checks)} checks: {'; '.join(failed)}.")


# ---------------------------------------------------------------------------------------------------------- pipelines


@command(pipelines, "list")
def pipelines_list(as_json: Json = False) -> None:
    """Families, and how each is recognised from a checkpoint's model_index.json."""
    from rewardtune import registry

    rows = [_pipeline_row(name) for name in registry.pipelines.names()]
    if as_json:
        show_json(rows)
        return
    table = [
        [r["name"], r["source"], r["recognised_by"] or "?", "yes" if r["available"] else r["why_not"]] for r in rows
    ]
    show_table(["name", "source", "recognised by", "available"], table)


def _pipeline_row(name: str) -> dict[str, Any]:
    from rewardtune import registry

    recognised_by = None
    why_not = registry.pipelines.trouble(name)
    if why_not is None and registry.pipelines.is_at_hand(name):
        try:
            plugin: Any = registry.pipelines.load_class(name)
            recognised_by = _first_line(plugin.matches.__doc__ or plugin.__doc__)
        except PluginError as error:
            why_not = str(error)
    return {
        "name": name,
        "source": registry.pipelines.source(name),
        "recognised_by": recognised_by,
        "available": why_not is None,
        "why_not": why_not,
    }


# ------------------------------------------------------------------------------------------------------------ recipes


@command(recipes, "list")
def recipes_list(as_json: Json = False) -> None:
    """Recipes that `rewardtune train NAME` runs."""
    from rewardtune.recipe.shipped import shipped_recipes

    rows: list[dict[str, Any]] = []
    for name, file in shipped_recipes().items():
        text = file.read_text(encoding="utf-8")
        task = re.search(r"^task:\s*(\w+)", text, re.MULTILINE)
        about = _about(text)
        rows.append({"name": name, "task": task[1] if task else None, "summary": _first_sentence(about),
                     "about": about, "path": str(file)})  # fmt: skip
    if as_json:
        show_json(rows)
    else:
        show_table(["name", "task", "summary"], [[r["name"], r["task"] or "?", r["summary"]] for r in rows])


@command(recipes, "show")
def recipes_show(name: Annotated[str, typer.Argument(help="A name of `recipes list`, or a file.")]) -> None:
    """The recipe's text."""
    from rewardtune.recipe.shipped import find_recipe, read_recipe

    show(read_recipe(find_recipe(name)).rstrip("\n"))


@command(recipes, "copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A name of `recipes list`.")],
    path: Annotated[Path, typer.Argument(help="A new file, or a folder to put it in.")],
) -> None:
    """Copy a shipped recipe beside your work, to edit it."""
    from rewardtune.recipe.shipped import find_recipe, read_recipe

    source = find_recipe(name)
    target = path / source.name if path.is_dir() else path
    if target.exists():
        raise RecipeError(f"{target} is there already; name another file, so that nothing is overwritten.")
    text = read_recipe(source)
    # Shipped recipes name the schema beside them; a copy elsewhere names the installed file.
    schema = (source.parent / found[1]).resolve() if (found := _SCHEMA.search(text)) else None
    if schema is not None and schema.is_file():
        text = _SCHEMA.sub(lambda match: match[0].replace(match[1], schema.as_uri()), text, count=1)
    if not target.parent.is_dir():
        raise DiskError(f"{target} cannot be written: {target.parent} is no folder. Make it first, or name another.")
    target.write_text(text, encoding="utf-8")
    show(str(target))


_SCHEMA = re.compile(r"^# yaml-language-server: \$schema=(\S+)", re.MULTILINE)


# ---------------------------------------------------------------------------------------------------- schema and such


def schema() -> None:
    """JSON Schema of a recipe, for editors: rewardtune schema > recipe.schema.json"""
    from rewardtune.recipe.file import recipe_schema

    show_json(recipe_schema())


def env(as_json: Json = False) -> None:
    """Versions and hardware, ready to paste into an issue."""
    from rewardtune.cli.environment import describe

    with quiet_stdout():
        facts = describe()
    if as_json:
        show_json(facts)
        return
    for key, value in facts.items():
        show(f"- {key}: {value}")


def doctor(as_json: Json = False) -> None:
    """Check this machine and installation; every failed check says how to mend it."""
    from rewardtune.cli.environment import diagnose

    with quiet_stdout():
        findings = diagnose()
    if as_json:
        show_json([{"check": f.check, "status": f.status, "found": f.found, "fix": f.fix} for f in findings])
    else:
        for finding in findings:
            show(f"{finding.status:<4}  {finding.check}: {finding.found}")
            if finding.fix:
                show(f"      {finding.fix}")
    failed = [finding.check for finding in findings if finding.status == "FAIL"]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}.")


def add_lists(app: typer.Typer) -> None:
    """Hang these commands into the program."""
    app.add_typer(rewards, name="rewards", no_args_is_help=True)
    app.add_typer(pipelines, name="pipelines", no_args_is_help=True)
    app.add_typer(recipes, name="recipes", no_args_is_help=True)
    command(app, "schema")(schema)
    command(app, "env")(env)
    command(app, "doctor")(doctor)


# ------------------------------------------------------------------------------------------------------------ wording


def _licence(code: str, weights: str) -> str:
    return code if weights in ("none", code) else f"{code}; weights: {weights}"


def _yes_no(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"


def _range(value: list[float] | None) -> str:
    return f"{value[0]:g} to {value[1]:g}" if value else "-"


def _plain(value: Any) -> str:
    if value is None or value == [] or value == () or value == {}:
        return "-"
    if isinstance(value, bool):
        return _yes_no(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} ({entry})" for key, entry in value.items())
    return str(value)


def _first_line(text: str | None) -> str | None:
    return text.strip().splitlines()[0].rstrip(".") if text and text.strip() else None


def _about(text: str) -> str:
    """The comment at the head of a recipe, without the line that is for the editor."""
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ").rstrip() for line in head if "yaml-language-server" not in line)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\S)\. +(?=[A-Z])", text, maxsplit=1)[0].removesuffix(".")
