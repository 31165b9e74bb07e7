"""Scores and votes -> `compare.json`: net win rates, means, diversity, warnings, and the headline in words.

After `scores.py`, before `page.py`; nothing here loads a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewardtune.compare import diversity as diversity_measure
from rewardtune.compare.guards import guard_curve
from rewardtune.compare.sampling import Plan, image_file
from rewardtune.compare.scores import Scored
from rewardtune.compare.sides import Side, reference_side
from rewardtune.compare.statistics import Clusters, Verdicts, clustered_mean, net_win_rate, verdicts
from rewardtune.compare.votes import VoteFile, judge_agreement, merge_votes, net_document
from rewardtune.pages.files import plain, sha256

FEW_PROMPTS = 50
"""Below this, intervals are wide and the bootstrap's own are a little short. Ours."""
DIVERSITY_FLOOR = 0.8
"""Diversity under this share of the reference's is warned about. Ours."""
HUMAN = "human"


def pairs_of(names: Sequence[str], reference: str) -> list[tuple[str, str]]:
    """(a, b) for every two sides: the others over the reference first, then later ones over earlier ones."""
    others = [name for name in names if name != reference]
    rest = [(a, b) for j, b in enumerate(others) for a in others[j + 1 :]]
    return [(a, reference) for a in others] + rest


def prompt_clusters(plan: Plan) -> Clusters:
    """(N,) the prompt of each image; repeated prompts are one."""
    first: dict[str, int] = {}
    for text in plan.prompts:
        first.setdefault(str(text), len(first))
    return np.array([first[str(plan.prompts[p])] for p, _ in plan.items], dtype=np.int64)


def judge_verdicts(scored: Scored, a: str, b: str) -> Verdicts:
    """(N,) verdicts of one reward for a over b."""
    return verdicts(scored.sign * scored.values(a), scored.sign * scored.values(b), band=scored.tie_band)


def report_id(sides: Sequence[str], plan: Plan, out: Path) -> str:
    """Names the images of a comparison, so that votes cannot be merged with other images."""
    digest = hashlib.sha256()
    for side in sides:
        for p, k in plan.items:
            digest.update(f"{side}/{image_file(p, k)}/{sha256(out / 'images' / side / image_file(p, k))}\n".encode())
    return digest.hexdigest()[:16]


def measure_diversity(sides: Sequence[str], plan: Plan, out: Path) -> dict[str, diversity_measure.Diversity]:
    """The diversity of each side's images."""
    from rewardtune.data.images import open_image

    owner = prompt_clusters(plan).tolist()
    return {
        side: diversity_measure.diversity(
            (open_image(out / "images" / side / image_file(p, k)) for p, k in plan.items), owner
        )
        for side in sides
        if len(owner) > 1
    }


def summarise(
    sides: Sequence[Side],
    plan: Plan,
    scored: Sequence[Scored],
    diversity: Mapping[str, diversity_measure.Diversity],
    *,
    judge: str | None,
    report: str,
) -> dict[str, Any]:
    """The document of `compare.json` (docs/compare.md lists its keys), without votes."""
    names = [side.name for side in sides]
    reference = reference_side(sides).name
    clusters = prompt_clusters(plan)
    judging = next((s for s in scored if s.label == judge), None)
    pairs = [_judged(judging, a, b, clusters) for a, b in pairs_of(names, reference)] if judging else []
    document: dict[str, Any] = {
        "format": 1,
        "report": report,
        "sides": names,
        "reference": reference,
        "prompts": len(plan.prompts),
        "seeds": plan.seeds,
        "judge": None
        if judging is None
        else {"name": judging.label, "held_out": not judging.trained, "tie_band": judging.tie_band},
        "pairs": pairs,
        "rewards": {name: {s.label: _reward(s, name, reference, clusters) for s in scored} for name in names},
        "reward_cards": {s.label: {**s.card, "trained": s.trained, "options": dict(s.options)} for s in scored},
        "guards": {side.name: curve for side in sides if (curve := guard_curve(side)) is not None},
        "diversity": {name: d.value for name, d in diversity.items()},
        "diversity_details": {name: _diversity(d, diversity[reference]) for name, d in diversity.items()},
        "votes": None,
        "side_details": {side.name: _side(side) for side in sides},
        "sampling": {
            "steps": plan.steps,
            "guidance_scale": plan.guidance_scale,
            **({} if plan.embedded_guidance is None else {"embedded_guidance": plan.embedded_guidance}),
            "batch_size": plan.batch_size,
            "size": plan.size,
        },
        "prompt_texts": [str(text) for text in plan.prompts],
    }
    document["warnings"] = warnings_of(document, sides, plan)
    document["headline"] = headline(document)
    return document


def add_votes(document: dict[str, Any], files: Sequence[VoteFile], scored: Sequence[Scored], plan: Plan) -> None:
    """Put people's net win rates into the document, in place of earlier ones."""
    pairs = [pair for pair in document["pairs"] if pair["judge"] != HUMAN]
    judging = next((s for s in scored if document["judge"] and s.label == document["judge"]["name"]), None)
    index = {item: i for i, item in enumerate(plan.items)}
    clusters = prompt_clusters(plan)
    cluster = {p: int(clusters[index[p, k]]) for p, k in plan.items}
    merged = []
    for a, b in pairs_of(document["sides"], document["reference"]):
        entry = merge_votes(files, a=a, b=b, cluster=cluster)
        if entry is not None:
            agreement = judge_agreement(files, judge_verdicts(judging, a, b), index, a=a, b=b) if judging else None
            pairs.append({"a": a, "b": b, "judge": HUMAN, **net_document(entry.pop("net"))})
            merged.append({"a": a, "b": b, **entry, "judge_agreement": agreement})
    document["pairs"] = pairs
    document["votes"] = {"files": len(files), "pairs": merged}
    document["headline"] = headline(document)


def headline(document: Mapping[str, Any]) -> str:
    """What came out, in a few sentences: the judge's verdict on the first pair, and people's."""
    first = next(iter(document["pairs"]), None)
    if first is None:
        return "No judge was named, so there is no verdict: look at the images, or vote in the blind mode."
    text = f"{verdict_words(first)} {count_words(first)}"
    if "facts" in first.get("parts", {}):
        facts = first["parts"]["facts"]
        low, high = facts["net_ci95"]
        text += f" On facts alone {percent(facts['net'])} ({percent(low)} to {percent(high)})."
    for pair in document["pairs"]:
        if pair is not first and pair["judge"] == HUMAN and (pair["a"], pair["b"]) == (first["a"], first["b"]):
            text += f" {count_words(pair)}"
    return text


def verdict_words(pair: Mapping[str, Any]) -> str:
    """`x is better than y.`, as far as the interval allows."""
    low, high = pair["net_ci95"]
    if low > 0:
        return f"{pair['a']} is better than {pair['b']}."
    if high < 0:
        return f"{pair['a']} is worse than {pair['b']}."
    return f"No clear difference between {pair['a']} and {pair['b']}."


def count_words(pair: Mapping[str, Any]) -> str:
    """Counts, net and interval in a sentence."""
    low, high = pair["net_ci95"]
    total = pair["wins"] + pair["ties"] + pair["losses"]
    who, unit = ("people", "votes") if pair["judge"] == HUMAN else (pair["judge"], "image pairs")
    return (
        f"Of {total} {unit}, {who} preferred {pair['a']} in {pair['wins']} and {pair['b']} in {pair['losses']}; "
        f"{pair['ties']} were ties. Net win rate {percent(pair['net'])} "
        f"(95 % interval {percent(low)} to {percent(high)})."
    )


def percent(value: float) -> str:
    """+41.3 %, with a sign unless it is zero."""
    text = f"{100 * value:+z.1f} %"
    return text[1:] if text == "+0.0 %" else text


def signed(value: float) -> str:
    """+0.413, with a sign unless it is zero, or rounds to it: -0.000 would claim a direction that is not there."""
    text = f"{value:+z.3f}"
    return text if float(text) else text[1:]


def warnings_of(document: Mapping[str, Any], sides: Sequence[Side], plan: Plan) -> list[str]:
    """What a reader should know before believing the headline."""
    out: list[str] = []
    cards, reference = document["reward_cards"], document["reference"]
    judge = document["judge"]
    if judge is None:
        out.append("No judge: name one with --judge, best a reward that no side was trained on.")
    elif not judge["held_out"]:
        out.append(
            f"The judge {judge['name']} is a reward that a side was trained on; a win under it can be exploitation of "
            "its weaknesses. Judge by a held-out reward or by people."
        )
    unknown = [side.name for side in sides if not side.known]
    if unknown:
        out.append(f"It is not known which rewards {_list(unknown)} was trained on, so `held out` may be wrong for it.")
    for name in document["sides"]:
        if name != reference:
            out += _exploitation(document["rewards"][name], cards, name, reference)
            out += _collapse(document["diversity_details"], name, reference)
    for pair in document["pairs"]:
        out += _one_sided(pair)
    different = len({str(text) for text in plan.prompts})
    if different < len(plan.prompts):
        out.append(f"{len(plan.prompts) - different} prompts are repeats of others; intervals count each text once.")
    if different < FEW_PROMPTS:
        out.append(f"Only {different} different prompts: intervals are wide. Use {FEW_PROMPTS} or more.")
    if plan.seeds < 2:
        out.append("One seed a prompt: diversity within a prompt cannot be seen. Use --seeds 2 or more.")
    return out


def _exploitation(rewards: Mapping[str, Any], cards: Mapping[str, Any], name: str, reference: str) -> list[str]:
    """The trained reward went up while a held-out one went down."""

    def moved(label: str, direction: int) -> bool:
        low, high = rewards[label]["delta_ci95"]
        sign = 1 if cards[label]["higher_is_better"] else -1
        return bool((low if direction * sign > 0 else -high) > 0)

    rose = [label for label, card in cards.items() if card["trained"] and moved(label, 1)]
    fell = [label for label, card in cards.items() if not card["trained"] and moved(label, -1)]
    if rose and fell:
        return [
            f"{name}: the trained reward {_list(rose)} rose over {reference}, but {_list(fell)}, which it was not "
            "trained on, got worse. This is what reward exploitation looks like; stop training earlier."
        ]
    return []


def _collapse(details: Mapping[str, Any], name: str, reference: str) -> list[str]:
    ratio = details.get(name, {}).get("ratio")
    if ratio is not None and ratio < DIVERSITY_FLOOR:
        return [f"{name}: its images are less varied, {ratio:.0%} of the diversity of {reference}."]
    return []


def _one_sided(pair: Mapping[str, Any]) -> list[str]:
    """The net is clearly positive but one part of the judge does not share it."""
    if pair["net_ci95"][0] <= 0:
        return []
    flat = [part for part, result in pair.get("parts", {}).items() if result["net_ci95"][0] <= 0]
    if not flat:
        return []
    return [
        f"{pair['a']} beats {pair['b']} under {pair['judge']}, but not clearly on its part {_list(flat)}: the win "
        "comes from the rest."
    ]


def _judged(scored: Scored, a: str, b: str, clusters: Clusters) -> dict[str, Any]:
    """One pair under the judge. A part whose name has a slash details another one and gets no net of its own."""
    result = net_document(net_win_rate(judge_verdicts(scored, a, b), clusters))
    parts = {}
    for part in scored.parts:
        first, second = scored.values(a, part), scored.values(b, part)
        there = np.isfinite(first) & np.isfinite(second)
        if "/" not in part and there.any():
            band = scored.part_tie_bands.get(part, 0.0)
            verdict = verdicts(scored.sign * first[there], scored.sign * second[there], band=band)
            parts[part] = net_document(net_win_rate(verdict, clusters[there]))
    return {"a": a, "b": b, "judge": scored.label, **result, "parts": parts}


def _reward(scored: Scored, side: str, reference: str, clusters: Clusters) -> dict[str, Any]:
    """One reward on one side: mean, and what it gained over the reference; the same for every part."""

    def figures(part: str | None) -> dict[str, Any] | None:
        values, start = scored.values(side, part), scored.values(reference, part)
        there = np.isfinite(values) & np.isfinite(start)
        if not there.any():
            return None
        mean = clustered_mean(values[there], clusters[there])
        delta = clustered_mean((values - start)[there], clusters[there])
        return {"mean": mean.mean, "ci95": list(mean.ci95), "delta": delta.mean, "delta_ci95": list(delta.ci95)}

    parts = {part: figures(part) for part in scored.parts}
    return {**(figures(None) or {}), "parts": {part: found for part, found in parts.items() if found is not None}}


def _diversity(own: diversity_measure.Diversity, reference: diversity_measure.Diversity) -> dict[str, Any]:
    return {
        "within": own.within,
        "between": own.between,
        "ratio": own.value / reference.value if reference.value > 0 else None,
        "version": diversity_measure.VERSION,
    }


def _side(side: Side) -> dict[str, Any]:
    return {
        "given": plain(side.given),
        "model": plain(side.pipeline.model),
        "revision": side.pipeline.revision,
        "lora": side.lora is not None,
        "task": side.recipe.task if side.recipe else None,
        "trained_on": sorted({r.name for r in side.trained_on}) if side.known else None,
    }


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
