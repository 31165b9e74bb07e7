"""A published pickle made into safetensors once, so that nothing of it runs again: `rewardtune rewards convert`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rewardtune import __version__
from rewardtune.errors import RecipeError
from rewardtune.scoring.reward_set import load_reward

INSIDE = ("state_dict", "model", "module")
"""Where training code puts the weights when it saves more than these."""


def convert(
    reward: str,
    source: Path,
    out: Path | None = None,
    *,
    trust: bool = False,
    option: str = "checkpoint",
    **options: Any,
) -> Path:
    """Write the tensors of a checkpoint as safetensors, with the sha256 of the source in its header; returns the file.

    The reward is loaded from the new file before it is kept: `option` is the one that names its weights, `options` what
    it needs besides. trust: unpickle with everything that is in the file, which runs its code; without it, only what
    torch's weights-only reader takes is converted. Raises RecipeError: not there, not trusted, no weights in it, or
    those of another model; nothing is left behind then.
    """
    if not source.is_file():
        raise RecipeError(f"rewards convert: there is no file {source}.")
    target = out or source.with_suffix(".safetensors")
    if target.suffix != ".safetensors" or target.exists():
        wrong = "is there already" if target.exists() else "does not end with .safetensors"
        raise RecipeError(f"rewards convert: {target} {wrong}; name another file with --out.")
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    tensors = _tensors(_unpickled(source, digest=digest, trust=trust), source)
    header = {"format": "pt", "source": source.name, "source_sha256": digest, "reward": reward,
              "converted_by": f"rewardtune {__version__}"}  # fmt: skip
    # the suffix decides how a reward reads it
    draft = target.with_name(f".{target.stem}.{os.getpid()}.safetensors")
    try:
        # tensors that share memory, as tied weights do, may not stand in one such file
        save_file(
            {name: value.detach().clone().contiguous() for name, value in tensors.items()}, draft, metadata=header
        )
        load_reward(reward, **{**options, option: str(draft)})
        draft.replace(target)
    except RecipeError as error:
        raise RecipeError(str(error).replace(str(draft), str(source))) from error
    finally:
        draft.unlink(missing_ok=True)
    return target


def _unpickled(source: Path, *, digest: str, trust: bool) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise anything
        reason = error
    if not trust:
        raise RecipeError(
            f"rewards convert: {source} (sha256 {digest}) holds more than tensors, or is damaged. To read it whole is "
            "to run the code that is in it, with your rights, whatever it does. Only where you trust its authors and "
            "the place that you have it from, best after comparing the sha256 with theirs and in a container without "
            "network: say so with --trust."
        ) from reason
    try:
        return torch.load(source, map_location="cpu", weights_only=False)
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"rewards convert: {source} holds objects of the package {error.name!r}, which is not installed here. "
            "Convert it where its authors' code is installed, or ask them for a state dict."
        ) from error
    except Exception as error:
        raise RecipeError(
            f"rewards convert: {source} is damaged or no checkpoint ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Fetch it again."
        ) from error


def _tensors(found: Any, source: Path) -> dict[str, Tensor]:
    """The state dict in what a checkpoint held."""
    for name in INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping | nn.Module):
            found = found[name]
    if isinstance(found, nn.Module):
        found = found.state_dict()
    if not isinstance(found, Mapping) or not found:
        raise RecipeError(f"rewards convert: {source} holds no weights but {type(found).__name__}.")
    other = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if other:
        raise RecipeError(
            f"rewards convert: {source} holds things that are no tensors: {', '.join(other[:5])}. Save its state dict "
            "alone."
        )
    return {str(name): value for name, value in found.items()}
