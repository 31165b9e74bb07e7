"""What of a reward is on this machine, and how to get the rest: read from its card and the hub's cache, nothing loaded.

Imports no torch: `rewards list` asks this of every reward, and `compare` before it draws for hours (`require`).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from rewardtune.data.references import PREFIX, cached_commit, offline_variable, pocket_path, resolve, why_not_loaded
from rewardtune.errors import MissingExtra, RecipeError
from rewardtune.plugins import RewardCard
from rewardtune.recipe.validate import missing_requirement

_PACKAGE = re.compile(r".+ \(([\w.-]+)\)")
_PATIENCE = 15.0
"""Seconds that the hub has to answer (ours)."""


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


def require(card: RewardCard, config: BaseModel) -> None:
    """Look for what one of our rewards needs with these options, so that its absence is told before long work.

    Raises MissingExtra for a package and RecipeError for weights that are neither here nor to be had. Weights that the
    hub's cache lacks are asked for at the hub, unless a variable forbids it; nothing is fetched. Silence is no promise:
    files may be damaged, and addresses other than the hub's are not tried.
    """
    if why := missing_requirement(card):
        raise MissingExtra(f"reward {card.name!r} {why}")
    for option, reference, revision in _references(card, config):
        try:
            where = resolve(reference)
        except RecipeError as error:
            raise RecipeError(f"reward {card.name!r}: {error}") from error
        if Path(where).exists() or _cached_files(where, revision or "main") is not None:
            continue
        whose = f"reward {card.name!r}: the weights of {option or 'its model'} {reference!r}"
        own = f"give a file or folder of your own as `{option}`" if option else "choose another reward"
        if variable := offline_variable():
            raise RecipeError(
                f"{whose} are not on this machine, and {variable} is set, so they cannot be fetched. Unset it where "
                f"there is a network, or {own}."
            )
        if why_not := _refused_by_hub(where, revision):
            raise RecipeError(
                f"{whose} are not on this machine and cannot be fetched from the hub: {why_not} Check the network and "
                f"your token, or {own}."
            )


def _references(card: RewardCard, config: BaseModel) -> Iterator[tuple[str | None, str, str | None]]:
    """(option, reference, revision) of every model that is loaded: those of the card, in their options' place where
    other ones are given, and what `checkpoint` and `model` name."""
    fields = type(config).model_fields
    models = dict(card.models)
    named = {option: str(field.default) for option, field in fields.items() if str(field.default) in models}
    for option in (*named, *(o for o in ("checkpoint", "model") if o in fields and o not in named)):
        reference = getattr(config, option)
        if not isinstance(reference, str):
            continue
        key = "revision" if option in ("checkpoint", "model") else f"{option}_revision"
        given: str | None = getattr(config, key, None)
        yield option, reference, given or models.get(reference)
    for model, revision in models.items():
        if model not in named.values() and _weights(model, revision).source == "hub":
            yield None, model, revision


def _refused_by_hub(repository: str, revision: str | None) -> str | None:
    """Why the hub will not give a model, in its own words; None where it knows it, or is there and says neither."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(repository, revision=revision, timeout=_PATIENCE)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        return why_not_loaded(error, repository)
    except HfHubHTTPError:
        return None  # mirrors that answer only for files
    except Exception as error:  # each release of the hub's client has another library's connection errors
        return why_not_loaded(error, repository)
    return None


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
    folder = _cached_files(repository, revision)
    return folder is not None and not any((folder.parents[1] / "blobs").glob("*.incomplete"))


def _cached_files(repository: str, revision: str) -> Path | None:
    """The folder in the hub's cache with files of a commit, branch or tag; None where there is none."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / (cached_commit(repository, revision) or revision)
    try:
        return snapshot if any(snapshot.iterdir()) else None
    except OSError:
        return None


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
