"""What people say of the pipeline's samples, as lessons for the held-out judge.

Drawings whose truth is known have faults of many kinds but not a diffusion model's own ones, so whether a person would
still name a drawing is learnt from people: pictures of training prompts, none of which is among the labels that measure
the judge (`oracle_labels.jsonl`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from label_sheet import pictures
from torch import Tensor

LABELS = Path(__file__).parent / "oracle_lessons.jsonl"
IMAGES = LABELS.with_suffix(".webp")
HELD_OUT = 0.2
"""Share of the pictures drawn by chance that choose nothing but the threshold and show the course (ours)."""
RATE, WEIGHT, MEMORY = 5e-4, 2.0, 0.98
"""Largest learning rate, how much a labelled batch counts beside a drawn one, and the decay of the running mean of the
weights, which is what is kept (ours)."""


@dataclass(frozen=True)
class Lesson:
    """One object that a caption asks for. picture: index; concept, tint: indices; named: the share of people who would
    name it."""

    picture: int
    concept: int
    tint: int
    named: float


def lessons(rows: Sequence[Mapping[str, Any]], names: Mapping[str, Sequence[Any]]) -> list[Lesson]:
    """Of label rows. `facts` and `person`: verdicts in the same order, null where two people differ at a glance, which
    teaches nothing. `heard`: how many agree, where it is more than one. `closer`: concept -> what one more person says
    who looked at this object alone, enlarged."""
    out = []
    for i, row in enumerate(rows):
        said = {(f["kind"], f.get("group")): v for f, v in zip(row["facts"], row["person"], strict=True)}
        for fact in row["facts"]:
            if fact["kind"] == "colour" and (named := said["object", fact["group"]]) is not None:
                votes = [named] * row.get("heard", 1)
                if fact["concept"] in row.get("closer", {}):
                    votes.append(row["closer"][fact["concept"]])
                concept, tint = names["concepts"].index(fact["concept"]), names["tints"].index(fact["tint"])
                out.append(Lesson(i, concept, tint, sum(votes) / len(votes)))
    return out


def load_lessons(names: Mapping[str, Sequence[Any]]) -> tuple[Tensor, list[Lesson], list[int]]:
    """Pictures (N, 3, 64, 64) in [0, 1], what people say of them, and which were drawn by chance: the others were
    `picked`, because a former tower was unsure of them."""
    rows = [json.loads(line) for line in LABELS.read_text().splitlines()]
    tiles = pictures(IMAGES)
    x = torch.stack([torch.from_numpy(np.array(tiles[row["image"]])).permute(2, 0, 1) for row in rows]).float() / 255
    return x, lessons(rows, names), [i for i, row in enumerate(rows) if not row.get("picked")]
