"""What the files of a checkpoint tell before a weight is loaded: whose family it is, and which sizes that one takes.

No torch here: `recipe/validate.py` asks about recipes, and `build.py` once more as a run starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rewardtune import gradients, registry
from rewardtune.errors import PluginError

INDEX = "model_index.json"


def recognised(index: Mapping[str, Any]) -> str | None:
    """The family that recognises the index of a checkpoint."""
    return next((name for name, plugin in _families() if plugin.matches(index)), None)


def unrecognised(model: str, index: Mapping[str, Any]) -> str:
    """What to say of a checkpoint that no family recognises, with a way out that leads somewhere."""
    told = (
        f"{model} is a {_kind(index)}, which no family recognises (there are {', '.join(registry.pipelines.names())})"
    )
    whole = [(name, refusal(name, plugin, index)) for name, plugin in _families() if hasattr(plugin, "rollout")]
    if able := [name for name, why in whole if why is None]:
        return (
            f"{told}. Name one with pipeline.family if it works alike. What is run as a whole (task direct_reward with "
            f"gradient.method {' or '.join(gradients.CHOICES)}) needs no family of its own: write pipeline.family: "
            f"{' or '.join(able)}"
        )
    reasons = "".join(f". {why}" for _, why in whole)
    return (
        f"{told}{reasons}. Give a text-to-image checkpoint; or, if these are the weights of one under another class, "
        "name its family with pipeline.family"
    )


def refusal(family: str, plugin: Any, index: Mapping[str, Any]) -> str | None:
    """Why a family cannot run the checkpoint of an index, where it can tell by that alone; None if nothing speaks
    against it."""
    why = plugin.refuses(index) if hasattr(plugin, "refuses") else None
    return None if why is None else f"pipeline.family {family}: {_kind(index)} {why}"


def size_multiple(plugin: Any, folder: Path) -> int | None:
    """What height and width must be multiples of for the checkpoint in a folder; None where only the loaded pipeline
    can tell."""
    if not hasattr(plugin, "size_multiple_of"):
        return None
    configs = {}
    for file in folder.glob("*/config.json"):
        with suppress(OSError, ValueError):  # whoever loads it says what is wrong with it
            configs[file.parent.name] = json.loads(file.read_text(encoding="utf-8"))
    try:
        multiple: int = plugin.size_multiple_of(configs)
    except (KeyError, TypeError):  # a part that is not there, or is not described as diffusers does
        return None
    return multiple


def misfit(side: str, pixels: int, *, family: str, multiple: int) -> str | None:
    """What to say of a height or width of roll-outs that a family would refuse or round; None for one that fits."""
    if pixels % multiple == 0:
        return None
    below = pixels // multiple * multiple
    nearest = f"The nearest are {below} and {below + multiple}" if below else f"The smallest is {multiple}"
    return (
        f"rollout.{side}: {pixels} pixels do not fit the family {family!r}, whose images are multiples of {multiple} "
        f"high and wide with this checkpoint. {nearest}"
    )


def _families() -> Iterator[tuple[str, Any]]:
    """Each family and its class. Somebody else's broken one must not hide another that fits; `doctor` tells of it."""
    for name in registry.pipelines.names():
        with suppress(PluginError):
            yield name, registry.pipelines.load_class(name)


def _kind(index: Mapping[str, Any]) -> str:
    return str(index.get("_class_name", "pipeline of unknown class"))
