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
from scipy import ndimage  # type: ignore[import-untyped]
from torch.nn import functional

from rewardtune.pocket.scenes import BACKGROUNDS, CONCEPTS, SIZE, sprite, tints_of

Array = np.ndarray[Any, np.dtype[np.float32]]

# All numbers below are ours, found on renders.
COARSE, FINE = 14, 24
"""Side in pixels to which an object is scaled for the search over the picture, and for telling concepts apart."""
RING = 0.12
"""Width of the background seen around an object, as a share of its side."""
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
    0 to 255) and measures of its flaws (see `measure`)."""

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
    sights = tuple(s for s in sights if not any(o.rival < o.score and _near(s, o) and o.score > s.score + 0.08
                                                for o in others))  # fmt: skip
    values = measure(pixels, ground, (*sights, *others))
    r, g, b = (colour * 255.0).tolist()
    return View(sights, others, (r, g, b), values)


# ---------------------------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
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


def _against(bank: _Bank, rows: slice | list[int], colour: Array) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Templates as differences from a background colour, (N, 3, W, W), with their windows and norms (N,)."""
    tone = torch.from_numpy(colour).view(1, 3, 1, 1)
    template = bank.paint[rows] - bank.cover[rows] * tone
    return template, bank.window[rows], template.flatten(1).norm(dim=1)


class _Scene:
    """One picture without its background, and the fine templates as differences from that background."""

    def __init__(self, difference: Array, colour: Array) -> None:
        self.difference, self.colour = difference, colour
        self.image = torch.from_numpy(difference.transpose(2, 0, 1).copy())[None]
        smooth = ndimage.gaussian_filter(difference, (0.6, 0.6, 0))
        self.smooth = torch.from_numpy(smooth.transpose(2, 0, 1).copy())[None]
        self.bank = _bank(FINE, 0.7)
        template, window, norm = _against(self.bank, slice(0, len(self.bank.names)), colour)
        self.template, self.window, self.square = template.flatten(1), window.flatten(1), norm.square()


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


def _unshifted(colour: Array, claimed: Sequence[str]) -> Array:
    """The colour of the world that a background stands for: a colour cast shifts objects and background alike, so
    that differences are those from the unshifted colour."""
    world = {name: np.array(rgb, np.float32) / 255.0 for name, rgb in BACKGROUNDS.items()}
    nearest = min(world, key=lambda name: float(np.linalg.norm(world[name] - colour)))
    if np.linalg.norm(world[nearest] - colour) > 0.08:
        close = [name for name in claimed if np.linalg.norm(world[name] - colour) < 0.45]
        nearest = close[0] if close else nearest
    return world[nearest]


def _search(scene: _Scene, concepts: Sequence[str], number: int) -> tuple[Sight, ...]:
    """Places where a claimed concept fits best, overlapping ones removed, refined and compared with all concepts."""
    bank = _bank(COARSE, 0.5)
    index = [i for c in concepts for i in range(*bank.rows[c].indices(len(bank.names)))]
    owner = np.concatenate([[k] * (bank.rows[c].stop - bank.rows[c].start) for k, c in enumerate(concepts)])
    template, window, norm = _against(bank, index, scene.colour)
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
    return bool(np.hypot(a.x - b.x, a.y - b.y) < 0.5 * max(a.side, b.side))


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
    """Objects that no fact claims: what fits well where the claims do not."""
    strength = ndimage.gaussian_filter(np.abs(scene.difference).max(axis=2), 1.0) > 0.14
    for s in sights:
        if s.score > 0.6 and s.score >= s.rival - 0.05:
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


# ------------------------------------------------------------------------------------------------------------- flaws


def measure(pixels: Array, ground: Array, sights: Sequence[Sight]) -> dict[str, float]:
    """Differences between a picture and its best reconstruction from artwork; 0 (or 1 for ratios) for a clean one.

    unclean: rest outside objects; clouds and grain: its slow and fast parts; junk: share of strong pixels outside
    objects that no artwork explains; ramp: slope of the background; off: distance of the background from a colour of
    the world; sharp: edge strength inside objects against the artwork's; contrast and vivid: contrast and saturation
    against the artwork's; rest: unexplained share inside objects; bent: that of the outlines; fit: mean score;
    moved, torn: spread in pixels of the best shifts of small and of larger parts of the objects; broken, gone: shares
    of those that no shift explains; double: strength of a second exposure; halo: strength of what lies just beside the
    objects, beyond what lies far from them; patchy: unevenness of the sharpness.
    """
    model, cover = _reconstruct(ground, sights)
    rest = pixels - model
    inside = cover > 0.02
    near = ndimage.binary_dilation(inside, iterations=2)
    outside = ~ndimage.binary_dilation(inside, iterations=4)
    slow = ndimage.gaussian_filter(rest, (2.5, 2.5, 0))
    fast = rest - ndimage.gaussian_filter(rest, (1.0, 1.0, 0))
    plain = np.abs(rest).max(axis=2)
    tone = ground.mean(axis=(0, 1))
    values = {
        "unclean": _rms(rest[outside]),
        "clouds": _rms(slow[outside]),
        "grain": _rms(fast[outside]),
        "junk": float((ndimage.gaussian_filter(plain, 1.0) > 0.16)[outside].mean()) if outside.any() else 0.0,
        "ramp": float(np.abs(ground[0, 0] - ground[-1, -1]).max() + np.abs(ground[0, -1] - ground[-1, 0]).max()) / 2,
        "off": min(float(np.sqrt(np.mean((tone - np.array(c) / 255.0) ** 2))) for c in BACKGROUNDS.values()),
    }
    difference, wanted = pixels - ground, model - ground
    amount = max(_rms(wanted[near]), 0.02)
    values["contrast"] = _rms(difference[near]) / amount if near.any() else 1.0
    values["rest"] = _rms(rest[near]) / amount if near.any() else 1.0
    outline = near & ~ndimage.binary_erosion(cover > 0.5, iterations=2)
    values["bent"] = _rms(rest[outline]) / amount if outline.any() else 1.0
    values["sharp"] = _edges(pixels, near) / max(_edges(model, near), 1e-3) if near.any() else 1.0
    body = cover > 0.6
    values["vivid"] = _saturation(pixels, body) / max(_saturation(model, body), 0.03) if body.any() else 1.0
    values["fit"] = float(np.mean([s.score for s in sights])) if sights else 0.0
    values |= _deformation(difference, wanted, cover, sights)
    values["patchy"] = _patchiness(pixels, model, near)
    return values


def _deformation(difference: Array, wanted: Array, cover: Array, sights: Sequence[Sight]) -> dict[str, float]:
    """How far parts of the objects lie from where the artwork has them, whatever the contrast, softness or noise."""
    names = ("moved", "broken", "torn", "gone", "double", "halo")
    if not sights:
        return dict.fromkeys(names, 0.0)
    soft, model = (ndimage.gaussian_filter(a, (1.1, 1.1, 0)) for a in (difference, wanted))
    gain = (soft * model).sum((0, 1)) / np.maximum((model**2).sum((0, 1)), 1e-3)
    model = model * gain.clip(0.15, 1.3)
    picture, target = (torch.from_numpy(a.transpose(2, 0, 1).astype(np.float32).copy()) for a in (soft, model))
    moved, broken = _flow(picture, target, sights, 1, 3, 9)
    torn, gone = _flow(*(functional.avg_pool2d(a, 2) for a in (picture, target)), sights, 2, 4, 5)
    ring = ndimage.binary_dilation(cover > 0.02, iterations=7) & ~ndimage.binary_dilation(cover > 0.02, iterations=2)
    far = ~ndimage.binary_dilation(cover > 0.02, iterations=8)
    halo = max(0.0, _rms(soft[ring]) - (_rms(soft[far]) if far.sum() > 60 else 0.0))
    return dict(zip(names, (moved, broken, torn, gone, _second_exposure(soft - model, model), halo), strict=True))


def _flow(picture: torch.Tensor, target: torch.Tensor, sights: Sequence[Sight], pixel: int, reach: int,
          window: int) -> tuple[float, float]:  # fmt: skip
    """Spread, in pixels of 64, of the best shifts of small windows within each object, and the share of the artwork
    that no shift explains. One cell of the inputs is `pixel` pixels wide; shifts go up to `reach` cells."""
    steps = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    size = picture.shape[-1]
    padded = functional.pad(picture[None], (reach,) * 4)[0]
    shifted = torch.stack([padded[:, reach + dy : reach + dy + size, reach + dx : reach + dx + size]
                           for dy, dx in steps])  # fmt: skip
    costs = functional.avg_pool2d((shifted - target).square().sum(1)[:, None], window, 2)[:, 0]
    power = functional.avg_pool2d(target.square().sum(0)[None, None], window, 2)[0, 0]
    moves = torch.tensor(steps, dtype=torch.float32)
    # where the artwork is plain any shift explains it: prefer none
    best = (costs + 0.004 * moves.square().sum(1).view(-1, 1, 1) * power).argmin(0)
    chosen = moves[best] * pixel
    left = costs.gather(0, best[None])[0]
    centre = (torch.arange(best.shape[0], dtype=torch.float32) * 2 + window / 2) * pixel
    spread, weight = 0.0, 1e-6
    for s in sights:
        mine = ((centre[:, None] - s.y).abs() < 0.6 * s.side) & ((centre[None] - s.x).abs() < 0.6 * s.side)
        w = power * mine
        total = float(w.sum())
        if total > 0:
            mean = (chosen * w[..., None]).sum((0, 1)) / total
            spread += float(((chosen - mean).square().sum(-1) * w).sum())
            weight += total
    strong = power > 0.1 * power.max()
    return float(np.sqrt(spread / weight)), float(left[strong].sum() / power[strong].sum().clamp(min=1e-4))


def _second_exposure(rest: Array, model: Array) -> float:
    """How much of the rest is the artwork once more, 3 to 9 pixels away: 1 for a copy as strong as the artwork."""
    spectra = [np.fft.rfft2(a, s=(96, 96), axes=(0, 1)) for a in (rest, model)]
    match = np.fft.irfft2((spectra[0] * spectra[1].conj()).sum(2), s=(96, 96)) / max(float((model**2).sum()), 1e-3)
    offset = np.minimum(np.arange(96), 96 - np.arange(96))
    distance = np.hypot(offset[:, None], offset[None])
    return max(0.0, float(match[(distance >= 3) & (distance <= 9)].max()))


def _patchiness(pixels: Array, model: Array, near: Any) -> float:
    """How uneven the sharpness is: the median of its ratio to the artwork's less that of the softest tenth."""

    def strength(image: Array) -> Any:
        slopes = np.diff(image, axis=0, prepend=image[:1]) ** 2 + np.diff(image, axis=1, prepend=image[:, :1]) ** 2
        return ndimage.uniform_filter(slopes.sum(2), 9)[4:-4:3, 4:-4:3]

    has, should = strength(pixels), strength(model)
    use = near[4:-4:3, 4:-4:3] & (should > 0.25 * should.max())
    if use.sum() < 5:
        return 0.0
    ratios = np.sqrt(has[use] / should[use])
    low, middle = np.quantile(ratios, [0.1, 0.5])
    return float(middle - low)


def _reconstruct(ground: Array, sights: Sequence[Sight]) -> tuple[Array, Array]:
    """The picture that the sights would make on this background, (H, W, 3), and the objects' coverage (H, W)."""
    model, cover = ground.copy(), np.zeros((SIZE, SIZE), np.float32)
    for s in sights:
        art = sprite(s.concept, s.tint)
        # affine sampling places the artwork to a fraction of a pixel, unlike pasting
        step = max(art.size) / s.side
        shrunk = art.convert("RGBa").resize(
            (max(1, round(art.width / step * 2)), max(1, round(art.height / step * 2))), Image.Resampling.LANCZOS
        )
        ratio_x, ratio_y = shrunk.width * step / art.width, shrunk.height * step / art.height
        affine = (ratio_x, 0, shrunk.width / 2 - ratio_x * s.x, 0, ratio_y, shrunk.height / 2 - ratio_y * s.y)
        large = shrunk.transform((SIZE, SIZE), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        layer = np.asarray(large).astype(np.float32) / 255.0
        alpha = layer[..., 3:]
        model = model * (1 - alpha) + layer[..., :3]
        cover = np.maximum(cover, alpha[..., 0])
    return model, cover


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2))) if values.size else 0.0


def _edges(pixels: Array, mask: Any) -> float:
    gy, gx = np.diff(pixels, axis=0, append=pixels[-1:]), np.diff(pixels, axis=1, append=pixels[:, -1:])
    return _rms(np.concatenate([gx[mask], gy[mask]]))


def _saturation(pixels: Array, mask: Any) -> float:
    part = pixels[mask]
    return float((part.max(axis=1) - part.min(axis=1)).mean())
