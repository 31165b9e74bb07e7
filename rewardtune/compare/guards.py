"""What a side's guard saw while it was trained, and which step it chose: for `compare.json` and the page."""

from __future__ import annotations

import json
from typing import Any

from rewardtune.compare.sides import Side
from rewardtune.guard.guard import FOLDER, read_looks
from rewardtune.guard.verdict import rule_of, verdict
from rewardtune.recipe.rewards import RewardSection
from rewardtune.training.run_folder import FINISHED


def guard_curve(side: Side) -> dict[str, Any] | None:
    """One entry a look: `step`, held-out `score` in standard deviations of the start's images, `trained` (the trained
    objective on the same images, or None), `diversity` as a share of the start's, `drift`; `min_diversity` and
    `max_drift`, the recipe's limits of the last two, None where it sets none; and what was chosen.

    None for a side whose run had no guard, or did not keep what it saw.
    """
    if side.run is None or side.recipe is None or side.recipe.guard is None:
        return None
    looks = read_looks(side.run / FOLDER)
    if not looks:
        return None
    found = verdict(looks, rule_of(side.recipe.guard))
    try:
        outcome = json.loads((side.run / FINISHED).read_text(encoding="utf-8"))["guard"]
    except (OSError, ValueError, KeyError):
        outcome = {}
    first = looks[0].diversity or 1.0
    return {
        "rewards": [_labelled(reward) for reward in side.recipe.guard.rewards],
        "looks": [
            {"step": look.step, "score": score, "trained": look.trained, "diversity": look.diversity / first,
             "drift": look.drift}
            for look, score in zip(looks, found.scores, strict=True)
        ],
        "min_diversity": side.recipe.guard.min_diversity,
        "max_drift": side.recipe.guard.max_drift,
        "action": side.recipe.guard.action,
        "exported_step": outcome.get("exported_step", looks[-1].step),
        "reasons": outcome.get("reasons", list(found.reasons)),
    }  # fmt: skip


def _labelled(reward: RewardSection) -> str:
    """With its options: the trained reward may be of the same name."""
    options = ", ".join(f"{name} {value}" for name, value in reward.options.items())
    return f"{reward.name} ({options})" if options else reward.name
