"""Names of devices in recipes -> torch's, where this machine has them."""

from __future__ import annotations

import torch

from rewardtune.errors import RecipeError


def find(name: str, *, key: str) -> torch.device:
    """Raises RecipeError, naming the recipe's key, for what is no device and for one that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"{key} {name!r} is no device. Write cpu, cuda, cuda:1 or mps.") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise RecipeError(f"{key} {name!r} is not on this machine. {_there()} Name one of these, or leave it out.")
    return device


def _there() -> str:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return f"It has {', '.join(['cpu', *gpus, *(['mps'] if torch.backends.mps.is_available() else [])])}."
