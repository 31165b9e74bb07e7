"""The eye of the simulated annotators: finds claimed artwork in a picture by template matching, and measures its flaws.

Used by `panel.py` for pictures of which nothing is known but the prompt's facts. It is no neural network and shares
nothing with the held-out judge but the artwork: that judge must not agree with the panel by construction.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional

from rewardtune.pocket.flaws import measure
from rewardtune.pocket.scenes import BACKGROUNDS, CONCEPTS, SIZE, sprite, tints_of

Array = np.ndarray[Any, np.dtype[np.float32]]

# All numbers below are ours, found on renders.
COARSE, FINE = 14, 24
"""Side in pixels to which an object is scaled for the search over the picture, and for telling concepts apart."""
RING = 0.12
"""Width of the background seen around an object, as a share of its side."""
SURE = 0.95
"""A claim that fits this well needs no comparison with other concepts in other sizes."""
SIDES_ONE = (16.0, 18.5, 21.5, 25.0, 29.0, 33.5, 40.0, 48.0)
SIDES_MANY = (16.5, 19.0, 22.0, 25.5, 29.5)
"""Sides in pixels tried for a single object, and for one of several."""


@dataclass(frozen=True)
class Sight:
    """One object found. `score`: 0 to 1, how well the artwork fits (1: a clean render); `rival`: the best score of any
    other concept at the same place; `tints`: score of every tint of the concept; `tones`: distance between the mean
    colours there and in the artwork of each tint, in units of the full range."""

    concept: str
    tint: str | None
    x: float
    y: float
    side: float
    score: float
    rival: float
    rival_name: str
    tints: Mapping[str | None, float]
    tones: Mapping[str | None, float]


@dataclass(frozen=True)
class View:
    """What the eye takes from one picture: objects that the facts claim, other objects, background colour (R, G, B in
    0 to 255) and measures of its flaws (see `flaws.measure`)."""

    found: tuple[Sight, ...]
    others: tuple[Sight, ...]
    background: tuple[float, float, float]
    measures: Mapping[str, float]


def look(picture: Image.Image, facts: Sequence[Mapping[str, Any]]) -> View:
    """Look for what `facts` claim in a 64 x 64 picture. About 50 ms on one core."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.float32) / 255.0
    claims = [(f["concept"], int(f["count"])) for f in facts if f["kind"] == "count"]
    ground, colour = _background(pixels)
    difference = pixels - ground
    scene = _Scene(difference, _unshifted(colour, [f["background"] for f in facts if f["kind"] == "background"]))
    sights = _search(scene, [c for c, _ in claims], sum(n for _, n in claims))
    others = _others(scene, sights)
    sights = tuple(s for s in sights if not any(_displaces(o, s) for o in others))
    others = tuple(o for o in others if not any(_near(s, o) for s in sights))
    values = measure(pixels, ground, (*sights, *others))
    r, g, b = (colour * 255.0).tolist()
    return View(sights, others, (r, g, b), values)


def _displaces(other: Sight, claimed: Sight) -> bool:
    """Whether a place shows something else than what was claimed of it: the other concept fits clearly better there,
    in a size of its own."""
    better = other.concept != claimed.concept and other.rival < other.score > claimed.score + 0.08
    return better and _near(claimed, other)


# ---------------------------------------------------------------------------------------------------------- templates


@dataclass(frozen=True, eq=False)
class _Bank:
    """Artwork at one scale. `paint` (N, 3, W, W) is colour times coverage, `cover` (N, 1, W, W); `window` the cover
    widened by the ring; N runs over (concept, tint)."""

    names: tuple[tuple[str, str | None], ...]
    paint: torch.Tensor
    cover: torch.Tensor
    window: torch.Tensor
    rows: Mapping[str, slice]
    side: int
    width: int


@functools.cache
def _bank(side: int, smooth: float) -> _Bank:
    margin = max(2, round(side * RING))
    width = side + 2 * margin
    names: list[tuple[str, str | None]] = []
    arrays: list[Array] = []
    rows: dict[str, slice] = {}
    for concept in sorted(CONCEPTS):
        tints = [None, *tints_of(concept)]
        rows[concept] = slice(len(names), len(names) + len(tints))
        for tint in tints:
            art = sprite(concept, tint)
            scale = side / max(art.size)
            size = (max(1, round(art.width * scale)), max(1, round(art.height * scale)))
            small = np.asarray(art.convert("RGBa").resize(size, Image.Resampling.LANCZOS)).astype(np.float32) / 255.0
            full = np.zeros((width, width, 4), np.float32)
            top, left = (width - size[1]) // 2, (width - size[0]) // 2
            full[top : top + size[1], left : left + size[0]] = small
            if smooth:
                full = ndimage.gaussian_filter(full, (smooth, smooth, 0))
            names.append((concept, tint))
            arrays.append(full.transpose(2, 0, 1))
    stack = torch.from_numpy(np.stack(arrays))
    cover = stack[:, 3:]
    reach = 2 * margin + 1
    window = (functional.max_pool2d(cover, reach, 1, reach // 2) > 0.15).float()
    return _Bank(tuple(names), stack[:, :3].contiguous(), cover, window, rows, side, width)


@functools.cache
def _against(bank: _Bank, background: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A bank's templates as differences from a background of the world, (N, 3, W, W), and their norms (N,)."""
    tone = torch.tensor(BACKGROUNDS[background], dtype=torch.float32).view(1, 3, 1, 1) / 255.0
    template = bank.paint - bank.cover * tone
    return template, template.flatten(1).norm(dim=1)


class _Scene:
    """One picture without its background, and the fine templates for the background that it stands for."""

    def __init__(self, difference: Array, background: str) -> None:
        self.difference, self.background = difference, background
        self.image = torch.from_numpy(difference.transpose(2, 0, 1).copy())[None]
        smooth = ndimage.gaussian_filter(difference, (0.6, 0.6, 0))
        self.smooth = torch.from_numpy(smooth.transpose(2, 0, 1).copy())[None]
        self.bank = _bank(FINE, 0.7)
        template, norm = _against(self.bank, background)
        self.template, self.window, self.square = template.flatten(1), self.bank.window.flatten(1), norm.square()


# ------------------------------------------------------------------------------------------------------------- search


def _background(pixels: Array) -> tuple[Array, Array]:
    """The background as a plane through the border pixels, robustly, (H, W, 3), and its median colour (3,)."""
    edge = np.zeros((SIZE, SIZE), bool)
    edge[:3], edge[-3:], edge[:, :3], edge[:, -3:] = True, True, True, True
    y, x = np.nonzero(edge)
    values = pixels[edge]
    colour = np.median(values, axis=0)
    keep = np.abs(values - colour).max(axis=1) < 0.18
    if keep.sum() < 60:
        ground = np.broadcast_to(colour, pixels.shape).astype(np.float32)
        return ground, colour.astype(np.float32)
    design = np.stack([np.ones(len(x)), x / SIZE - 0.5, y / SIZE - 0.5], 1)
    plane, *_ = np.linalg.lstsq(design[keep], values[keep], rcond=None)
    grid_y, grid_x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    ground = plane[0] + grid_x[..., None] * plane[1] + grid_y[..., None] * plane[2]
    return ground.clip(0, 1).astype(np.float32), plane[0].clip(0, 1).astype(np.float32)


def _unshifted(colour: Array, claimed: Sequence[str]) -> str:
    """The background of the world that a colour stands for: a colour cast shifts objects and background alike, so
    that differences are those from the unshifted colour."""
    world = {name: np.array(rgb, np.float32) / 255.0 for name, rgb in BACKGROUNDS.items()}
    nearest = min(world, key=lambda name: float(np.linalg.norm(world[name] - colour)))
    if np.linalg.norm(world[nearest] - colour) > 0.08:
        close = [name for name in claimed if np.linalg.norm(world[name] - colour) < 0.45]
        nearest = close[0] if close else nearest
    return nearest


def _search(scene: _Scene, concepts: Sequence[str], number: int) -> tuple[Sight, ...]:
    """Places where a claimed concept fits best, overlapping ones removed, refined and compared with all concepts."""
    bank = _bank(COARSE, 0.5)
    index = [i for c in concepts for i in range(*bank.rows[c].indices(len(bank.names)))]
    owner = np.concatenate([[k] * (bank.rows[c].stop - bank.rows[c].start) for k, c in enumerate(concepts)])
    template, norm = (t[index] for t in _against(bank, scene.background))
    window = bank.window[index]
    firsts = [int(np.argmax(owner == k)) for k in range(len(concepts))]
    candidates: list[tuple[float, int, float, float, float]] = []
    for side in SIDES_ONE if number == 1 else SIDES_MANY:
        zoom = COARSE / side
        size = round(SIZE * zoom)
        scaled = functional.interpolate(scene.image, (size, size), mode="bilinear", antialias=True, align_corners=False)
        pad = bank.width // 2 - 2
        padded = functional.pad(scaled, (pad, pad, pad, pad))
        energy = functional.conv2d(padded.square().sum(1, keepdim=True), window[firsts])[0]
        match = functional.conv2d(padded, template)[0]
        cosine = match / (norm.view(-1, 1, 1) * (energy[owner] + 0.02 * norm.view(-1, 1, 1).square()).sqrt() + 1e-6)
        for k in range(len(concepts)):
            best = cosine[torch.from_numpy(owner == k)].amax(0)
            peak = functional.max_pool2d(best[None], 5, 1, 2)[0]
            ys, xs = torch.nonzero((best == peak) & (best > 0.45), as_tuple=True)
            for v, py, px in zip(best[ys, xs].tolist(), ys.tolist(), xs.tolist(), strict=True):
                x, y = ((p - pad + bank.width / 2) * SIZE / size for p in (px, py))
                if 2 < x < SIZE - 2 and 2 < y < SIZE - 2:
                    candidates.append((v, k, x, y, side))
    candidates.sort(reverse=True)
    kept: list[tuple[float, int, float, float, float]] = []
    for c in candidates:
        same = [k for k in kept if k[1] == c[1]]
        if len(same) < 4 and all(np.hypot(k[2] - c[2], k[3] - c[3]) > 0.5 * min(k[4], c[4]) for k in same):
            kept.append(c)
    limit = number + 3
    sights = [_refine(scene, x, y, side, concepts[k]) for _, k, x, y, side in kept[:limit]]
    # a place belongs to the claim that fits it best
    sights.sort(key=lambda s: -s.score)
    out: list[Sight] = []
    for s in sights:
        if not any(_near(s, o) for o in out):
            out.append(s)
    return tuple(out)


def _near(a: Sight, b: Sight) -> bool:
    """Whether two sights claim the same pixels."""
    return bool(np.hypot(a.x - b.x, a.y - b.y) < 0.6 * max(a.side, b.side))


def _shifts(step: float, scale: float) -> Array:
    """27 small moves: (x, y) in pixels and a factor of the side."""
    return np.array([(dx, dy, f) for f in (1 / scale, 1.0, scale) for dx in (-step, 0, step)
                     for dy in (-step, 0, step)], np.float32)  # fmt: skip


_MOVES = (_shifts(1.2, 1.07), _shifts(0.5, 1.03))
"""Tried one after the other."""


def _patches(scene: _Scene, places: Array) -> torch.Tensor:
    """Windows (P, 3, W * W) of the picture around places (P, 3: x, y, side), scaled so that `side` fits the bank."""
    width = scene.bank.width
    steps = torch.arange(width, dtype=torch.float32) + 0.5 - width / 2
    scale = torch.from_numpy(places[:, 2:] / scene.bank.side)
    x = (torch.from_numpy(places[:, :1]) + steps * scale) / (SIZE / 2) - 1
    y = (torch.from_numpy(places[:, 1:2]) + steps * scale) / (SIZE / 2) - 1
    points = torch.stack([x[:, None, :].expand(-1, width, -1), y[:, :, None].expand(-1, -1, width)], -1)
    points = points.reshape(1, -1, width, 2)
    sampled = functional.grid_sample(scene.smooth, points, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled[0].view(3, len(places), -1).transpose(0, 1)


def _fit(scene: _Scene, places: Array, rows: slice) -> torch.Tensor:
    """How well each template of `rows` explains the picture at each place, (P, N), 1 for a perfect fit.

    One minus the unexplained energy after the best contrast between 0.55 and 1.1: colours and outlines must be right,
    while a paler or softer drawing still counts.
    """
    patches = _patches(scene, places)
    energy = patches.square().sum(1) @ scene.window[rows].T
    match = patches.flatten(1) @ scene.template[rows].T
    square = scene.square[rows][None]
    gain = (match / square).clamp(0.55, 1.1)
    rest = energy - 2 * gain * match + gain.square() * square
    return 1 - (rest / (0.5 * (energy + square))).clamp(0, 2)


def _refine(scene: _Scene, x: float, y: float, side: float, concept: str | None) -> Sight:
    """Move and scale a place to its best fit (of `concept`, or of any), then compare all concepts there."""
    bank = scene.bank
    everything = slice(0, len(bank.names))
    place = np.array([x, y, side], np.float32)
    name = concept
    for moves in _MOVES:
        places = (moves * [1, 1, place[2]] + [place[0], place[1], 0]).astype(np.float32)
        every = _fit(scene, places, bank.rows[name] if name else everything)
        where = int(every.amax(1).argmax())
        place = places[where]
        name = name or bank.names[int(every[where].argmax())][0]
    assert name is not None
    every = _fit(scene, place[None], everything)
    rows = bank.rows[name]
    scores = every[0].numpy()
    own = scores[rows]
    tints = {bank.names[rows.start + i][1]: float(v) for i, v in enumerate(own)}
    rest = scores.copy()
    rest[rows] = -1.0
    tint = bank.names[rows.start + int(own.argmax())][1]
    px, py, ps = place.tolist()
    rival = int(rest.argmax())
    tones = dict(zip(tints, _tones(scene, place, rows), strict=True))
    return Sight(name, tint, px, py, ps, float(own.max()), float(rest[rival]), bank.names[rival][0], tints, tones)


def _tones(scene: _Scene, place: Array, rows: slice) -> list[float]:
    """Distance between mean colours inside the outline, picture against each template of `rows`."""
    cover = scene.bank.cover[rows].flatten(1)
    weight = cover / cover.sum(1, keepdim=True)
    seen = weight @ _patches(scene, place[None])[0].T
    drawn = torch.einsum("np,ncp->nc", weight, scene.template[rows].view(len(cover), 3, -1))
    return [float(d) for d in (seen - drawn).norm(dim=1)]


def _others(scene: _Scene, sights: Sequence[Sight]) -> tuple[Sight, ...]:
    """What is there whatever is claimed: every object of the picture but those that a claim fits almost perfectly."""
    strength = ndimage.gaussian_filter(np.abs(scene.difference).max(axis=2), 1.0) > 0.14
    for s in sights:
        if s.score > SURE and s.score >= s.rival:
            y, x = np.mgrid[:SIZE, :SIZE] + 0.5
            strength &= np.maximum(np.abs(x - s.x), np.abs(y - s.y)) > 0.58 * s.side
    labels, _ = ndimage.label(strength)
    out: list[Sight] = []
    for k, box in enumerate(ndimage.find_objects(labels), 1):
        high, wide = box[0].stop - box[0].start, box[1].stop - box[1].start
        if max(high, wide) < 11 or (labels[box] == k).sum() < 60:
            continue
        centre = (box[1].start + wide / 2, box[0].start + high / 2)
        found = _refine(scene, *centre, float(max(high, wide)), None)
        if found.score > 0.5:
            out.append(found)
    return tuple(out[:4])
