"""What the base of the pocket scorer is taught: pictures, claims about them, and which of the claims hold.

`pretrain_scorer.py` draws examples here and packs them; no score appears anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageFilter
from scorer_base import word_list
from torch import Tensor

from rewardtune.pocket.faults import FAULTS, misread
from rewardtune.pocket.scenes import BACKGROUNDS, CONCEPTS, SIZE, TINTS, Scene, render, sample_scene

FAULT_WORDS = {"blur": "blurry", "grain": "grainy", "blotches": "blotchy", "wobble": "wobbly", "smear": "smeared",
               "pale": "pale", "cast": "tinted", "shear_halves": "broken", "ghosting": "doubled"}  # fmt: skip
SEVERITIES = ["slight", "visible", "strong", "severe"]
KINDS = ["object", "count", "colour", "size", "relation", "background"]
# head labels that no caption word marks
TINT_CLASSES = ["nothing", "natural", *sorted(TINTS)]
CONCEPT_CLASSES = ["nothing", *sorted(CONCEPTS)]
# what an image token can be called: things, tints and grounds
NAMES = [*sorted({w for c, (_, plural) in CONCEPTS.items() for w in (c, plural)}), *sorted(TINTS), *sorted(BACKGROUNDS)]
SEGMENTS, SEGMENT = 3, 34
"""Claims per picture, and the tokens that each may take."""


def truths(claim: Scene, drawn: Scene) -> list[tuple[str, int, bool | None]]:
    """(kind, group, holds) of each fact that `claim` states, judged by the boxes of `drawn`; None: cannot be judged."""
    things = [(drawn.groups[b.group], b) for b in drawn.boxes]
    found = [[(g, b) for g, b in things if g.concept == group.concept] for group in claim.groups]

    def centre(group: int) -> tuple[float, float]:
        return tuple(float(np.mean([getattr(b, axis) for _, b in found[group]])) for axis in "xy")  # type: ignore

    def stands(first: int, relation: str, second: int) -> bool | None:
        if not (found[first] and found[second]):
            return None
        (ax, ay), (bx, by) = centre(first), centre(second)
        return {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}[relation] > 8

    out: list[tuple[str, int, bool | None]] = []
    for i, group in enumerate(claim.groups):
        here = found[i]
        out.append(("object", i, bool(here)))
        out.append(("count", i, len(here) == group.count if here else None))
        out.append(("colour", i, all(g.tint == group.tint for g, _ in here) if here else None))
        if group.size:
            sizes = {"small" if b.side < 24 else "large" if b.side > 40 else None for _, b in here}
            out.append(("size", i, sizes == {group.size} if here else None))
    if claim.relation:
        out.append(("relation", 1, stands(0, claim.relation, 1)))
    if claim.third:
        both = [stands(2, claim.third, 0), stands(2, claim.third, 1)]
        out.append(("relation", 2, None if None in both else all(both)))
    out.append(("background", 0, claim.background == drawn.background))
    return out


def without(scene: Scene, gone: int) -> Scene:
    """The scene that is left when one group is not drawn, with a caption of its own."""
    keep = [i for i in range(len(scene.groups)) if i != gone]
    if gone != 2 and len(keep) == 2:
        keep, relation = [2, keep[0]], scene.third
    else:
        relation = scene.relation if len(keep) == 2 else None
    boxes = tuple(replace(b, group=keep.index(b.group)) for b in scene.boxes if b.group != gone)
    return replace(scene, groups=tuple(scene.groups[i] for i in keep), relation=relation, third=None, boxes=boxes)


def mirrored(scene: Scene, rng: random.Random) -> Scene:
    """The same things, claimed to stand the other way round."""
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    if scene.third and rng.random() < 0.5:
        return replace(scene, third=opposite[scene.third])
    assert scene.relation is not None
    return replace(scene, relation=opposite[scene.relation])


def soften(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Softness as small diffusion models and autoencoders leave it; no fault is named for it."""
    if rng.random() < 0.5:
        side = rng.randint(30, 52)
        picture = picture.resize((side, side), Image.Resampling.BILINEAR).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    else:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))
    for name in ("blotches", "wobble", "smear"):
        if rng.random() < 0.25:
            picture = FAULTS[name][0](picture, rng.uniform(0, 0.35), rng)
    return picture


@dataclass
class Segment:
    """A claim and the answer to it.

    ids, targets: tokens, and for each the next one (-100: not taught). marks: (position, kind, holds) at the words that
    complete a claim. places: (position, x, y) at the nouns of things that are there, their mean centre from 0 to 1.
    """

    ids: list[int]
    targets: list[int]
    marks: list[tuple[int, int, int]]
    places: list[tuple[int, float, float]]


@dataclass
class Example:
    """A picture and everything that is taught of it."""

    picture: np.ndarray
    concept: np.ndarray
    tint: np.ndarray
    names: np.ndarray
    fault: int
    severity: int
    segments: list[Segment]


class Teacher:
    """Draws examples. Compositions outside the training split never appear, drawn or claimed."""

    def __init__(self, *, patch: int) -> None:
        self.ids = {word: i for i, word in enumerate(word_list())}
        self.patch = patch
        self.faults = sorted(FAULTS)

    def words(self, text: str) -> list[int]:
        return [self.ids[w] for w in text.replace(",", " ,").split()]

    def example(self, rng: random.Random, *, text: bool = True) -> Example:
        scene = sample_scene(rng, "train")
        drawn, roll = scene, rng.random()
        if roll < 0.2 and len(scene.groups) > 1:
            drawn = without(scene, rng.randrange(len(scene.groups)))
        picture = render(drawn)
        fault, severity, roll = -1, -1, rng.random()
        if roll < 0.35:
            fault, severity = 0, 0
        elif roll < 0.65:
            picture = soften(picture, rng)
        else:
            name, strength = rng.choice(self.faults), rng.random()
            picture = FAULTS[name][0](picture, strength, rng)
            fault, severity = 1 + self.faults.index(name), 1 + min(3, int(4 * strength))
        concept, tint = self.patches(drawn)
        segments = self.segments(scene, drawn, fault, severity, rng) if text else []
        names = self.names(concept, tint, drawn.background)
        return Example(np.asarray(picture).transpose(2, 0, 1), concept, tint, names, fault, severity, segments)

    def patches(self, drawn: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Class of the object that covers each patch: 0 nothing, -1 at an object's rim."""
        side = SIZE // self.patch
        centre = (np.arange(side) + 0.5) * self.patch
        concept, tint = np.zeros((side, side), np.int64), np.zeros((side, side), np.int64)
        for reach, mark in ((0.55, False), (0.42, True)):
            for box in drawn.boxes:
                group = drawn.groups[box.group]
                half = reach * box.side
                inside = (abs(centre[:, None] - box.y) < half) & (abs(centre[None] - box.x) < half)
                concept[inside] = CONCEPT_CLASSES.index(group.concept) if mark else -1
                tint[inside] = TINT_CLASSES.index(group.tint or "natural") if mark else -1
        return concept.ravel(), tint.ravel()

    def names(self, concept: np.ndarray, tint: np.ndarray, background: str) -> np.ndarray:
        """(image tokens, NAMES) share of each word in what a block of 2 x 2 patches shows; rows in row-major order."""
        side = SIZE // self.patch
        out = np.zeros((side // 2, side // 2, len(NAMES)), np.float32)
        for (y, x), c in np.ndenumerate(concept.reshape(side, side)):
            words = []
            if c == 0:
                words = [background]
            elif c > 0:
                word, t = CONCEPT_CLASSES[c], tint[y * side + x]
                words = [word, CONCEPTS[word][1]] + ([TINT_CLASSES[t]] if t > 1 else [])
            for word in words:
                out[y // 2, x // 2, NAMES.index(word)] = 1.0
        out = out.reshape(-1, len(NAMES))
        return out / np.maximum(out.sum(-1, keepdims=True), 1.0)

    def segments(self, scene: Scene, drawn: Scene, fault: int, severity: int, rng: random.Random) -> list[Segment]:
        claims = [drawn]
        if drawn is not scene:
            claims.append(scene)
        while len(claims) < SEGMENTS:
            other = misread(drawn, rng) if rng.random() < 0.9 else sample_scene(rng, "train")
            if drawn.relation and rng.random() < 0.25:
                # the hardest claim to check, and `misread` seldom breaks it alone
                other = mirrored(drawn, rng)
            other = replace(other, wording=int(rng.random() < 0.3))
            if other.split == "train" and not all(ok for _, _, ok in truths(other, drawn)):
                claims.append(other)
        rng.shuffle(claims)
        return [self.segment(claim, drawn, fault, severity) for claim in claims]

    def segment(self, claim: Scene, drawn: Scene, fault: int, severity: int) -> Segment:
        """The segment of one claim; fault -1: nothing is said of the drawing."""
        caption = self.words(claim.caption)
        facts = truths(claim, drawn)
        wrong = [(kind, group) for kind, group, ok in facts if ok is False]
        answer = self.words("yes")
        if wrong:
            kind, group = wrong[0]
            what = claim.background if kind == "background" else claim.groups[group].concept
            answer = self.words(f"no wrong {kind} {what}")
        named = []
        if fault == 0:
            named = self.words(". clean")
        elif fault > 0:
            named = self.words(f". {FAULT_WORDS[self.faults[fault - 1]]} {SEVERITIES[severity - 1]}")
        close, opening = self.ids["<|im_end|>"], [self.ids["<|im_start|>"], self.ids["assistant"]]
        ids = [*caption, close, *opening, *answer, *named, close]
        targets = [-100] * len(ids)
        n = len(caption)
        for i in range(len(ids) - 1):
            if (i < n - 1 and not wrong) or i >= n + 2:
                targets[i] = ids[i + 1]
        if not named:
            targets[-2] = -100
        marks, nouns, at = [], [], 0
        for group in claim.groups:
            noun = self.ids[group.concept if group.count == 1 else CONCEPTS[group.concept][1]]
            at = caption.index(noun, at) + 1
            nouns.append(at - 1)
        ground = caption.index(self.ids["background"]) - 1
        for kind, group, ok in facts:
            if ok is not None:
                marks.append((ground if kind == "background" else nouns[group], KINDS.index(kind), int(ok)))
        places = []
        for noun, group in zip(nouns, claim.groups, strict=True):
            here = [b for b in drawn.boxes if drawn.groups[b.group].concept == group.concept]
            if here:
                places.append((noun, *(sum(getattr(b, axis) for b in here) / len(here) / SIZE for axis in "xy")))
        assert len(ids) <= SEGMENT, len(ids)
        return Segment(ids, targets, marks, places)


class Layout:
    """Where things stand in one packed row: the picture once, then segments that see it but not each other."""

    def __init__(self, ids: dict[str, int], image_tokens: int) -> None:
        self.prefix = [ids["<|im_start|>"], ids["user"], ids["<|vision_start|>"],
                       *[ids["<|image_pad|>"]] * image_tokens, ids["<|vision_end|>"]]  # fmt: skip
        self.pad = ids["<pad>"]
        n, side = len(self.prefix), int(image_tokens**0.5)
        length = n + SEGMENTS * SEGMENT
        where = torch.zeros(3, length, dtype=torch.long)
        where[:, :3] = torch.arange(3)
        rows = torch.arange(image_tokens)
        where[:, 3 : n - 1] = torch.stack([torch.full_like(rows, 3), 3 + rows // side, 3 + rows % side])
        where[:, n - 1] = 3 + side
        mask = torch.zeros(length, length, dtype=torch.bool)
        mask[:, :n] = True
        for s in range(SEGMENTS):
            part = slice(n + s * SEGMENT, n + (s + 1) * SEGMENT)
            where[:, part] = 4 + side + torch.arange(SEGMENT)
            mask[part, part] = True
        mask &= torch.ones_like(mask).tril()
        self.positions = where[:, None]
        self.mask = torch.where(mask, 0.0, -1e9)[None, None]

    def pack(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids (B, L), next-token targets (B, L), marks (M, 4): row, position, kind, holds; places (P, 4) likewise."""
        n = len(self.prefix)
        ids = torch.full((len(examples), self.positions.shape[-1]), self.pad)
        targets = torch.full_like(ids, -100)
        marks, places = [], []
        for row, example in enumerate(examples):
            ids[row, :n] = torch.tensor(self.prefix)
            for s, segment in enumerate(example.segments):
                start = n + s * SEGMENT
                ids[row, start : start + len(segment.ids)] = torch.tensor(segment.ids)
                targets[row, start : start + len(segment.ids)] = torch.tensor(segment.targets)
                marks += [(row, start + at, kind, ok) for at, kind, ok in segment.marks]
                places += [(row, start + at, x, y) for at, x, y in segment.places]
        return ids, targets, torch.tensor(marks), torch.tensor(places)
