"""Figures -> words: which reward to train on, which to keep as judge, and what to doubt. The rules are ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewardtune.calibration.comparison import lead
from rewardtune.data.rows import counted

RULES = (
    "Train on the differentiable reward that orders most pairs as people do, if the 95 % interval of its pair accuracy "
    "lies above chance (50 %). Where its lead over another differentiable one is not resolved, the labels do not say "
    "which of the two is better, and cost or licence may decide.",
    "Keep as judge, of the rewards that are not trained on and whose interval lies above chance: those that are at "
    "most 5 points less accurate than the most accurate of them and not resolved to be worse, and of these the one "
    "whose errors correlate least with the trained one's. A judge that errs on the same pairs cannot see the trained "
    "reward being exploited.",
)
FEW_PROMPTS = 50
"""Ours, as in `compare`: with fewer prompts a bootstrap interval is a little too narrow."""
CLOSE = 0.05
"""Ours: how much accuracy may be given for errors of another kind. Few labels resolve little, so that without such a
limit a much worse judge would pass."""
MANY_TIES = 0.2
"""Ours: share of pairs that a reward finds equal, from which on a reader should know."""
CHANCE = 0.5


def share(value: float) -> str:
    """81.2 %"""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """+3.1 points, of a difference of shares."""
    return f"{100 * value:+z.1f} points"


def with_interval(figures: Mapping[str, Any], name: str = "hpa") -> str:
    """81.2 % (95 % interval 78.0 % to 84.1 %)"""
    low, high = figures["ci95"][name]
    return f"{share(figures[name])} (95 % interval {share(low)} to {share(high)})"


def decide(
    rewards: Mapping[str, Mapping[str, Any]], differences: Sequence[Mapping[str, Any]], errors: Mapping[str, Any]
) -> dict[str, Any]:
    """`train` and `judge`: each with `reward` (a label or None), `not_told_apart` and `words`; `rules`, `headline`.

    rewards: label -> its part of the document. errors: `error_correlation` of the document.
    """
    above = [label for label, r in rewards.items() if r["ci95"]["hpa"][0] > CHANCE]
    train = _train(rewards, differences, above)
    judge = _judge(rewards, differences, errors, above, train["reward"])
    parts = [f"Train on {train['reward']}." if train["reward"] else "None of these rewards is fit to train on."]
    parts.append(f"Keep {judge['reward']} as judge." if judge["reward"] else "None of them is fit to judge.")
    return {"headline": " ".join(parts), "train": train, "judge": judge, "rules": list(RULES)}


def _train(
    rewards: Mapping[str, Mapping[str, Any]], differences: Sequence[Mapping[str, Any]], above: Sequence[str]
) -> dict[str, Any]:
    able = [label for label in rewards if rewards[label]["differentiable"]]
    fit = sorted((label for label in able if label in above), key=lambda label: -rewards[label]["hpa"])
    if not fit:
        why = (
            "none of them gives a gradient; add a differentiable reward of `rewardtune rewards list`"
            if not able
            else f"no differentiable one ({', '.join(able)}) orders pairs of people better than chance"
        )
        return {"reward": None, "not_told_apart": [], "words": f"Nothing to train on: {why}."}
    best, others = fit[0], fit[1:]
    words = [f"{best} orders {with_interval(rewards[best])} of the pairs as people do"]
    close = [label for label in others if not lead(differences, best, label)[2]]
    if not others:
        words.append("and is the only differentiable reward here that does better than chance")
    for label in others:
        gap, (low, high), resolved = lead(differences, best, label)
        told = "which is resolved" if resolved else "which these labels do not resolve"
        words.append(f"{points(gap)} on {label} ({points(low)} to {points(high)}), {told}")
    return {"reward": best, "not_told_apart": close, "words": ", ".join(words) + "."}


def _judge(
    rewards: Mapping[str, Mapping[str, Any]],
    differences: Sequence[Mapping[str, Any]],
    errors: Mapping[str, Any],
    above: Sequence[str],
    trained: str | None,
) -> dict[str, Any]:
    fit = sorted((label for label in above if label != trained), key=lambda label: -rewards[label]["hpa"])
    if not fit:
        return {
            "reward": None,
            "not_told_apart": [],
            "words": "No judge: no other reward here orders pairs of people better than chance. Give a second one "
            "with --reward, or let people judge (`rewardtune compare`, blind vote).",
        }
    accurate = [fit[0]]
    for label in fit[1:]:
        gap, _, resolved = lead(differences, fit[0], label)
        if gap <= CLOSE and not resolved:
            accurate.append(label)

    def shared(label: str) -> float:
        found = errors[trained][label] if trained else None
        return found if found is not None else 0.0

    best = min(accurate, key=shared) if trained else fit[0]
    words = [f"{best} orders {with_interval(rewards[best])}"]
    if trained:
        words.append(f"and its errors correlate {shared(best):+z.2f} with those of {trained}")
        caught = rewards[trained]["caught_by"].get(best)
        if caught:
            words.append(
                f"of the {caught['pairs']} pairs that {trained} gets wrong, it gets {share(caught['share'])} right"
            )
    if not rewards[best]["differentiable"]:
        words.append("it gives no gradient, so that nothing can be trained on it by mistake")
    others = [label for label in accurate if label != best]
    if others:
        words.append(f"not told apart in accuracy from {', '.join(others)}")
    return {"reward": best, "not_told_apart": others, "words": "; ".join(words) + "."}


def warnings_of(document: Mapping[str, Any]) -> list[str]:
    """What a reader should doubt, in sentences."""
    found = []
    if document["prompts"] < FEW_PROMPTS:
        found.append(
            f"Only {document['prompts']} prompts have a pair that people order; with fewer than {FEW_PROMPTS} the "
            "intervals are a little too narrow."
        )
    for label, reward in document["rewards"].items():
        if reward["tied"] > MANY_TIES:
            found.append(
                f"{label} gives both pictures the same value in {share(reward['tied'])} of the pairs, which counts as "
                "wrong; where it tells them apart it may do better."
            )
        elif reward["ci95"]["hpa"][1] < CHANCE:
            found.append(
                f"{label} orders pairs against people ({with_interval(reward)}): what it likes, they dislike. See "
                "whether it has an option that turns it round."
            )
        if not reward["commercial_use"]:
            found.append(f"The licence of {label} forbids commercial use.")
        rel = reward["reliability"]
        if isinstance(rel, dict) and rel["at_limit"]:
            found.append(f"The temperature of {label} ends at a limit of the search; do not use it.")
    if failed := document["skipped"]["failed"]:
        pictures = len({row["image"] for row in failed})
        out = f"{counted(pictures, 'picture')} {'was' if pictures == 1 else 'were'} left out for all rewards"
        found.append(f"{out}, because one failed there (listed below).")
    if len(document["rewards"]) > 1 and len(document["differences"]) > 3:
        found.append(
            f"{len(document['differences'])} differences are tested at 95 % each; some will look resolved by chance."
        )
    return found
