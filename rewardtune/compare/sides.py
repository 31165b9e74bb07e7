"""What the command line names -> sides: a pipeline to load and, for most, a LoRA to put on it. No torch here.

First in the flow of `compare`; `sampling.py` loads what this file finds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from rewardtune.data.references import PREFIX, pocket_path
from rewardtune.diffusion import lora_files
from rewardtune.errors import RecipeError
from rewardtune.recipe.rewards import RewardSection
from rewardtune.recipe.sections import DirectRewardRecipe, PipelineSection, Recipe, SftRecipe
from rewardtune.recipe.suggest import closest
from rewardtune.recipe.validate import check_files
from rewardtune.training.run_folder import read_recipe

BASE = "base"
"""Names the start of the first run among the sides."""
LONGEST = 40
"""Characters of a side's name, without its scale: a column of a table. Ours."""
_OVERRIDE = re.compile(r"[a-z_]\w*(\.\w+)*=")
Diffusion = SftRecipe | DirectRewardRecipe
_LORA_FILES = (lora_files.DIFFUSERS, lora_files.PEFT)
_GIVE = (
    "Give `base`, the folder of a `rewardtune train --out`, an exported LoRA, or a pipeline "
    "(a folder, or owner/name of the hub)."
)


@dataclass(frozen=True)
class Side:
    """One contestant.

    name: unique, safe as a folder name. given: what the command line said. pipeline: what to load. lora: a folder with
    an exported LoRA, or None. recipe: what it was trained with, where that is known.
    """

    name: str
    given: str
    pipeline: PipelineSection
    lora: Path | None = None
    recipe: Diffusion | None = None
    scale: float | Literal["linear"] = 1.0
    """Of the LoRA; `linear`: from 0 to 1 over the denoising steps (`diffusion.rollout.sample`)."""
    known: bool = True
    """False where nothing tells which rewards the side was trained on."""
    run: Path | None = None
    """The run folder whose export this is."""

    @property
    def trained_on(self) -> list[RewardSection]:
        """The rewards in its objective."""
        return list(self.recipe.rewards) if isinstance(self.recipe, DirectRewardRecipe) else []


def resolve_sides(given: Sequence[str | Path]) -> list[Side]:
    """Sides in the order given. Raises RecipeError, with what was expected, for anything that cannot be compared."""
    references = [str(g) for g in given]
    if len(references) < 2:
        raise RecipeError(
            "compare needs at least two sides, e.g. `rewardtune compare base runs/demo --prompts prompts.txt`; "
            f"{len(references)} given."
        )
    repeated = sorted({r for r in references if references.count(r) > 1})
    if repeated:
        raise RecipeError(f"{', '.join(repeated)} is named twice; each side is compared once.")
    found = [None if reference == BASE else _resolve(reference) for reference in references]
    start = _start(found)
    sides = [side or start for side in found]
    known = {s.pipeline.model: s.pipeline for s in sides if s is not None and s.recipe is not None}
    out = []
    for side in sides:
        if side is None:
            raise RecipeError(
                "`base` is the start of a run among the sides, but no side is a run folder (one with recipe.json): "
                f"{', '.join(r for r in references if r != BASE) or 'there is no other side'}. Check the "
                "names, or name the starting pipeline itself instead of `base`."
            )
        # a plain pipeline that a run here started from is loaded with the same options as that run
        section = known.get(side.pipeline.model, side.pipeline) if side.recipe is None else side.pipeline
        for mistake in check_files({"pipeline": section.model_dump(mode="json")}):
            raise RecipeError(f"{side.given}: {mistake.message}")  # before another side has been drawn
        out.append(replace(side, pipeline=section))
    return [replace(side, name=name) for side, name in zip(out, _names(out), strict=True)]


def reference_side(sides: Sequence[Side]) -> Side:
    """The side that the others are measured against: `base` where it is one of them, else the first."""
    return next((side for side in sides if side.given == BASE), sides[0])


def first_recipe(sides: Sequence[Side]) -> Diffusion | None:
    """The recipe whose `compare:` section gives the defaults."""
    return next((side.recipe for side in sides if side.recipe is not None), None)


def read_run_recipe(folder: Path) -> Diffusion:
    """The resolved recipe of a run folder. Raises RecipeError where it is broken or trains no image model."""
    recipe = read_recipe(folder)
    if not isinstance(recipe, SftRecipe | DirectRewardRecipe):
        raise RecipeError(
            f"{folder} trained a reward model (task: {recipe.task}), which draws no images. "
            "`rewardtune evaluate --scorer` measures it."
        )
    return recipe


def _resolve(reference: str) -> Side:
    """What a side's name leads to, with the scale of its LoRA after an `@`."""
    name = _without_scale(reference)
    side = _found(name)
    if name == reference:
        return side
    scale = reference.removeprefix(f"{name}@")
    if side.lora is None:
        raise RecipeError(f"{reference}: {name} has no adapters, so there is nothing to scale; leave out @{scale}.")
    return replace(side, given=reference, scale=_scale(scale, reference))


def _scale(written: str, reference: str) -> float | Literal["linear"]:
    if written == "linear":
        return "linear"
    try:
        scale = float(written)
    except ValueError:
        scale = -1.0
    if not 0 <= scale <= 1:
        raise RecipeError(
            f"{reference}: after @ stands the scale of the adapters, a number from 0 (the start) to 1 (the tuned "
            "model), or `linear`, which raises it from 0 to 1 over the denoising steps."
        )
    return scale


def _found(reference: str) -> Side:
    """A run folder, an exported LoRA, or a pipeline (folder, hub id, pocket: name)."""
    folder = Path(reference).expanduser()
    if reference.startswith(PREFIX):
        pocket_path(reference)  # says what ships, where this does not
        return Side("", reference, PipelineSection(model=reference), known=False)
    if not folder.exists():
        if _OVERRIDE.match(reference):
            raise RecipeError(
                f"{reference}: compare takes no overrides, only sides. Its settings are options, such as --prompts and "
                "--seeds (`rewardtune compare --help`); what is left out comes from `compare:` of the recipe that the "
                "run was trained with."
            )
        # a hub id has two parts; `runs/nothere` beside other runs would pass for one
        beside = folder.parent != Path() and folder.parent.is_dir()
        if beside or reference.count("/") != 1 or reference.startswith((".", "~", "/")):
            raise RecipeError(_nowhere(reference, folder))
        return Side("", reference, PipelineSection(model=reference), known=False)
    if (folder / "recipe.json").is_file():
        return _from_export(reference, folder / "export", read_run_recipe(folder))
    if folder.is_dir() and (folder.parent / "recipe.json").is_file() and folder.name == "export":
        return _from_export(reference, folder, read_run_recipe(folder.parent))
    if (folder / "model_index.json").is_file():
        return Side("", reference, PipelineSection(model=str(folder)), known=False)
    if lora_file(folder) is not None:
        return _from_lora(reference, folder)
    raise RecipeError(
        f"{reference}: neither a run folder (recipe.json), nor an exported LoRA ({_LORA_FILES[0]}), nor a diffusers "
        f"pipeline (model_index.json). {_GIVE}"
    )


def _nowhere(reference: str, folder: Path) -> str:
    """What to say of a side that does not exist, however its name is written: where it was looked for, what to give."""
    above = folder.parent if folder.parent != Path() else Path.cwd()
    there = sorted(path.name for path in above.iterdir() if path.is_dir()) if above.is_dir() else []
    return f"{reference}: there is no such folder in {above}{closest(folder.name, there) or '.'} {_GIVE}"


def lora_file(folder: Path) -> Path | None:
    """The LoRA of a folder, which may be named itself too."""
    files = [folder / name for name in _LORA_FILES] if folder.is_dir() else [folder]
    return next((file for file in files if file.name in _LORA_FILES and file.is_file()), None)


def _from_export(reference: str, export: Path, recipe: Diffusion) -> Side:
    if (export / "model_index.json").is_file():
        section = recipe.pipeline.model_copy(update={"model": str(export), "revision": None})
        return Side("", reference, section, recipe=recipe, run=export.parent)
    if lora_file(export) is not None:
        return Side("", reference, recipe.pipeline, lora=export, recipe=recipe, run=export.parent)
    raise RecipeError(
        f"{reference}: the run has no finished export yet (looked in {export}). "
        "Run `rewardtune train` with the same recipe again to finish it."
    )


def _start(found: Sequence[Side | None]) -> Side | None:
    for side in found:
        if side is not None and side.recipe is not None:
            return Side("", BASE, side.recipe.pipeline)
    return None


def _from_lora(reference: str, folder: Path) -> Side:
    """A bare LoRA: its own metadata names the base model, and our exports carry their recipe."""
    from safetensors import SafetensorError, safe_open

    file = lora_file(folder)
    assert file is not None
    try:
        with safe_open(str(file), framework="numpy") as tensors:
            metadata: Mapping[str, str] = tensors.metadata() or {}
    except SafetensorError as error:
        raise RecipeError(f"{file}: not a whole safetensors file ({error}). Export the run again.") from error
    try:
        recipe: Any = TypeAdapter(Recipe).validate_json(metadata.get("rewardtune.recipe", ""))
    except ValidationError:
        recipe = None
    if isinstance(recipe, SftRecipe | DirectRewardRecipe):
        return Side("", reference, recipe.pipeline, lora=file.parent, recipe=recipe)
    model = metadata.get("rewardtune.base") or metadata.get("base_model")
    if not model:
        raise RecipeError(
            f"{folder}: the LoRA file does not say which model it belongs to. Compare its run folder instead."
        )
    section = PipelineSection(model=model, revision=metadata.get("rewardtune.base_revision"))
    return Side("", reference, section, lora=file.parent, known=False)


def _names(sides: Sequence[Side]) -> list[str]:
    """A short name for each side: the folder's, the model's or `base`, after as many of the folders above as tell it
    from the other sides, and its scale. A number comes last, and only where nothing else differs."""
    places = [_place(side) for side in sides]
    labels = _shortened({place: _label(place, places) for place in places})
    names: list[str] = []
    for side, place in zip(sides, places, strict=True):
        scale = f"-{side.scale}".removesuffix(".0") if _without_scale(side.given) != side.given else ""
        word = labels[place] + scale
        name, number = word, 2
        while name.lower() in map(str.lower, names):
            name, number = f"{word}-{number}", number + 1
        names.append(name)
    return names


def _without_scale(reference: str) -> str:
    name, at, _ = reference.rpartition("@")
    return name if at and not Path(reference).expanduser().exists() else reference


def _place(side: Side) -> tuple[str, ...]:
    """The folders down to a side, the last one its own; the parts of a hub id or of a `pocket:` name."""
    given = _without_scale(side.given)
    path = Path(given).expanduser()
    if given == BASE or not path.exists():
        return tuple(given.removeprefix(PREFIX).rstrip("/").split("/"))
    parts = Path(os.path.abspath(path)).parts[1:]  # links stay: they are names that somebody chose
    while len(parts) > 1 and parts[-1] in ("export", *_LORA_FILES):
        parts = parts[:-1]
    return parts


def _label(place: tuple[str, ...], places: Sequence[tuple[str, ...]]) -> str:
    """The last parts of a place, safe as a folder name; more than one where another place ends alike."""
    count = 1
    while count < len(place) and any(o != place and o[-count:] == place[-count:] for o in places):
        count += 1
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(place[-count:])).strip("-.") or "side"


def _shortened(labels: Mapping[tuple[str, ...], str]) -> dict[tuple[str, ...], str]:
    """Labels of at most LONGEST characters: their starts and ends, or, where these are alike, where they differ."""
    short = {place: _cut(label, len(label)) for place, label in labels.items()}
    for word in set(short.values()):
        alike = [place for place, found in short.items() if found == word]
        if len(alike) > 1:
            columns = zip(*(labels[place] for place in alike), strict=False)
            differing = next((i for i, letters in enumerate(columns) if len(set(letters)) > 1), 0)
            for place in alike:
                short[place] = _cut(labels[place], differing - LONGEST // 4)
    return short


def _cut(label: str, start: int) -> str:
    """The first third of a long label, and what of it begins at `start`, or earlier where it ends too soon."""
    if len(label) <= LONGEST:
        return label
    head = LONGEST // 3
    rest = LONGEST - head - len("..")
    start = max(head, min(start, len(label) - rest))
    return f"{label[:head].rstrip('-.')}..{label[start : start + rest].strip('-.')}"
