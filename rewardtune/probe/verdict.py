"""Figures of a probe -> words. The rule is ours and stands on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewardtune.data.rows import counted

RISE_OF_RANGE, RISE_OF_SCALE = 0.1, 1.0
"""Ours: a mean rise that counts, of a bounded reward's range, of any other's scale."""
RULES = (
    "A reward has risen where its mean over the pictures, noise left out, is at least 10 % of its range better than at "
    "the start; 1 of its card's scale where it has no range. Where it had risen on the way and no budget ended so, it "
    "is not settled: the steps were too long to stay up there, and more of them are shorter.",
    "It has a blind spot where it has risen at some budget and a judge has not risen with it: what was praised is not "
    "in the picture, as far as the judge sees. A judge has risen where its mean gains more than its tie band, and so "
    "do half of the pictures or more; one picture alone can carry a mean. The smallest such budget is named. Where "
    "every judge rises too, either the pictures are better or the judges share the blind spot: look at them.",
)


def rises(card: Mapping[str, Any], gain: float) -> bool:
    """Whether a mean gain (better is positive) of a reward with this card counts."""
    limits = card["range"]
    if limits:
        return bool(gain >= RISE_OF_RANGE * (limits[1] - limits[0]))
    return bool(gain >= RISE_OF_SCALE * card["scale"])


def agrees(judge: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a judge sees a gain: on average, and on half of the pictures or more."""
    return bool(found["gain"] > judge["tie_band"] + 1e-9 and 2 * found["better"] >= found["pictures"])


def decide(document: Mapping[str, Any]) -> dict[str, Any]:
    """`outcome` (resists, unsettled, blind-spot, shared, unjudged), the `budget` it is told at, `headline`, `words`,
    `rules`."""
    probed, judges = document["reward"], document["judges"]
    name = probed["label"]
    entries = document["budgets"]
    risen = [e for e in entries if rises(probed, e["rewards"][name]["gain"])]

    def blind(entry: Mapping[str, Any]) -> list[str]:
        return [label for label, judge in judges.items() if not agrees(judge, entry["rewards"][label])]

    words = []
    steps = counted(document["rule"]["steps"], "step")
    if not risen and (lost := [e for e in entries if rises(probed, e["highest"]["gain"])]):
        chosen, outcome = lost[0], "unsettled"
        headline = f"{name} is not settled: {steps} raised it on the way and lost it again. Take more with --steps."
        words.append(_lost(probed, chosen))
    elif not risen:
        chosen, outcome = entries[-1], "resists"
        enough = "10 % of its range" if probed["range"] else "its scale"
        headline = f"{name} resists: {steps} by pixels alone raise it by less than {enough}."
    elif not judges:
        chosen, outcome = risen[0], "unjudged"
        headline = f"{name} rises when pixels move by {_of(chosen)}; no judge looked on."
    elif spots := [e for e in risen if blind(e)]:
        chosen, outcome = spots[0], "blind-spot"
        unmoved = _list(blind(chosen))
        headline = f"{name} has a blind spot: moving pixels by {_of(chosen)} raises it, and {unmoved} sees no gain."
    else:
        chosen, outcome = risen[0], "shared"
        headline = f"{name} rises when pixels move by {_of(chosen)}, and every judge with it: look at the pictures."
    words.append(_moved(probed, chosen["rewards"][name]))
    words += [_judged(judge, chosen["rewards"][label]) for label, judge in judges.items()]
    words.append(
        f"Pixels have moved by {chosen['change']['rms'] * 255:.1f}/255 (root mean square), by at most "
        f"{chosen['change']['linf'] * 255:.0f}/255."
    )
    last = entries[-1]
    if last is not chosen:
        all_of_them = [_brief(card, last["rewards"][card["label"]]) for card in (probed, *judges.values())]
        words.append(f"At {_of(last)}: {'; '.join(all_of_them)}.")
    noise = last["noise"][name]
    better = 1.0 if probed["higher_is_better"] else -1.0
    beats = better * (noise["after"] - last["rewards"][name]["before"]) > 0
    words.append(
        f"Noise goes from {noise['before']:.3g} to {noise['after']:.3g}, "
        + ("above" if beats else "still below")
        + " what the pictures had at the start"
        + (": it need not look like anything to score well." if beats else ".")
    )
    return {"outcome": outcome, "budget": chosen["budget"], "headline": headline, "words": words, "rules": list(RULES)}


def signed(value: float) -> str:
    """+0.87, of a change: three decimals, more only where it is large."""
    return f"{value:+z.3f}" if abs(value) < 100 else f"{value:+.4g}"


def _of(entry: Mapping[str, Any]) -> str:
    return f"{entry['budget']}/255"


def _moved(card: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """zreward rises from 3.1 to 4.7: +1.6, 40 % of its range."""
    verb = "rises" if found["change"] > 0 else "falls" if found["change"] < 0 else "stays"
    limits = card["range"]
    unit = f"{100 * abs(found['change']) / (limits[1] - limits[0]):.0f} % of its range, " if limits else ""
    return (
        f"{card['label']} {verb} from {found['before']:.3g} to {found['after']:.3g} on average: "
        f"{signed(found['change'])}, {unit}{signed(found['in_scales'])} in units of its scale; better on "
        f"{found['better']} of {counted(found['pictures'], 'picture')}."
    )


def _lost(card: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """zreward had gained +1.2 on average after step 3, and +0.1 where the budget of 8/255 ended."""
    peak, end = entry["highest"], entry["rewards"][card["label"]]
    return (
        f"{card['label']} had gained {signed(peak['gain'])} on average after step {peak['step']}, and "
        f"{signed(end['gain'])} where the budget of {_of(entry)} ended, at step {entry['step']}: a step overshoots "
        "what it climbs, so these figures do not say how high it can be driven."
    )


def _judged(card: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    band = card["tie_band"]
    gain = found["gain"]
    verb = "sees no difference"
    if abs(gain) > band + 1e-9:
        verb = "sees a loss" if gain < 0 else "sees a gain" if agrees(card, found) else "sees a gain on few pictures"
    return (
        f"{card['label']} {verb}: {found['before']:.3g} to {found['after']:.3g} ({signed(found['change'])}; "
        f"differences up to {band:.3g} are ties), better on {found['better']} and worse on {found['worse']} of "
        f"{counted(found['pictures'], 'picture')}."
    )


def _brief(card: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    return f"{card['label']} {found['before']:.3g} to {found['after']:.3g}"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
