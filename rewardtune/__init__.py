"""Post-train diffusion models with differentiable, distributional rewards, and compare honestly.

What notebooks and plug-ins use is here by name and loads when it is first touched; importing the package costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewardtune.functions import register_reward_function as register_reward_function
    from rewardtune.registry import register_pipeline as register_pipeline
    from rewardtune.registry import register_reward as register_reward
    from rewardtune.scoring.reward_set import load_reward as load_reward

__version__ = "0.1.0"

_LAZY = {
    "load_reward": "rewardtune.scoring.reward_set",
    "register_reward": "rewardtune.registry",
    "register_reward_function": "rewardtune.functions",
    "register_pipeline": "rewardtune.registry",
}


def _train(
    recipe: str | Path,
    *,
    overrides: dict[str, Any] | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
) -> Path:
    """Run a recipe, `rt.train("pocket/zreward", overrides={"train.steps": 50})`, and return the run folder."""
    from rewardtune.recipe.file import format_overrides, load_recipe
    from rewardtune.training.run import train_recipe

    loaded = load_recipe(recipe, format_overrides(overrides or {}), files=True)
    return train_recipe(loaded, out=out, fresh=fresh)


def _compare(sides: Sequence[str | Path], **settings: Any) -> Any:
    """Compare sides on the same prompts and seeds: `rt.compare(["base", run], prompts="prompts.txt")`.

    Takes the keywords of `rewardtune.compare.run.compare` and returns what it returns.
    """
    from rewardtune.compare.run import compare

    return compare(sides, **settings)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    if name in _CALLED:
        return _CALLED[name]
    raise AttributeError(f"module 'rewardtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_CALLED})


_CALLED = {"train": _train, "compare": _compare}


class _CompareModule(ModuleType):
    __call__ = staticmethod(_compare)


class _Package(ModuleType):
    """The comparison is a package named `compare`, which importing binds to this one.

    It becomes callable then, so that `rt.compare(...)` works before and after.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name == "compare" and isinstance(value, ModuleType):
            value.__class__ = _CompareModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
