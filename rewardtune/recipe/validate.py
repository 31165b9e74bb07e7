"""Checks that need more than the schema, still without torch: do the parts named in a recipe exist and fit together?

`file.py` calls these on the plain data of a recipe, so that they speak even where the schema found mistakes.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rewardtune import gradients, registry
from rewardtune.data.references import PREFIX, fetched, pocket_path, resolve
from rewardtune.diffusion import families
from rewardtune.errors import DataError, PluginError, RecipeError, RewardTuneError
from rewardtune.plugins import RewardCard
from rewardtune.recipe.mistakes import Loc, Mistake, dotted, schema_mistakes, value_at
from rewardtune.recipe.packages import check_packages
from rewardtune.recipe.sections import DirectRewardRecipe, Recipe, RolloutSection
from rewardtune.recipe.suggest import closest

HEAD_BYTES = 1_000_000
"""Data files up to this size are read whole; of larger ones only the first rows, so that validate stays quick."""
HEAD_ROWS = 50


def check_joins(data: Mapping[str, Any]) -> list[Mistake]:
    """Rewards: known, loadable, differentiable where a task needs it, with options and dimensions of their own.
    Trackers and optimisers: their packages are installed."""
    mistakes: list[Mistake] = []
    for loc, entry in _reward_entries(data):
        if loc == _JUDGE:
            mistakes += _check_judge(entry["name"], entry["options"])
        elif isinstance(entry.get("name"), str):
            training = loc[0] == "rewards" and data.get("task") == "direct_reward"
            mistakes += _check_reward(loc, entry, training=training)
    if isinstance(judge := _judge(data), Mistake):
        mistakes.append(judge)
    family = value_at(data, ("pipeline", "family"))
    if isinstance(family, str):
        mistakes += _check_family(family, data)
    return [*mistakes, *check_packages(data)]


def unused(recipe: Recipe) -> tuple[str, ...]:
    """A sentence for settings that its author gave and that another one leaves without effect."""
    if not isinstance(recipe, DirectRewardRecipe) or recipe.rollout.guidance != "off":
        return ()
    # a scale of 0 or 1 is how families themselves say that there is no guidance
    rollout, given = recipe.rollout, recipe.rollout.model_fields_set
    idle = [f"rollout.guidance_scale {rollout.guidance_scale:g}"] if rollout.guidance_scale not in (0, 1) else []
    idle = [text for text in idle if "guidance_scale" in given]
    idle += ["rollout.negative_prompt"] if rollout.negative_prompt else []
    if not idle:
        return ()
    has, it = ("have", "them") if len(idle) > 1 else ("has", "it")
    return (
        f"{' and '.join(idle)} {has} no effect, since rollout.guidance is off; leave {it} out, or write rollout."
        "guidance: detached-negative or full.",
    )


def check_files(data: Mapping[str, Any]) -> list[Mistake]:
    """What a recipe refers to is there: models, data files (their first rows), rubrics. Fetches nothing."""
    mistakes: list[Mistake] = []
    model = value_at(data, ("pipeline", "model"))
    if isinstance(model, str):
        mistakes += _check_pipeline(model, data)
    mistakes += _refers(("scorer", "model"), data, resolve)
    mistakes += _refers(("scorer", "rubric"), data, _existing)
    mistakes += _refers(("teacher", "rubric"), data, _existing)
    if value_at(data, ("teacher", "server")) is None:
        mistakes += _refers(("teacher", "model"), data, resolve)
    for loc, kind in DATA_FILES.items():
        mistakes += _refers(loc, data, partial(_check_data_file, kind=kind))
    for at, entry in _reward_entries(data):
        options = entry.get("options")
        for key, value in options.items() if isinstance(options, dict) else ():
            if key in ("checkpoint", "model") or str(value).startswith(PREFIX):
                mistakes += _check_reference((*at, "options", key), value, resolve)
    return mistakes


# ------------------------------------------------------------------------------------------------------------ rewards


_PANELS: Sequence[Loc] = (("rewards",), ("guard", "rewards"), ("compare", "rewards"))
"""Where a recipe lists rewards."""
_JUDGE: Loc = ("compare", "judge")


def _reward_entries(data: Mapping[str, Any]) -> Iterator[tuple[Loc, Mapping[str, Any]]]:
    """Every reward of a recipe, the judge too, and its place."""
    for section in _PANELS:
        entries = value_at(data, section)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                yield (*section, index), entry
    judge = _judge(data)
    if judge is not None and not isinstance(judge, Mistake):
        yield _JUDGE, judge


def _judge(data: Mapping[str, Any]) -> Mapping[str, Any] | Mistake | None:
    """The judge of a comparison as an entry of its own; None where the name is that of a reward which `compare` scores
    with anyway, and which then judges as it is listed."""
    judge = value_at(data, _JUDGE)
    if not isinstance(judge, str):
        return None
    for section in (("rewards",), ("compare", "rewards")):
        entries = value_at(data, section)
        if any(value_at(entry, ("name",)) == judge for entry in (entries if isinstance(entries, list) else [])):
            return None
    from rewardtune.scoring.score import parse_spec

    try:
        name, options = parse_spec(judge)
    except RecipeError as error:
        return Mistake(_JUDGE, str(error))
    return {"name": name, "options": options}


def _check_judge(name: str, options: Mapping[str, Any]) -> list[Mistake]:
    try:
        plugin: Any = registry.rewards.load_class(name)
        whose = f"judge {name!r}, whose options follow its name as {name}:option=value"
        read_options(plugin.Config, options, whose=whose, listed_by=f"rewardtune rewards show {name}")
    except (PluginError, RecipeError) as error:
        return [Mistake(_JUDGE, str(error))]
    why = missing_requirement(plugin.card)
    return [Mistake(_JUDGE, f"reward '{name}' {why}")] if why else []


def _check_reward(loc: Loc, entry: Mapping[str, Any], *, training: bool) -> Iterator[Mistake]:
    name = entry["name"]
    try:
        plugin: Any = registry.rewards.load_class(name)
    except PluginError as error:
        yield Mistake((*loc, "name"), str(error))
        return
    card: RewardCard = plugin.card
    if training and not card.differentiable:
        yield Mistake(
            (*loc, "name"),
            f"reward '{name}' returns no gradient, so task direct_reward cannot train on it; move it to "
            "compare.rewards, where it judges the result",
        )
    if why := missing_requirement(card):
        yield Mistake((*loc, "name"), f"reward '{name}' {why}")
    yield from _check_options((*loc, "options"), entry.get("options"), plugin.Config)
    yield from _check_reduction(loc, entry, card)


def _check_reduction(loc: Loc, entry: Mapping[str, Any], card: RewardCard) -> Iterator[Mistake]:
    """`statistic` and `dimensions` speak of a distribution, which scalar rewards do not have."""
    if card.known_when_loaded:
        return  # `build_term` looks at the loaded one
    for key in ("statistic", "dimensions"):
        if entry.get(key) is not None and not card.dimensions:
            yield Mistake((*loc, key), f"{key} needs a distributional reward; '{card.name}' gives one number an image")
    wanted = entry.get("dimensions")
    if card.dimensions and isinstance(wanted, dict):
        # With options (another checkpoint, another rubric) the names are known only after loading.
        for name in wanted if not entry.get("options") else ():
            if name not in card.dimensions:
                guess = closest(str(name), card.dimensions)
                known = ", ".join(card.dimensions)
                yield Mistake(
                    (*loc, "dimensions", name), f"dimension '{name}' unknown in '{card.name}' (it has {known}){guess}"
                )
        if not any(wanted.values()):
            yield Mistake((*loc, "dimensions"), "at least one dimension needs a weight other than zero")
    threshold = value_at(entry, ("statistic", "threshold"))
    if isinstance(threshold, int | float) and card.range and not card.range[0] < threshold <= card.range[1]:
        low, high = card.range
        yield Mistake(
            (*loc, "statistic", "threshold"),
            f"a threshold of {threshold:g} is always or never reached by '{card.name}', whose values lie between "
            f"{low:g} and {high:g}; choose one above {low:g} and at most {high:g}",
        )


def missing_requirement(card: RewardCard) -> str | None:
    """`needs x, which is not installed: pip install ...` for the first module of the card that cannot be found."""
    for module in card.requires:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            package = f"'rewardtune[{card.extra}]'" if card.extra else module
            return f"needs {module}, which is not installed: pip install {package}"
    return None


def read_options(config: type[BaseModel], options: Mapping[str, Any], *, whose: str, listed_by: str) -> Any:
    """A plug-in's options as its own Config. Raises RecipeError in the words that recipes are corrected with."""
    try:
        return config(**options)
    except ValidationError as error:
        wrong = "; ".join(m.message for m in schema_mistakes(error, config, dict(options), at=("options",)))
        end = "" if wrong.endswith("?") else "."
        raise RecipeError(f"{whose}: {wrong}{end} `{listed_by}` lists its options.") from error


def _check_options(loc: Loc, options: Any, config: type[BaseModel]) -> list[Mistake]:
    """A plug-in's own options against its own Config."""
    if options is not None and not isinstance(options, dict):
        return []  # the schema has said so
    try:
        config.model_validate_json(json.dumps(options or {}), strict=True)
    except ValidationError as error:
        return schema_mistakes(error, config, options or {}, at=loc)
    return []


# ---------------------------------------------------------------------------------------------------------- pipelines


def _check_family(family: str, data: Mapping[str, Any]) -> list[Mistake]:
    try:
        plugin: Any = registry.pipelines.load_class(family)
    except PluginError as error:
        return [Mistake(("pipeline", "family"), str(error))]
    mistakes = _check_options(("pipeline", "options"), value_at(data, ("pipeline", "options")), plugin.Config)
    return mistakes + (list(_check_whole(family, data)) if hasattr(plugin, "rollout") else [])


def _check_whole(family: str, data: Mapping[str, Any]) -> Iterator[Mistake]:
    """What a family cannot do that runs its pipeline as a whole (`plugins.WholeRollout`)."""
    runs = f"the family '{family}' runs its pipeline as a whole"
    if data.get("task") == "sft":
        yield Mistake(("task",), f"{runs}, and sft needs single predictions; write task: direct_reward")
        return
    method = value_at(data, ("gradient", "method"))
    if method in gradients.METHODS and method not in gradients.CHOICES:
        wanted = " or ".join(gradients.CHOICES)
        yield Mistake(("gradient", "method"), f"{runs}, and {method} takes single steps; write {wanted}")
    if (value_at(data, ("rollout", "guidance")) or RolloutSection().guidance) == "detached-negative":
        told = "; write rollout.guidance: full, or off"
        yield Mistake(("rollout", "guidance"), f"{runs}, so no branch of its guidance can be without gradient{told}")


def _check_pipeline(model: str, data: Mapping[str, Any]) -> list[Mistake]:
    """A checkpoint on this machine is a diffusers folder of a known family that draws the asked-for size; a hub id that
    has not been fetched is not looked up."""
    loc: Loc = ("pipeline", "model")
    revision = value_at(data, ("pipeline", "revision"))
    try:
        path = Path(resolve(model))
    except RecipeError as error:
        return [Mistake(loc, str(error))]
    folder = path if path.exists() else fetched(model, families.INDEX, revision if isinstance(revision, str) else None)
    if folder is None:
        return []
    index_file = folder / families.INDEX
    if not index_file.is_file():
        return [
            Mistake(loc, f"{model} holds no model_index.json, so it is not a diffusers pipeline; give its top folder")
        ]
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return [Mistake(loc, f"{index_file} cannot be read: {error}")]
    if not isinstance(index, dict):
        return [Mistake(loc, f"{index_file} is not the index of a diffusers pipeline")]
    named = value_at(data, ("pipeline", "family"))
    family = families.recognised(index) if named is None else named
    if family is None:
        return [Mistake(loc, families.unrecognised(model, index))]
    try:
        plugin: Any = registry.pipelines.load_class(str(family))
    except PluginError:
        return []  # the join check has said so
    mistakes = []
    if named is None:  # else the join check has looked at them
        mistakes = _check_options(("pipeline", "options"), value_at(data, ("pipeline", "options")), plugin.Config)
    elif why := families.refusal(named, plugin, index):
        return [Mistake(("pipeline", "family"), why)]
    return mistakes + list(_check_size(plugin, folder, data))


def _check_size(plugin: Any, folder: Path, data: Mapping[str, Any]) -> Iterator[Mistake]:
    """Whether the family draws roll-outs of the asked-for size, as far as its checkpoint's files tell."""
    multiple = families.size_multiple(plugin, folder)
    if multiple is None:
        return
    for side in ("height", "width"):
        pixels = value_at(data, ("rollout", side))
        if type(pixels) is int and (why := families.misfit(side, pixels, family=plugin.family, multiple=multiple)):
            yield Mistake(("rollout", side), why)


# --------------------------------------------------------------------------------------------------------- data files


DATA_FILES: Mapping[Loc, str] = {
    ("data", "prompts"): "prompts",
    ("data", "manifest"): "captioned images",
    ("data", "records"): "preference records",
    ("data", "held_out"): "preference records",
    ("data", "images"): "images to judge",
    ("regularise", "sft", "manifest"): "captioned images",
    ("guard", "prompts"): "prompts",
    ("compare", "prompts"): "prompts",
}
_COLUMNS = {"prompts": ("prompt",), "captioned images": ("image", "caption"), "preference records": ("prompt",),
            "images to judge": ("prompt", "image")}  # fmt: skip


def _refers(loc: Loc, data: Mapping[str, Any], check: Callable[[str], object]) -> list[Mistake]:
    """Run a check on the reference at a place, if there is one."""
    return _check_reference(loc, value_at(data, loc), check)


def _check_reference(loc: Loc, reference: Any, check: Callable[[str], object]) -> list[Mistake]:
    if not isinstance(reference, str):
        return []
    try:
        check(reference)
    except RewardTuneError as error:
        return [Mistake(loc, f"{dotted(loc)}: {error}", data=isinstance(error, DataError))]
    return []


def _existing(reference: str) -> Path:
    path = pocket_path(reference) if reference.startswith(PREFIX) else Path(reference).expanduser()
    if path.is_dir():
        raise RecipeError(f"{reference!r} is a folder, and a file is wanted")
    if not path.is_file():
        raise RecipeError(f"there is no file {reference!r} (relative paths start at {Path.cwd()})")
    return path


def _check_data_file(reference: str, *, kind: str) -> None:
    path = _existing(reference)
    from rewardtune.data import records as data

    if path.stat().st_size <= HEAD_BYTES:
        readers: dict[str, Callable[[str], object]] = {
            "prompts": data.read_prompts,
            "captioned images": data.read_captioned_images,
            "preference records": data.read_records,
            "images to judge": partial(data.read_records, rated=False),
        }
        readers[kind](reference)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in zip(range(1, HEAD_ROWS + 1), lines, strict=False):
                _check_row(path, number, line, kind)


def _check_row(path: Path, number: int, line: str, kind: str) -> None:
    """Whether one row of a long file has the columns that its kind needs."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: this is not JSON: {error}") from error
    for column in _COLUMNS[kind]:
        if not isinstance(row, dict) or column not in row:
            raise DataError(f"{path}:{number}: a row of {kind} needs '{column}'")
