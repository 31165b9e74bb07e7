"""What people say of the pipeline's samples, as lessons for the held-out judge's first tower.

`train_oracle.py` calls it after the tower has learnt from pictures whose truth is known. Those have faults of many
kinds but not a diffusion model's own ones, so whether a person would still name a drawing is learnt from people:
pictures of training prompts, none of which is among the labels that measure the judge (`oracle_labels.jsonl`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from label_sheet import pictures
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rewardtune.pocket.oracle import Objects
from rewardtune.randomness import choice

LABELS = Path(__file__).parent / "oracle_lessons.jsonl"
IMAGES = LABELS.with_suffix(".webp")
HELD_OUT = 0.2
"""Share of the pictures drawn by chance that choose nothing but the threshold and show the course (ours)."""
RATE, WEIGHT, MEMORY = 5e-4, 2.0, 0.98
"""Largest learning rate, how much a labelled batch counts beside a drawn one, and the decay of the running mean of the
weights, which is what is kept (ours)."""


@dataclass(frozen=True)
class Lesson:
    """One object that a caption asks for. picture: index; concept, tint: indices; named, tinted: what people say;
    the tint is heard only where the object is named."""

    picture: int
    concept: int
    tint: int
    named: bool
    tinted: bool


def lessons(rows: Sequence[Mapping[str, Any]], names: Mapping[str, Sequence[Any]]) -> list[Lesson]:
    """Of label rows: `facts` and `person`, verdicts in the same order; null where two people differ, which teaches
    nothing."""
    out = []
    for i, row in enumerate(rows):
        said = {(f["kind"], f.get("group")): v for f, v in zip(row["facts"], row["person"], strict=True)}
        for fact in row["facts"]:
            if fact["kind"] == "colour":
                tint = names["tints"].index(fact["tint"])
                named, tinted = said["object", fact["group"]], said["colour", fact["group"]]
                if named is not None:
                    out.append(Lesson(i, names["concepts"].index(fact["concept"]), tint, named, bool(tinted)))
    return out


def load_lessons(names: Mapping[str, Sequence[Any]]) -> tuple[Tensor, list[Lesson], list[int]]:
    """Pictures (N, 3, 64, 64) in [0, 1], what people say of them, and which were drawn by chance: the others were
    `picked`, because a former tower was unsure of them."""
    rows = [json.loads(line) for line in LABELS.read_text().splitlines()]
    tiles = pictures(IMAGES)
    x = torch.stack([torch.from_numpy(np.array(tiles[row["image"]])).permute(2, 0, 1) for row in rows]).float() / 255
    return x, lessons(rows, names), [i for i, row in enumerate(rows) if not row.get("picked")]


def moved(x: Tensor, g: torch.Generator) -> Tensor:
    """Each picture shifted by up to two pixels, a little lighter or darker, with a little noise: the same picture to a
    person."""
    wide = F.pad(x, (2, 2, 2, 2), mode="replicate")
    offsets = torch.randint(0, 5, (len(x), 2), generator=g).tolist()
    x = torch.stack(
        [p[:, dy : dy + x.shape[2], dx : dx + x.shape[3]] for p, (dy, dx) in zip(wide, offsets, strict=True)]
    )
    contrast = 1 + 0.1 * torch.randn(len(x), 1, 1, 1, generator=g)
    light = 0.03 * torch.randn(len(x), 1, 1, 1, generator=g)
    noise = 0.02 * torch.rand(len(x), 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
    return ((x - 0.5) * contrast + 0.5 + light + noise).clamp(0, 1)


def verdicts(maps: Mapping[str, Tensor], of: Sequence[Lesson], places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits (n,) that the asked concept is named and that it has the asked tint, each read where the tower sees most
    of it. places: row of each lesson's picture in `maps`."""
    row = torch.tensor(places)
    concept, tint = torch.tensor([k.concept for k in of]), torch.tensor([k.tint for k in of])
    names = maps["concept"].flatten(2).log_softmax(1)[row, concept]
    best = (names + F.logsigmoid(maps["heat"].flatten(1)[row])).detach().argmax(1)
    each = torch.arange(len(row))
    named = names[each, best].double()
    tinted = maps["tint"].flatten(2).log_softmax(1)[row, tint, best].double()
    named, tinted = (log - torch.log1p(-log.exp().clamp(max=1 - 1e-9)) for log in (named, tinted))
    return named.float(), tinted.float()


def loss_of_lessons(tower: Objects, x: Tensor, of: Sequence[Lesson], places: Sequence[int]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        maps = tower(x)[0]
    named, tinted = verdicts(maps, of, places)
    is_named, is_tinted = (torch.tensor([float(v) for v in values]) for values in
                           ([k.named for k in of], [k.tinted for k in of]))  # fmt: skip
    loss = F.binary_cross_entropy_with_logits(named, is_named)
    tint = F.binary_cross_entropy_with_logits(tinted, is_tinted, reduction="none")
    return loss + 0.5 * (tint * is_named).sum() / is_named.sum().clamp(min=1)


def teach(
    tower: Objects,
    names: Mapping[str, Sequence[Any]],
    drawn: Callable[[int], Tensor],
    *,
    steps: int,
    size: int,
    seed: int,
) -> list[dict[str, float]]:
    """Go on training `tower` in place on lessons, beside `drawn(step)`, the loss of pictures with known truth.

    Returns the course on held-out lessons, with the probability above which most people name the object.
    """  # fmt: skip
    x, every, typical = load_lessons(names)
    held = set(choice(seed, "lessons/split").sample(typical, int(HELD_OUT * len(typical))))
    own = sorted(set(range(len(x))) - held)
    by_picture: dict[int, list[Lesson]] = {}
    for lesson in every:
        by_picture.setdefault(lesson.picture, []).append(lesson)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=RATE, weight_decay=0.02, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 1), pct_start=0.1)
    mean = AveragedModel(tower, multi_avg_fn=get_ema_multi_avg_fn(MEMORY))
    course = []
    tower.requires_grad_(True)
    for step in range(steps + 1):
        if step % 50 == 0 or step == steps:
            course.append({"step": step, **look(mean.module, x, [k for k in every if k.picture in held])})
            print(course[-1], flush=True)
        if step == steps:
            break
        rng = choice(seed, "lessons", step)
        picked = rng.sample(own, min(size, len(own)))
        g = torch.Generator().manual_seed(rng.getrandbits(48))
        told = [(lesson, row) for row, i in enumerate(picked) for lesson in by_picture[i]]
        loss = WEIGHT * loss_of_lessons(tower, moved(x[picked], g), *zip(*told, strict=True))  # type: ignore[arg-type]
        optimizer.zero_grad()
        (loss + drawn(step)).backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        mean.update_parameters(tower)
    tower.load_state_dict(mean.module.state_dict())
    tower.requires_grad_(False)
    return course


@torch.no_grad()
def look(tower: Objects, x: Tensor, of: Sequence[Lesson]) -> dict[str, float]:
    """Agreement on naming at 0.5 and at the best threshold."""
    pictures_ = sorted({k.picture for k in of})
    maps = tower(x[pictures_])[0]
    named, _ = verdicts(maps, of, [pictures_.index(k.picture) for k in of])
    said = torch.tensor([k.named for k in of])
    candidates = {p: ((named.sigmoid() >= p) == said).float().mean().item() for p in np.arange(0.3, 0.96, 0.05)}
    best = max(candidates, key=lambda p: candidates[p])
    return {"lessons": len(of), "agreement": round(candidates[min(candidates, key=lambda p: abs(p - 0.5))], 4),
            "best": round(candidates[best], 4), "threshold": round(float(best), 2)}  # fmt: skip
