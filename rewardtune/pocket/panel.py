"""A simulated panel that rates pictures from 1.0 to 5.0 on the four dimensions, as a team of annotators would.

`dev/pocket/annotate.py` calls it. Pictures whose making is known are judged by that (`judge_recipe`), all others by
what the eye sees (`judge_picture`); both give one `Opinion`, from which every annotator makes ratings of their own.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from rewardtune.pocket import eye
from rewardtune.pocket.faults import FAULTS
from rewardtune.pocket.scenes import BACKGROUNDS, CONCEPTS, Scene

DIMENSIONS = ("alignment", "realism", "aesthetics", "plausibility")
Fact = Mapping[str, Any]
RELATION_MARGIN = 6.0
"""Pixels by which mean centres must differ for a relation to hold (renders: at least 20)."""
SMALL, LARGE = 24.0, 40.0
"""Sides in pixels: small below the first, large above the second (renders: 16-20, 29-34, 46-52)."""


@dataclass(frozen=True)
class Opinion:
    """What a careful person would say of a picture: a value from 1 to 5 per dimension, and what is wrong in words."""

    values: Mapping[str, float]
    wrong: tuple[str, ...] = ()
    """Claims of the prompt that the picture breaks, worst first."""
    flaws: tuple[str, ...] = ()
    """Flaws of the drawing, worst first."""


@dataclass(frozen=True)
class Annotator:
    """One member. Ratings are `mix` of all dimensions, stretched about 3.5 by `gain`, shifted, disturbed, rounded.

    bias: added, one number a dimension. noise: standard deviation of one rating. halo: share of the overall
    impression in each rating, weighed by `emphasis` (one number a dimension). lapse: chance of a careless rating.
    """

    name: str
    bias: tuple[float, float, float, float]
    noise: float
    gain: float
    halo: float
    emphasis: tuple[float, float, float, float]
    lapse: float


# ours: strict and lenient, careful and hasty, content-minded and craft-minded members
PANEL = (
    Annotator("ada", (0.0, 0.0, 0.0, 0.0), 0.20, 1.00, 0.05, (1.0, 1.0, 1.0, 1.0), 0.00),
    Annotator("ben", (-0.30, -0.30, -0.20, -0.25), 0.30, 1.10, 0.10, (2.0, 1.0, 0.5, 1.0), 0.01),
    Annotator("caro", (0.25, 0.20, 0.30, 0.20), 0.30, 0.85, 0.15, (1.0, 1.0, 2.0, 0.5), 0.01),
    Annotator("dan", (0.0, -0.20, -0.35, 0.0), 0.40, 1.00, 0.20, (0.5, 2.0, 2.0, 1.0), 0.02),
    Annotator("eli", (0.10, 0.0, 0.15, -0.15), 0.35, 1.05, 0.10, (1.0, 1.5, 0.5, 2.0), 0.01),
    Annotator("fay", (-0.10, 0.20, 0.0, 0.10), 0.55, 0.80, 0.30, (1.5, 1.0, 1.0, 1.0), 0.04),
)


def rate(opinion: Opinion, rng: random.Random) -> list[dict[str, float]]:
    """Every annotator's ratings of one picture, on half points from 1.0 to 5.0."""
    return [_one_rating(annotator, opinion, rng) for annotator in PANEL]


def aggregate(annotations: Sequence[Mapping[str, float]], *, trimmed: bool) -> dict[str, float]:
    """Mean per dimension; `trimmed` drops the highest and the lowest first (Z-Reward's test set)."""
    out = {}
    for name in DIMENSIONS:
        values = sorted(scores[name] for scores in annotations)
        if trimmed:
            values = values[1:-1]
        out[name] = round(sum(values) / len(values), 4)
    return out


def critique(opinion: Opinion, rng: random.Random) -> str:
    """One line of what an annotator would note: at most three things, the worst first."""
    notes = [*opinion.wrong[:2], *opinion.flaws[: 1 if len(opinion.wrong) > 1 else 2]]
    if not notes:
        return rng.choice(["everything asked for is there, cleanly drawn", "fits the text, no visible flaws",
                           "nothing to complain about"])  # fmt: skip
    if not opinion.wrong:
        notes.insert(0, rng.choice(["fits the text", "the content is right"]))
    elif not opinion.flaws:
        notes.append(rng.choice(["cleanly drawn", "otherwise clean"]))
    return "; ".join(notes)


def _one_rating(annotator: Annotator, opinion: Opinion, rng: random.Random) -> dict[str, float]:
    latent = np.array([opinion.values[d] for d in DIMENSIONS])
    overall = float(latent @ np.array(annotator.emphasis) / sum(annotator.emphasis))
    mixed = (1 - annotator.halo) * latent + annotator.halo * overall
    scores = 3.5 + annotator.gain * (mixed - 3.5) + np.array(annotator.bias)
    out = {}
    for name, score in zip(DIMENSIONS, scores.tolist(), strict=True):
        score += rng.gauss(0.0, annotator.noise)
        if rng.random() < annotator.lapse:
            score = rng.uniform(1.0, 5.0)
        out[name] = min(5.0, max(1.0, round(score * 2) / 2))
    return out


# ------------------------------------------------------------------------------------- pictures whose making is known


@dataclass(frozen=True)
class Fault:
    """A fault of `faults.FAULTS` that was applied: its severity, and `seen`, how much of it shows, both 0 to 1."""

    name: str
    severity: float
    seen: float = 1.0

    @property
    def damage(self) -> float:
        # even severity 0 leaves a trace
        return self.seen * (0.12 + 0.88 * self.severity)


def apply_fault(picture: Image.Image, name: str, severity: float, rng: random.Random) -> tuple[Image.Image, Fault]:
    """The picture with a fault, and the fault; a smear beside the objects or a cut through nothing hardly shows."""
    state = rng.getstate()
    out = FAULTS[name][0](picture, severity, rng)
    before, after = (np.asarray(p).astype(np.float32) for p in (picture, out))
    strength = np.abs(before - np.median(before.reshape(-1, 3), axis=0)).max(axis=2)
    if name == "smear":
        change = float(np.sqrt(((after - before) ** 2).mean() / max((strength**2).mean(), 1.0)))
        return out, Fault(name, severity, min(1.0, change / (0.08 + 0.16 * severity)))
    if name == "shear_halves":
        return out, Fault(name, severity, min(1.0, _crossed(strength > 30, state) / 10))
    return out, Fault(name, severity)


def _crossed(objects: np.ndarray[Any, Any], state: Any) -> int:
    """Pixels of objects through which `shear_halves` cuts; draws what it draws, in the same order."""
    twin = random.Random()
    twin.setstate(state)
    twin.choice([-1, 1])
    cut = twin.randint(18, 46)
    lines = objects if twin.random() < 0.5 else objects.T
    return int((lines[cut - 1] & lines[cut]).sum())


def clarity(faults: Sequence[Fault]) -> float:
    """How well objects can still be told under faults, 0 to 1; bent outlines soon make them something else."""
    clear = 1.0
    for fault in faults:
        if fault.name == "wobble":
            clear *= 1 - 1.1 * max(0.0, fault.damage - 0.4)
        elif fault.name in ("smear", "blur", "shear_halves"):
            clear *= 1 - 0.35 * fault.damage**2
    return clear


def judge_recipe(asked: Scene, drawn: Scene, faults: Sequence[Fault]) -> Opinion:
    """The opinion on a render of `drawn`, with `faults`, as an answer to the caption of `asked`."""
    facts = asked.facts()
    damage = {f.name: f.damage for f in faults}
    objects = [
        _Object(g.concept, g.tint, b.x, b.y, b.side) for b in drawn.boxes for g in [drawn.groups[b.group]]
    ]  # fmt: skip
    colour = 1.0 - 0.3 * damage.get("cast", 0.0)
    if "pale" in damage:
        colour *= min(1.0, max(0.0, (0.57 - 0.6 * damage["pale"]) / 0.35))
    ground = 1 - max(0.6 * damage.get("pale", 0.0), 0.9 * max(0.0, damage.get("cast", 0.0) - 0.2),
                     0.4 * damage.get("blotches", 0.0))  # fmt: skip
    trust = {"object": clarity(faults), "colour": colour, "background": ground}
    evidence = [
        float(ok) * trust.get(f["kind"], 1.0) if ok is not None else 1.0
        for f, ok in ((f, _holds(f, facts, objects, drawn.background)) for f in facts)
    ]
    alignment, wrong = _alignment(facts, evidence, objects, drawn.background)
    kept = [1.0, 1.0, 1.0]
    for fault in faults:
        for i, weight in enumerate(FAULTS[fault.name][1]):
            kept[i] *= 1 - 0.95 * weight * fault.damage
    values = dict(zip(DIMENSIONS, (alignment, *(1 + 4 * k for k in kept)), strict=True))
    worst = sorted((f for f in faults if f.damage > 0.25), key=lambda f: -f.damage)
    return Opinion(values, wrong, tuple(_FLAW_WORDS[f.name][f.damage > 0.6] for f in worst))


_FLAW_WORDS = {
    "blur": ("a little blurry", "very blurry"), "grain": ("grainy", "covered in noise"),
    "blotches": ("blotchy colours", "strong colour clouds"), "wobble": ("bent outlines", "shapes badly deformed"),
    "smear": ("partly smeared", "objects melt"), "pale": ("pale colours", "washed out, hardly any colour"),
    "cast": ("a colour cast", "a strong colour cast and shading"),
    "shear_halves": ("objects are cut and shifted", "objects break in two"),
    "ghosting": ("faint double contours", "everything is drawn twice"),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- alignment


@dataclass(frozen=True)
class _Object:
    concept: str
    tint: str | None
    x: float
    y: float
    side: float


def _of(objects: Sequence[_Object], concept: str) -> list[_Object]:
    return [o for o in objects if o.concept == concept]


def _holds(fact: Fact, facts: Sequence[Fact], objects: Sequence[_Object], background: str) -> bool | None:
    """Whether a claim holds; None where its object is missing, which is held against the object alone."""
    kind = fact["kind"]
    if kind == "background":
        return bool(fact["background"] == background)
    if kind == "relation":
        first, second = (_of(objects, fact[k]) for k in ("first", "second"))
        if not first or not second:
            return None
        return _distance(fact["relation"], first, second) > RELATION_MARGIN
    mine = _of(objects, fact["concept"])
    if kind == "object":
        return bool(mine)
    if not mine:
        return None
    if kind == "count":
        return bool(len(mine) == fact["count"])
    if kind == "colour":
        return all(o.tint == fact["tint"] for o in mine)
    side = max(o.side for o in mine)
    return bool(side < SMALL if fact["size"] == "small" else side > LARGE)


def _distance(relation: str, first: Sequence[_Object], second: Sequence[_Object]) -> float:
    """Pixels by which `first` stands on the claimed side of `second`."""
    dx = float(np.mean([o.x for o in first]) - np.mean([o.x for o in second]))
    dy = float(np.mean([o.y for o in first]) - np.mean([o.y for o in second]))
    return {"left": -dx, "right": dx, "above": -dy, "below": dy}[relation]


def _alignment(facts: Sequence[Fact], evidence: Sequence[float], objects: Sequence[_Object],
               background: str) -> tuple[float, tuple[str, ...]]:  # fmt: skip
    """Expected alignment, and what is wrong in words. `evidence`: chance that each fact holds.

    An object that is not there costs most, then colour and count, then relation, then size and background; claims
    about a missing object cost nothing more.
    """
    groups = sum(f["kind"] == "object" for f in facts)
    there = {f["concept"]: p for f, p in zip(facts, evidence, strict=True) if f["kind"] == "object"}
    relations = sum(f["kind"] == "relation" for f in facts)
    price = {"object": {1: 3.2, 2: 2.0, 3: 1.5}[groups], "count": 1.0, "colour": 1.0, "size": 0.6, "background": 0.6,
             "relation": 0.8 if relations < 2 else 0.5}  # fmt: skip
    total, wrong = 0.0, []
    for fact, p in zip(facts, evidence, strict=True):
        kind = fact["kind"]
        known = 1.0
        if kind == "relation":
            known = there[fact["first"]] * there[fact["second"]]
        elif kind not in ("object", "background"):
            known = there[fact["concept"]]
        cost = price[kind] * (1 - p) * known
        total += cost
        if p < 0.5 and known > 0.5:
            wrong.append((cost, _complaint(fact, facts, objects, background)))
    wrong.sort(key=lambda w: -w[0])
    return max(1.0, 5.0 - total), tuple(text for _, text in wrong)


def _complaint(fact: Fact, facts: Sequence[Fact], objects: Sequence[_Object], background: str) -> str:
    kind = fact["kind"]
    many = {f["concept"] for f in facts if f["kind"] == "count" and f["count"] > 1}
    if kind == "background":
        return f"the background is {background}, not {fact['background']}"
    concept = fact["first" if kind == "relation" else "concept"]
    noun, verb = (CONCEPTS[concept][1], "are") if concept in many else (concept, "is")
    if kind == "relation":
        words = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
        other = CONCEPTS[fact["second"]][1] if fact["second"] in many else fact["second"]
        return f"the {noun} {verb} not {words[fact['relation']]} the {other}"
    mine = _of(objects, concept)
    if kind == "object":
        return f"the {noun} {verb} missing"
    if kind == "count":
        have = f"is 1 {concept}" if len(mine) == 1 else f"are {len(mine)} {CONCEPTS[concept][1]}"
        return f"there {have}, not {fact['count']}"
    if kind == "colour":
        found = next((o.tint for o in mine if o.tint != fact["tint"]), None)
        wanted = fact["tint"] or ("in their own colours" if concept in many else "in its own colours")
        if found is None:
            return f"the {noun} {verb} not {wanted}"
        return f"the {noun} {verb} {found}, not {wanted}"
    return f"the {noun} {verb} not {fact['size']}"


# ------------------------------------------------------------------------------------------ pictures that must be seen


def judge_picture(picture: Image.Image, facts: Sequence[Fact]) -> Opinion:
    """The opinion on a 64 x 64 picture of which only the prompt's facts are known. About 50 ms on one core."""
    return judge_view(eye.look(picture, facts), facts)


def judge_view(view: eye.View, facts: Sequence[Fact]) -> Opinion:
    """The opinion on what the eye has seen, with the weights that `dev/pocket/calibrate_panel.py` fitted on renders."""
    weights = calibration()
    evidence, objects, background = read_view(view, facts)
    alignment, wrong = _alignment(facts, evidence, objects, background)
    values = {"alignment": alignment}
    inputs = hinges(view.measures)
    for name in DIMENSIONS[1:]:
        fitted = weights["quality"][name]
        penalty = float(inputs @ np.array(fitted["weights"])) + fitted["offset"]
        values[name] = min(5.0, max(1.0, 5.0 - penalty))
    return Opinion(values, wrong, _seen_flaws(view.measures, values))


@functools.cache
def calibration() -> dict[str, Any]:
    """The fitted weights, `panel.json` beside this file's data."""
    path = resources.files("rewardtune.pocket") / "data" / "panel.json"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def read_view(view: eye.View, facts: Sequence[Fact]) -> tuple[list[float], list[_Object], str]:
    """Chance that each fact holds, the objects that are there for sure enough, and the background's name."""
    w = calibration()["facts"]
    chances = [(s, _logistic(w["object"], s.score, s.score - s.rival)) for s in view.found]
    sure = [(s, p) for s, p in chances if p > 0.5]
    objects = [_Object(s.concept, s.tint, s.x, s.y, s.side) for s, _ in sure]
    distances = {name: math.dist(view.background, colour) for name, colour in BACKGROUNDS.items()}
    background = min(distances, key=lambda n: distances[n])
    evidence = []
    for fact in facts:
        kind = fact["kind"]
        if kind == "background":
            other = min(d for n, d in distances.items() if n != fact["background"])
            evidence.append(_logistic(w["background"], (other - distances[fact["background"]]) / 100.0))
        elif kind == "relation":
            first, second = (_of(objects, fact[k]) for k in ("first", "second"))
            gap = _distance(fact["relation"], first, second) if first and second else 0.0
            evidence.append(1 / (1 + math.exp(-(gap - RELATION_MARGIN) / 2.0)))
        else:
            mine = [(s, p) for s, p in chances if s.concept == fact["concept"]]
            claimed = next(f["count"] for f in facts if f["kind"] == "count" and f["concept"] == fact["concept"])
            evidence.append(_evidence({**fact, "count": claimed}, mine, w))
    return evidence, objects, background


def _evidence(fact: Fact, mine: Sequence[tuple[eye.Sight, float]], w: Mapping[str, Any]) -> float:
    kind = fact["kind"]
    if kind == "object":
        return max((p for _, p in mine), default=0.0)
    if not mine:
        return 0.0
    if kind == "count":
        ways = [1.0]
        for _, p in mine:
            ways = [a * (1 - p) + b * p for a, b in zip([*ways, 0.0], [0.0, *ways], strict=True)]
        return ways[fact["count"]] / max(1e-6, 1 - ways[0]) if fact["count"] < len(ways) else 0.0
    if kind == "colour":
        # as many as are claimed, the surest first: one of two in the wrong colour is half wrong
        surest = sorted(mine, key=lambda m: -m[1])[: fact["count"]]
        return sum(p * _logistic(w["colour"], *tint_margins(s, fact["tint"])) for s, p in surest) / max(
            1e-6, sum(p for _, p in surest)
        )
    side = max(mine, key=lambda m: m[1])[0].side
    edge = (SMALL - side) if fact["size"] == "small" else (side - LARGE)
    return 1 / (1 + math.exp(-edge / 1.5))


def tint_margins(sight: eye.Sight, tint: str | None) -> tuple[float, float]:
    """How much better this tint fits than the best other one: by the whole drawing, and by its mean colour."""
    fits = max((v for t, v in sight.tints.items() if t != tint), default=0.0)
    tones = min((v for t, v in sight.tones.items() if t != tint), default=1.0)
    return sight.tints.get(tint, 0.0) - fits, tones - sight.tones.get(tint, 1.0)


def _logistic(weights: Sequence[float], *inputs: float) -> float:
    total = weights[0] + sum(w * x for w, x in zip(weights[1:], inputs, strict=True))
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, total))))


# measure -> (value of a clean picture, direction in which it gets worse, knots)
_HINGES: dict[str, tuple[float, tuple[tuple[int, tuple[float, ...]], ...]]] = {
    "clouds": (0.0, ((1, (0.0, 0.01, 0.03, 0.08)),)),
    "grain": (0.0, ((1, (0.0, 0.01, 0.03, 0.08)),)),
    "junk": (0.0, ((1, (0.0, 0.02, 0.08)),)),
    "ramp": (0.0, ((1, (0.02, 0.08, 0.2)),)),
    "off": (0.0, ((1, (0.01, 0.04, 0.1)),)),
    "contrast": (1.0, ((-1, (0.02, 0.1, 0.3)), (1, (0.05, 0.2)))),
    "vivid": (1.0, ((-1, (0.03, 0.15, 0.4)), (1, (0.1, 0.3)))),
    "sharp": (1.0, ((-1, (0.02, 0.1, 0.2, 0.4)), (1, (0.1, 0.3, 0.6)))),
    "rest": (0.0, ((1, (0.15, 0.25, 0.4, 0.6)),)),
    "bent": (0.0, ((1, (0.15, 0.25, 0.4, 0.6)),)),
    "fit": (1.0, ((-1, (0.02, 0.06, 0.12, 0.25, 0.45)),)),
    "moved": (0.0, ((1, (0.2, 0.5, 1.0, 1.6)),)),
    "torn": (0.0, ((1, (0.3, 1.0, 2.0, 3.5)),)),
    "broken": (0.0, ((1, (0.02, 0.06, 0.12, 0.25)),)),
    "gone": (0.0, ((1, (0.02, 0.06, 0.12, 0.25)),)),
    "double": (0.0, ((1, (0.03, 0.1, 0.25)),)),
    "halo": (0.0, ((1, (0.01, 0.03, 0.08)),)),
    "unknown": (0.0, ((1, (0.05, 0.2, 0.4, 0.7)),)),
    "patchy": (0.0, ((1, (0.1, 0.2, 0.35)),)),
}


def hinges(measures: Mapping[str, float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each measure as ramps that start at given distances from the clean value; weights are never negative, so a
    rating can only fall as a flaw grows."""
    out = []
    for name, (clean, sides) in _HINGES.items():
        for direction, knots in sides:
            excess = direction * (measures[name] - clean)
            ends = [*knots[1:], knots[-1] * 2 + 0.3]
            out += [min(max(0.0, excess - knot), end - knot) / (end - knot)
                    for knot, end in zip(knots, ends, strict=True)]  # fmt: skip
    return np.array(out)


def _seen_flaws(measures: Mapping[str, float], values: Mapping[str, float]) -> tuple[str, ...]:
    """Words for the flaws that stand out, worst first."""
    m = measures
    strengths = {
        "blur": (1 - m["sharp"]) / 0.5 if m["grain"] < 0.03 else 0.0,
        "grain": m["grain"] / 0.1,
        "blotches": m["clouds"] / 0.1,
        "wobble": (m["bent"] - 0.3) / 0.5,
        "pale": (1 - min(m["contrast"], m["vivid"])) / 0.6,
        "cast": max(m["ramp"] / 0.3, m["off"] / 0.12),
    }
    worst = sorted((s, n) for n, s in strengths.items() if s > 0.3)[::-1]
    if min(values[d] for d in DIMENSIONS[1:]) > 4.4:
        return ()
    return tuple(_FLAW_WORDS[n][s > 0.7] for s, n in worst)
