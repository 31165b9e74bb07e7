"""`rewardtune rewards calibrate`, top to bottom: labels, scores, figures, verdict, page."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from rewardtune.calibration import comparison
from rewardtune.calibration.labels import Labels, read_labels
from rewardtune.calibration.page import render
from rewardtune.calibration.readings import Reading, check_before, read_rewards
from rewardtune.calibration.temperature import reliability
from rewardtune.calibration.verdict import decide, warnings_of
from rewardtune.compare.scores import choose_rewards
from rewardtune.data.records import read_records
from rewardtune.errors import RecipeError
from rewardtune.pages.files import Written, write_bytes
from rewardtune.recipe.rewards import RewardSection
from rewardtune.scoring.score import best_device, parse_spec

FILE, PAGE = "calibration.json", "calibration.html"


def calibrate(
    data: str | Path,
    rewards: Sequence[str],
    *,
    dimension: str | None = None,
    out: str | Path = "calibration",
    device: str | None = None,
    batch_size: int = 8,
    skip_failed: bool = False,
) -> Written:
    """Score a team's labelled pictures with every reward, and write `calibration.json` and `calibration.html`.

    data: preference records with scores, annotators' scores or choices. rewards: NAME[:option=value,...] each, of any
    kind. dimension: whose scores count; the mean over all when None. skip_failed: leave a picture that a reward fails
    on out for all of them. Raises DataError for labels that say too little, and whatever names a wrong reward.
    """
    if not rewards:
        raise RecipeError("calibrate needs a reward: --reward NAME, several times for several.")
    sections = [RewardSection(name=name, options=options) for name, options in map(parse_spec, rewards)]
    chosen = choose_rewards(sections, (), None).rewards
    groups = read_records(data)
    labels = read_labels(groups, dimension=dimension)
    labels.require()
    check_before(chosen, labels.pictures)
    readings = read_rewards(
        chosen, labels.pictures, device=device or best_device(), batch_size=batch_size, skip_failed=skip_failed
    )
    used = labels
    if any(reading.failures for reading in readings):
        used = labels.without(np.array([any(r.said[u] is None for r in readings) for u in range(len(labels.pictures))]))
        used.require()
    document = summarise(readings, used, data=str(data), groups=len(groups), device=device or best_device())
    document["verdict"] = decide(
        document["rewards"], document["differences"], document["between_rewards"]["error_correlation"]
    )
    document["warnings"] = warnings_of(document)
    folder = Path(out)
    write_bytes(folder / FILE, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    write_bytes(folder / PAGE, render(document).encode())
    return Written(folder, document, folder / PAGE)


def summarise(readings: Sequence[Reading], labels: Labels, *, data: str, groups: int, device: str) -> dict[str, Any]:
    """The document without its verdict and warnings."""
    between = comparison.between_rewards(readings, labels)
    return {
        "data": data,
        "groups": groups,
        "prompts": labels.prompts,
        "images": len(labels.pictures),
        "pairs": len(labels.overall),
        "stated_pairs": int(np.isinf(labels.overall.human).sum()),
        "dimensions": list(labels.dimensions),
        "overall": list(labels.counted),
        "skipped": {**labels.dropped, "failed": _failures(readings, labels)},
        "rewards": {reading.label: _reward(reading, labels, between) for reading in readings},
        "differences": comparison.differences(readings, labels),
        "between_rewards": between,
        "machine": _machine(device),
    }


def _reward(reading: Reading, labels: Labels, between: Mapping[str, Any]) -> dict[str, Any]:
    card = reading.card
    caught = {other: found for other, found in between["catches"][reading.label].items() if found is not None}
    return {
        "name": card["name"],
        "options": dict(reading.options),
        **{key: card[key] for key in ("differentiable", "higher_is_better", "range", "scale", "held_out")},
        **{key: card[key] for key in ("commercial_use", "licence_code", "licence_weights", "models")},
        **comparison.against_people(reading, labels),
        "caught_by": caught,
        "reliability": reliability(reading, labels),
        "cost": comparison.cost(reading),
    }


def _failures(readings: Sequence[Reading], labels: Labels) -> list[dict[str, Any]]:
    return [
        {"image": str(labels.pictures[f.picture].file), "prompt": str(labels.pictures[f.picture].prompt),
         "reward": f.reward, "why": f.why}
        for reading in readings
        for f in reading.failures
    ]  # fmt: skip


def _machine(device: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {"device": device, "name": name, "threads": torch.get_num_threads(), "torch": version("torch")}
