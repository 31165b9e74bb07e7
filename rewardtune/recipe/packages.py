"""Packages that a setting needs and an installation may lack: told with the recipe's other mistakes, before a model
loads. Rewards say on their card what they need (`validate.missing_requirement`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from rewardtune.recipe.mistakes import Mistake, value_at
from rewardtune.recipe.suggest import closest

OPTIMIZERS: Mapping[str, str | None] = {
    "adamw": None,
    "adamw8bit": "bitsandbytes",
    "muon": None,
    "prodigy": "prodigyopt",
}
"""Every `optimizer.name`, and the package it comes from where that is not torch or ours."""
TRACKERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "wandb": (("wandb",), "wandb"),
    "tensorboard": (("tensorboard", "tensorboardX"), "'rewardtune[tensorboard]'"),
}
"""Each tracker of `track`: modules of which one must be there, and what to tell pip."""


def check_packages(data: Mapping[str, Any]) -> Iterator[Mistake]:
    """What trackers and the optimiser of a recipe need is installed; imports none of it."""
    for tracker, (modules, pip) in TRACKERS.items():
        asked = value_at(data, ("track", tracker))
        if asked in (None, False, "off") or any(_installed(module) for module in modules):
            continue
        off = "false" if asked is True else "off"
        yield Mistake(
            ("track", tracker),
            f"track.{tracker} needs {modules[0]}, which is not installed: pip install {pip}; or write "
            f"track.{tracker}: {off}. The numbers are in the run's metrics.jsonl either way",
        )
    name = value_at(data, ("optimizer", "name"))
    if not isinstance(name, str):
        return
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        yield Mistake(
            ("optimizer", "name"), f"optimizer.name '{name}' is unknown (there are {known}){closest(name, OPTIMIZERS)}"
        )
    elif (package := OPTIMIZERS[name]) and not _installed(package):
        yield Mistake(
            ("optimizer", "name"),
            f"optimizer.name {name} needs {package}, which is not installed: pip install {package}",
        )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
