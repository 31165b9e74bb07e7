"""What of a reward is on this machine, and how to get the rest: read from its card and the hub's cache, nothing loaded.

Imports no torch: `rewards list` asks this of every reward.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from rewardtune.data.references import PREFIX, offline_variable, pocket_path
from rewardtune.errors import RecipeError
from rewardtune.plugins import RewardCard
from rewardtune.recipe.validate import missing_requirement

_PACKAGE = re.compile(r".+ \(([\w.-]+)\)")


@dataclass(frozen=True)
class Weights:
    """One model of a card. source: `shipped` with rewardtune, `package` that is installed, `hub`, `address` that is
    fetched once, `yours` (an option names it), `unknown`. at_hand: None where it shows only when the reward loads."""

    model: str
    version: str
    source: Literal["shipped", "package", "hub", "address", "yours", "unknown"]
    at_hand: bool | None


@dataclass(frozen=True)
class AtHand:
    """What `rewards list` says of a reward with its default options.

    missing: sentences, what keeps it from loading here and how to get it. needs_options: those without a default.
    to_fetch: models that the first use brings from the hub. offline: the variable that is set and forbids it.
    """

    weights: tuple[Weights, ...]
    needs_options: tuple[str, ...]
    to_fetch: tuple[str, ...]
    offline: str | None
    missing: tuple[str, ...]


def at_hand(card: RewardCard, config: type[BaseModel]) -> AtHand:
    """Look at packages, shipped files, the hub's cache and options."""
    weights = tuple(_weights(model, version) for model, version in dict(card.models).items())
    needed = tuple(name for name, field in config.model_fields.items() if field.is_required())
    absent = tuple(one.model for one in weights if one.source == "hub" and not one.at_hand)
    missing = [why] if (why := missing_requirement(card)) else []
    if needed:
        asked = ",".join(f"{name}=..." for name in needed)
        missing.append(f"needs {'options' if len(needed) > 1 else 'an option'}: {card.name}:{asked}")
    return AtHand(weights, needed, absent, offline_variable() if absent else None, tuple(missing))


def how_to_fetch(whose: Iterable[str], offline: str | None) -> str:
    """What to do about weights that the hub's cache lacks. whose: rewards, or models."""
    named = ", ".join(whose)
    own = "give a file or folder of your own (`model` or `checkpoint` among a reward's options)."
    if offline is None:
        return f"not fetched yet, comes from the hub at first use: {named}. Without a network, {own}"
    return f"not fetched, and {offline} is set, so it cannot be: {named}. Unset it where there is a network, or {own}"


def _weights(model: str, version: str) -> Weights:
    if model.startswith(PREFIX):
        return Weights(model, version, "shipped", _ships(model))
    if inside := _PACKAGE.fullmatch(model):
        return Weights(model, version, "package", importlib.util.find_spec(inside[1]) is not None)
    if model.startswith("github.com/"):
        return Weights(model, version, "address", None)
    if version == "local":
        return Weights(model, version, "yours", None)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return Weights(model, version, "hub", _is_cached(model, version))
    return Weights(model, version, "unknown", None)


def _ships(model: str) -> bool:
    try:
        pocket_path(model)
    except RecipeError:
        return False
    return True


def _is_cached(repository: str, revision: str) -> bool:
    """Whether the hub's cache holds files of this revision, and no download of them was broken off."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / revision
        return any(snapshot.iterdir()) and not any((folder / "blobs").glob("*.incomplete"))
    except OSError:
        return False


def in_words(found: Iterable[Weights]) -> str:
    """`hub, not yet fetched`: all the weights of a card in a few words."""
    told: dict[str, None] = {}
    for one in found:
        if one.source == "hub":
            told["hub, at hand" if one.at_hand else "hub, not fetched"] = None
        elif one.source == "package":
            told[f"in {_PACKAGE.fullmatch(one.model)[1]}"] = None  # type: ignore[index]  # matched when it was made
        elif one.source == "address":
            told["fetched once"] = None
        else:
            told[{"shipped": "shipped", "yours": "your own"}.get(one.source, "?")] = None
    if "hub, not fetched" in told:
        return "hub, not fetched"
    return "; ".join(told) or "none"
