"""Faults that a picture can have, each with a known severity: what the simulated annotators rate.

Two kinds. `misread` changes *what* is drawn (another object, colours swapped, one missing ...): the picture no longer
fits its caption. `degrade` and the single faults below change *how* it is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from rewardtune.pocket.scenes import BACKGROUNDS, CONCEPTS, SIZE, Group, Scene, place, tints_of

Severity = float
"""0 none to 1 as bad as it gets."""


def blur(image: Image.Image, severity: Severity, rng: random.Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.4 + 2.2 * severity))


def grain(image: Image.Image, severity: Severity, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 6 + 44 * severity, (SIZE, SIZE, 3))
    return _from_float(_to_float(image) + noise)


def blotches(image: Image.Image, severity: Severity, rng: random.Random) -> Image.Image:
    """Low-frequency colour clouds, as small diffusion models leave on flat areas."""
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 1, (8, 8, 3)).astype(np.float32)
    cloud = np.stack([np.asarray(Image.fromarray(noise[..., c]).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
                      for c in range(3)], -1)  # fmt: skip
    return _from_float(_to_float(image) + cloud * (8 + 46 * severity))


def wobble(image: Image.Image, severity: Severity, rng: random.Random) -> Image.Image:
    """Bend outlines: every pixel is fetched from a smoothly displaced place."""
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 1, (2, 9, 9)).astype(np.float32)
    dx, dy = (np.asarray(Image.fromarray(n).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for n in noise)
    grid = np.arange(SIZE)
    x = np.clip(grid[None] + dx * (0.8 + 3.2 * severity), 0, SIZE - 1).round().astype(int)
    y = np.clip(grid[:, None] + dy * (0.8 + 3.2 * severity), 0, SIZE - 1).round().astype(int)
    return Image.fromarray(np.asarray(image)[y, x])


def smear(image: Image.Image, severity: Severity, rng: random.Random) -> Image.Image:
    """Melt a patch of the picture: shrink it to a few pixels and stretch it back."""
    out = image.copy()
    for _ in range(1 + int(3 * severity)):
        side = rng.randint(14, 26)
        x, y = rng.randint(4, SIZE - side - 4), rng.randint(4, SIZE - side - 4)
        patch = image.crop((x, y, x + side, y + side))
        few = max(3, round(side * (0.45 - 0.3 * severity)))
        patch = patch.resize((few, few), Image.Resampling.BILINEAR).resize((side, side), Image.Resampling.BICUBIC)
        mask = Image.new("L", (side, side), 0)
        mask.paste(255, (2, 2, side - 2, side - 2))
        out.paste(patch, (x, y), mask.filter(ImageFilter.GaussianBlur(2)))
    return out


def pale(image: Image.Image, severity: Severity, rng: random.Random) -> Image.Image:
    image = ImageEnhance.Color(image).enhance(1 - 0.35 - 0.6 * severity)
    return ImageEnhance.Contrast(image).enhance(1 - 0.1 - 0.5 * severity)


def cast(image: Image.Image, severity: Severity, rng: random.Random) -> Image.Image:
    """A colour cast with a darkening towards one side."""
    tone = np.array([rng.uniform(-1, 1) for _ in range(3)]) * (12 + 50 * severity)
    ramp = np.linspace(1, 1 - 0.1 - 0.45 * severity, SIZE)
    ramp = ramp[None, :, None] if rng.random() < 0.5 else ramp[:, None, None]
    return _from_float((_to_float(image) + tone) * ramp)


def shear_halves(image: Image.Image, severity: Severity, rng: random.Random) -> Image.Image:
    """Cut the picture and shift one side, so that objects break in two."""
    shift = round((1.5 + 7 * severity) * rng.choice([-1, 1]))
    cut = rng.randint(18, 46)
    pixels = np.asarray(image).copy()
    if rng.random() < 0.5:
        pixels[cut:] = np.roll(pixels[cut:], shift, axis=1)
    else:
        pixels[:, cut:] = np.roll(pixels[:, cut:], shift, axis=0)
    return Image.fromarray(pixels)


def ghosting(image: Image.Image, severity: Severity, rng: random.Random) -> Image.Image:
    """A second, shifted exposure of the whole picture."""
    offset = (rng.choice([-1, 1]) * rng.randint(3, 6), rng.choice([-1, 1]) * rng.randint(2, 5))
    shifted = Image.fromarray(np.roll(np.asarray(image), offset, axis=(1, 0)))
    return Image.blend(image, shifted, 0.15 + 0.35 * severity)


Fault = Callable[[Image.Image, Severity, random.Random], Image.Image]

# which dimension an annotator mainly holds each fault against: realism, aesthetics, plausibility
FAULTS: dict[str, tuple[Fault, tuple[float, float, float]]] = {
    "blur": (blur, (1.0, 0.6, 0.1)),
    "grain": (grain, (0.9, 0.7, 0.0)),
    "blotches": (blotches, (0.8, 0.8, 0.1)),
    "wobble": (wobble, (0.5, 0.3, 0.9)),
    "smear": (smear, (0.7, 0.4, 0.8)),
    "pale": (pale, (0.2, 1.0, 0.0)),
    "cast": (cast, (0.3, 1.0, 0.0)),
    "shear_halves": (shear_halves, (0.3, 0.4, 1.0)),
    "ghosting": (ghosting, (0.5, 0.5, 0.8)),
}


def degrade(image: Image.Image, rng: random.Random, among: Sequence[str] = tuple(sorted(FAULTS))) -> Image.Image:
    """One random drawing fault of random severity; `among` names those to choose from."""
    fault, _ = FAULTS[rng.choice(among)]
    return fault(image, rng.random(), rng)


def misread(scene: Scene, rng: random.Random) -> Scene:
    """A placed scene that breaks one claim of `scene`'s caption at least; layout is drawn anew where it must change."""
    groups = list(scene.groups)
    i = rng.randrange(len(groups))
    used = {g.concept for g in groups}
    kinds = ["object", "object", "count", "background"]
    if _other_tints(groups[i]):
        kinds.append("colour")
    if scene.relation:
        kinds += ["relation", "missing", "missing"]
    if len({g.tint for g in groups}) > 1:
        kinds += ["swap", "swap"]
    if groups[i].size:
        kinds.append("size")
    kind = rng.choice(kinds)
    if kind == "object":
        concept = rng.choice(sorted(set(CONCEPTS) - used))
        tint = groups[i].tint if groups[i].tint in tints_of(concept) else None
        groups[i] = replace(groups[i], concept=concept, tint=tint)
    elif kind == "colour":
        groups[i] = replace(groups[i], tint=rng.choice(_other_tints(groups[i])))
    elif kind == "swap":
        tints = [g.tint for g in groups]
        swapped = [replace(g, tint=t) for g, t in zip(groups, tints[1:] + tints[:1], strict=True)]
        if all(g.tint is None or g.tint in tints_of(g.concept) for g in swapped):
            groups = swapped
        else:
            return misread(scene, rng)
    elif kind == "size":
        groups[i] = replace(groups[i], size="large" if groups[i].size == "small" else "small")
    elif kind == "background":
        return replace(scene, background=rng.choice(sorted(set(BACKGROUNDS) - {scene.background})))
    elif kind == "missing":
        gone = rng.randrange(len(groups))
        return replace(scene, boxes=tuple(b for b in scene.boxes if b.group != gone))
    elif kind == "relation":
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        if scene.third and rng.random() < 0.5:
            return place(replace(scene, third=opposite[scene.third]), rng)
        return place(replace(scene, relation=opposite[scene.relation or "left"]), rng)
    elif kind == "count":
        if len(groups) > 1 and sum(g.count for g in groups) > 2:
            # too many objects for the layout to grow: drop one or turn one into another group's kind
            boxes = list(scene.boxes)
            boxes.pop(rng.randrange(len(boxes)))
            return replace(scene, boxes=tuple(boxes))
        groups[i] = Group(groups[i].concept, groups[i].tint, rng.choice(sorted({1, 2, 3} - {groups[i].count}))
                          if len(groups) == 1 else 2)  # fmt: skip
    return place(replace(scene, groups=tuple(groups)), rng)


def _other_tints(group: Group) -> list[str | None]:
    """Tints, None among them, that this group could have been drawn in instead."""
    return [t for t in (None, *tints_of(group.concept)) if t != group.tint]


def _to_float(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def _from_float(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
