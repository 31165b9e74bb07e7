"""Images on disk -> what every reward says of them: `scores.json` (everything) and `samples.csv` (a row an image).

Between `sampling.py` and `report.py`. Rewards see the 8-bit files, so the figures hold for what the page shows.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from rewardtune.compare.sampling import Plan, image_file, image_seed
from rewardtune.errors import DataError, MissingExtra, RecipeError
from rewardtune.pages.files import csv_cell, write_bytes
from rewardtune.progress import Progress
from rewardtune.recipe.rewards import RewardSection
from rewardtune.scoring.score import ImageScore, card_document, score_files

Floats = NDArray[np.float64]
FILE = "scores.json"
RELATIVE_TIE_BAND = 0.02
"""Tie band of a judge that names none, as a fraction of its range; 0 for an unbounded one. Ours."""


@dataclass(frozen=True)
class Scored:
    """One reward's view of every side.

    images: side -> N records in the order of `Plan.items`. trained: some side was trained on it. tie_band and
    part_tie_bands: differences up to these are ties; parts that are not named have band 0.
    """

    label: str
    card: Mapping[str, Any]
    options: Mapping[str, Any]
    trained: bool
    tie_band: float
    part_tie_bands: Mapping[str, float]
    images: Mapping[str, Sequence[ImageScore]] = field(default_factory=dict)

    @property
    def sign(self) -> float:
        """1, or -1 where a lower value is better."""
        return 1.0 if self.card["higher_is_better"] else -1.0

    @property
    def parts(self) -> list[str]:
        """Names of the numbers beside the value: the reward's own parts, then its dimensions."""
        first = next(iter(self.images.values()))[0]
        return list(dict.fromkeys([*first.parts, *(first.dimensions or {})]))

    def values(self, side: str, part: str | None = None) -> Floats:
        """(N,) values of a side, or of one part; NaN where a part says nothing of an image."""
        return np.array([_number(image, part) for image in self.images[side]], dtype=np.float64)


@dataclass(frozen=True)
class Panel:
    """What a comparison scores with.

    rewards: label -> reward, each once. trained: labels of those that a side was trained on. judge: a label, or None.
    """

    rewards: Mapping[str, RewardSection]
    trained: frozenset[str]
    judge: str | None


def choose_rewards(wanted: Sequence[RewardSection], trained: Sequence[RewardSection], judge: str | None) -> Panel:
    """The wanted rewards, those that a side was trained on, and a judge.

    Rewards are the same when their names and options (with defaults filled in) are; one that comes twice with other
    options is labelled with them. The judge is the named one, else the first wanted reward whose card says that it is
    held out and whose name no side was trained on, else the first not trained on. Raises PluginError for a name and
    RecipeError for options that are wrong, so that neither costs an image.
    """
    from rewardtune import registry

    rewards: dict[str, RewardSection] = {}
    labels: dict[str, str] = {}

    def add(section: RewardSection) -> str:
        settings = json.dumps([section.name, _config(section).model_dump()], sort_keys=True, default=str)
        if settings not in labels:
            label = section.name
            if label in rewards:
                label += ":" + ",".join(f"{k}={v}" for k, v in sorted(section.options.items()))
            rewards[label], labels[settings] = section, label
        return labels[settings]

    for section in wanted:
        add(section)
    # where one was beside the training says nothing of this machine
    trained_labels = frozenset([add(section.model_copy(update={"device": None})) for section in trained])
    if judge is not None:
        found = next((label for label, section in rewards.items() if judge in (label, section.name)), None)
        if found is None:
            from rewardtune.scoring.score import parse_spec

            name, options = parse_spec(judge)
            found = add(RewardSection(name=name, options=options))
        return Panel(rewards, trained_labels, found)
    names = {section.name for section in trained}
    free = [label for label, section in rewards.items() if section.name not in names]
    held_out = [label for label in free if registry.rewards.card(rewards[label].name).held_out]
    return Panel(rewards, trained_labels, next(iter([*held_out, *free]), None))


def require_rewards(panel: Panel, *, device: str) -> None:
    """Look whether every reward will load, before images are drawn for hours that it then cannot score.

    Weights are looked for and not loaded: a judge of billions of parameters beside the pipeline, or twice, costs more
    than it tells. The rewards of ours that stand for a server hold none, so these are loaded: `remote` asks its server.
    Others' code is left alone: what it needs, only loading would show. Raises what `reward_set.load_reward` does.
    """
    from rewardtune import devices, registry
    from rewardtune.recipe.validate import missing_requirement
    from rewardtune.scoring.at_hand import require
    from rewardtune.scoring.reward_set import load_section

    for section in panel.rewards.values():
        card = registry.rewards.card(section.name)
        if section.device is not None:
            devices.find(section.device, key=f"reward {section.name!r}: device")
        if registry.rewards.source(section.name) != registry.BUILT_IN:
            if why := missing_requirement(card):
                raise MissingExtra(f"reward {section.name!r} {why}")
        elif card.known_when_loaded:
            load_section(section, device=device)
        else:
            require(card, _config(section))


def _config(section: RewardSection) -> BaseModel:
    """A reward's options, checked, with defaults filled in."""
    from rewardtune import registry
    from rewardtune.recipe.validate import read_options

    plugin: Any = registry.rewards.load_class(section.name)
    config: BaseModel = read_options(
        plugin.Config, section.options, whose=f"reward {section.name!r}",
        listed_by=f"rewardtune rewards show {section.name}",
    )  # fmt: skip
    return config


def score_sides(
    sides: Sequence[str],
    plan: Plan,
    out: Path,
    *,
    panel: Panel,
    device: str,
) -> list[Scored]:
    """Score every image with every reward, one reward in memory at a time; writes both files."""
    from rewardtune.scoring.reward_set import load_section

    items = plan.items
    prompts = [plan.prompts[p] for p, _ in items]
    progress = Progress("scoring images", len(panel.rewards) * len(sides) * len(items))
    scored = []
    for label, section in panel.rewards.items():
        reward = load_section(section, device=device)
        images: dict[str, list[ImageScore]] = {}
        batch_size = section.batch_size or max(plan.batch_size, 8)
        for side in sides:
            files = [out / "images" / side / image_file(p, k) for p, k in items]
            images[side] = []
            for score in score_files(reward, files, prompts, device=device, batch_size=batch_size):
                images[side].append(score)
                progress.advance(1)
        band, part_bands = tie_bands(reward)
        scored.append(
            Scored(
                label=label,
                card=card_document(reward.card),
                options=section.options,
                trained=label in panel.trained,
                tie_band=band,
                part_tie_bands=part_bands,
                images=images,
            )
        )
        del reward
    write_bytes(out / FILE, (json.dumps([dataclasses.asdict(s) for s in scored]) + "\n").encode())
    write_bytes(out / "samples.csv", samples_csv(sides, plan, scored).encode())
    return scored


def read_scores(out: Path) -> list[Scored]:
    """What `score_sides` wrote."""
    try:
        document: Any = json.loads((out / FILE).read_text(encoding="utf-8"))
        return [
            Scored(**{**entry, "images": {s: [ImageScore(**i) for i in rows] for s, rows in entry["images"].items()}})
            for entry in document
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{out / FILE}: cannot be read ({error}). Run the comparison again with its sides.") from error


def tie_bands(reward: Any) -> tuple[float, dict[str, float]]:
    """The tie band of a reward's value and those of its parts.

    A reward fixes them as class constants `TIE_BAND: float` and `PART_TIE_BANDS: dict[str, float]`.
    """
    band = getattr(reward, "TIE_BAND", None)
    if band is None:
        limits = reward.card.range
        band = RELATIVE_TIE_BAND * (limits[1] - limits[0]) if limits else 0.0
    parts = dict(getattr(reward, "PART_TIE_BANDS", {}))
    if band < 0 or any(b < 0 for b in parts.values()):
        raise RecipeError(f"reward {reward.card.name!r} has a negative tie band; it must be 0 or more.")
    return float(band), parts


def samples_csv(sides: Sequence[str], plan: Plan, scored: Sequence[Scored]) -> str:
    """One row an image: where it is, how it was drawn, and every reward's value and parts."""
    columns: list[tuple[str, Scored, str | None]] = []
    for reward in scored:
        columns.append((reward.label, reward, None))
        columns += [(f"{reward.label}/{part}", reward, part) for part in reward.parts]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fixed = ["side", "prompt_index", "seed_index", "seed", "prompt", "image"]
    writer.writerow(fixed + [csv_cell(name) for name, _, _ in columns])
    for side in sides:
        for i, (p, k) in enumerate(plan.items):
            found = [_number(reward.images[side][i], part) for _, reward, part in columns]
            numbers = ["" if math.isnan(number) else repr(float(number)) for number in found]
            where = f"images/{side}/{image_file(p, k)}"
            writer.writerow([side, p, k, image_seed(p, k), csv_cell(str(plan.prompts[p])), where, *numbers])
    return text.getvalue()


def _number(image: ImageScore, part: str | None) -> float:
    if part is None:
        return image.value
    value = image.parts[part] if part in image.parts else (image.dimensions or {})[part]
    return float("nan") if value is None else value
