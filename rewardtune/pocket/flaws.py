"""Measures of what is wrong with a picture, against its best reconstruction from the artwork that the eye found in it.

Called by `eye.py`; `panel.py` turns the measures into points. Nothing here is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional

from rewardtune.pocket.scenes import BACKGROUNDS, SIZE, sprite

if TYPE_CHECKING:
    from rewardtune.pocket.eye import Sight

Array = np.ndarray[Any, np.dtype[np.float32]]


def measure(pixels: Array, ground: Array, sights: Sequence[Sight]) -> dict[str, float]:
    """Differences between a picture and its best reconstruction from artwork; 0 (or 1 for ratios) for a clean one.

    unclean: rest outside objects; clouds and grain: its slow and fast parts; junk: share of strong pixels outside
    objects that no artwork explains; ramp: slope of the background; off: distance of the background from a colour of
    the world; sharp: edge strength inside objects against the artwork's; contrast and vivid: contrast and saturation
    against the artwork's; rest: unexplained share inside objects; bent: that of the outlines; fit: mean score;
    moved, torn: spread in pixels of the best shifts of small and of larger parts of the objects; broken, gone: shares
    of those that no shift explains; double: strength of a second exposure; halo: strength of what lies just beside the
    objects, beyond what lies far from them; patchy: unevenness of the sharpness; unknown: share of what is drawn in
    which no artwork is recognised.
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
    values["unknown"] = _unknown(difference, sights)
    return values


def _unknown(difference: Array, sights: Sequence[Sight]) -> float:
    """Share of what is drawn that lies where no artwork is recognised."""
    drawn = (difference.astype(np.float64) ** 2).sum(axis=2)
    drawn[np.abs(difference).max(axis=2) < 0.12] = 0.0
    if drawn.sum() < 2.0:
        return 0.0
    known = np.zeros((SIZE, SIZE))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    for s in sights:
        sure = min(max((s.score - 0.68) / 0.22, 0.0), 1.0) * min(max((s.score - s.rival) / 0.04 + 0.5, 0.0), 1.0)
        inside = np.maximum(np.abs(x - s.x), np.abs(y - s.y)) < 0.6 * s.side
        known = np.maximum(known, sure * inside)
    return float(((1 - known) * drawn).sum() / drawn.sum())


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
    coarse, coarse_target = functional.avg_pool2d(picture, 2), functional.avg_pool2d(target, 2)
    torn, gone = _flow(coarse, coarse_target, sights, 2, 4, 5)
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
