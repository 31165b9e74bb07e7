"""Two or three sides with drawn pictures and made-up scores, as `compare` leaves them on disk; no model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rewardtune.compare.report import measure_diversity, report_id, summarise
from rewardtune.compare.sampling import Plan, image_file
from rewardtune.compare.scores import Scored
from rewardtune.compare.sides import Side
from rewardtune.recipe.sections import PipelineSection
from rewardtune.scoring.score import ImageScore
from rewardtune.types import Prompt

LEVELS = [1.0 + 0.5 * i for i in range(9)]


@dataclass
class Comparison:
    """What the stages after sampling work on."""

    folder: Path
    plan: Plan
    sides: list[Side]
    scored: list[Scored]

    def document(self, *, judge: str | None = "oracle") -> dict[str, Any]:
        names = [side.name for side in self.sides]
        diversity = measure_diversity(names, self.plan, self.folder)
        identity = report_id(names, self.plan, self.folder)
        return summarise(self.sides, self.plan, self.scored, diversity, judge=judge, report=identity)


def card(name: str, **other: Any) -> dict[str, Any]:
    return {"name": name, "higher_is_better": True, "range": [0.0, 1.0], **other}


def scalar(label: str, values: dict[str, Sequence[float]], **other: Any) -> Scored:
    """A scalar reward with these values."""
    images = {side: [ImageScore(float(v), {}) for v in column] for side, column in values.items()}
    settings: dict[str, Any] = {"options": {}, "trained": False, "tie_band": 0.02, "part_tie_bands": {}, **other}
    return Scored(label, card(label), images=images, **settings)


def oracle(facts: dict[str, Sequence[float]], clean: dict[str, Sequence[float]]) -> Scored:
    """A judge with two parts, and one that says nothing of any image."""
    images = {
        side: [
            ImageScore(0.75 * f + 0.25 * c, {"facts": float(f), "cleanliness": float(c), "facts/size": None})
            for f, c in zip(facts[side], clean[side], strict=True)
        ]
        for side in facts
    }
    return Scored("oracle", card("oracle"), {}, False, 0.02, {}, images)


def distributional(label: str, means: dict[str, Sequence[float]], *, trained: bool = True) -> Scored:
    """A reward with distributions over nine levels on two dimensions."""

    def score(mean: float) -> ImageScore:
        rows = []
        for shift in (0.0, 0.4):
            weight = np.exp(-((np.array(LEVELS) - mean - shift) ** 2) / 0.6)
            rows.append((weight / weight.sum()).tolist())
        found = {n: float(np.dot(row, LEVELS)) for n, row in zip(("alignment", "realism"), rows, strict=True)}
        return ImageScore(float(np.mean(list(found.values()))), {}, LEVELS, rows, found)

    images = {side: [score(m) for m in column] for side, column in means.items()}
    return Scored(label, card(label, range=[1.0, 5.0]), {}, trained, 0.08, {}, images)


def picture(prompt: int, seed: int, side: int, size: int = 32) -> Image.Image:
    rng = np.random.default_rng([prompt, seed, side])
    image = Image.new("RGB", (size, size), tuple(int(c) for c in np.random.default_rng(prompt).integers(100, 256, 3)))
    x, y = rng.uniform(0.2 * size, 0.7 * size, 2)
    ImageDraw.Draw(image).ellipse((x, y, x + size / 4, y + size / 4), fill=(20 + 40 * side, 30, 120))
    return image


def make(
    folder: Path,
    *,
    names: Sequence[str] = ("base", "tuned"),
    prompts: Sequence[str] | int = 6,
    seeds: int = 2,
    size: int = 32,
    rewards: Callable[[int, Sequence[str]], list[Scored]] | None = None,
    known: bool = True,
) -> Comparison:
    """Draw the pictures and make up the scores: by default the second side is better nearly everywhere."""
    texts = [f"prompt number {i}" for i in range(prompts)] if isinstance(prompts, int) else list(prompts)
    plan = Plan(tuple(Prompt(text) for text in texts), seeds=seeds)
    for j, name in enumerate(names):
        (folder / "images" / name).mkdir(parents=True)
        for p, k in plan.items:
            picture(p, k, j, size).save(folder / "images" / name / image_file(p, k))
    sides = [Side(name, name, PipelineSection(model="pocket:pipeline"), known=known) for name in names]
    scored = rewards(len(plan.items), names) if rewards is not None else default_rewards(len(plan.items), names)
    return Comparison(folder, plan, sides, scored)


def default_rewards(count: int, names: Sequence[str]) -> list[Scored]:
    rng = np.random.default_rng(0)
    facts = {name: np.clip(0.6 + 0.2 * j + rng.normal(0, 0.05, count), 0, 1) for j, name in enumerate(names)}
    clean = {name: np.clip(0.5 + 0.2 * j + rng.normal(0, 0.05, count), 0, 1) for j, name in enumerate(names)}
    means = {name: 3.0 + 0.5 * j + rng.normal(0, 0.2, count) for j, name in enumerate(names)}
    return [oracle(facts, clean), distributional("student", means)]  # type: ignore[arg-type]
