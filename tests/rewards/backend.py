"""What every reward is held to: the contract checks, on small random weights of its real classes, loaded as published.

One file of `backends/` a reward. `test_rewards.py` runs the checks over all of them and writes docs/rewards.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from rewardtune.types import Prompt


@dataclass(frozen=True)
class Backend:
    """A reward under test."""

    name: str
    """Its name in `rewards list`."""
    make: Callable[[Path], dict[str, Any]]
    """Writes small weights into a new folder, in the layout of the published files, and returns the options with which
    the reward loads them: what a recipe would write under `options:`."""
    prompts: Callable[[], Sequence[Prompt]] | None = None
    """Three or more, where the checks' own (the pocket world's, with its facts) lack what the reward needs."""
    logged: str | None = None
    """Its name once it is loaded, where that is another one."""
    images: Callable[[], Tensor] | None = None
    """(3, 3, H, W), where the reward has nothing to say of smooth noise."""


def backends() -> dict[str, Backend]:
    """Name of the reward, or of the file where one has several kinds -> Backend."""
    folder = Path(__file__).parent / "backends"
    names = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    return {name: import_module(f"backends.{name}").BACKEND for name in names}


def prompt_file(prompts: Sequence[Prompt], folder: Path) -> Path:
    """A .jsonl file as recipes read it."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(p), **p.metadata}) + "\n" for p in prompts))
    return file
