"""How varied a side's images are: one number a side, fixed before the first comparison. numpy, scipy, Pillow.

Two images differ by their coarse colours and by the directions of their edges, not by how sharp they are: a side must
not gain diversity by sharpening, nor lose it by blurring alone. See `features`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]

VERSION = 1
"""Goes up when the measure changes; figures of different versions are not comparable."""
_SIDE = 32
"""Images are averaged down to this side first, whatever their size."""
_COLOUR_GRIDS = (8, 4, 2)
_CELLS = 4
_DIRECTIONS = 8
_EDGE_WEIGHT = 0.35
"""Makes both blocks of features equally far apart on average (measured on 80 pocket scenes)."""
_EDGE_FLOOR = 0.5
"""Edge energy (whole image, values 0 to 1) under which direction histograms fade out; plain images have no edges."""


@dataclass(frozen=True)
class Diversity:
    """Diversity of one side.

    within: mean distance between images of the same prompt under different seeds; None with one seed.
    between: mean distance between images of different prompts; None with one prompt.
    value: their geometric mean, which falls to 0 if either collapses; the one that exists otherwise. 0 to about 1.
    """

    value: float
    within: float | None
    between: float | None


def features(image: Image.Image) -> Floats:
    """One image -> a vector whose Euclidean distances are the measure. Two blocks of about equal spread:

    - colour: means over 8 x 8, 4 x 4 and 2 x 2 grids of the image in brightness and two opponent-colour channels, each
      grid with the same total weight;
    - edges: for each of 4 x 4 cells, how much of the image's edge energy runs in each of 8 directions, scaled by the
      energy of the whole image, so that contrast and sharpness drop out.
    """
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float64) / 255.0
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue
    opponent = np.stack([brightness, (red - green) / 2, (red + green) / 4 - blue / 2], axis=-1)
    blocks = []
    for grid in _COLOUR_GRIDS:
        cell = _SIDE // grid
        means = opponent.reshape(grid, cell, grid, cell, 3).mean(axis=(1, 3))
        blocks.append(means.ravel() / (grid * np.sqrt(len(_COLOUR_GRIDS))))
    return np.concatenate([*blocks, _EDGE_WEIGHT * _edges(brightness)])


def distances(vectors: Floats) -> Floats:
    """(N, F) -> (N, N) Euclidean distances."""
    from scipy.spatial.distance import pdist, squareform

    table: Floats = squareform(pdist(vectors))
    return table


def diversity(images: Iterable[Image.Image], prompts: Iterable[int]) -> Diversity:
    """The diversity of one side's images; `prompts` names the prompt of each. At least two images."""
    vectors = np.stack([features(image) for image in images])
    owner = np.asarray(list(prompts))
    if len(owner) != len(vectors):
        raise ValueError(f"{len(vectors)} images but {len(owner)} prompts")
    if len(vectors) < 2:
        raise ValueError("diversity needs at least two images")
    table = distances(vectors)
    same = owner[:, None] == owner[None, :]
    within = _mean(table, same & ~np.eye(len(owner), dtype=bool))
    between = _mean(table, ~same)
    if within is not None and between is not None:
        value = float(np.sqrt(within * between))
    else:
        value = between if between is not None else within if within is not None else 0.0
    return Diversity(value, within, between)


def _edges(brightness: Floats) -> Floats:
    """Direction histograms of the edges: (4 * 4 * 8,), Euclidean norm at most 1."""
    smooth = (
        brightness
        + np.roll(brightness, 1, 0) + np.roll(brightness, -1, 0)
        + np.roll(brightness, 1, 1) + np.roll(brightness, -1, 1)
    ) / 5  # fmt: skip
    down, across = np.gradient(smooth)
    strength = np.hypot(down, across)
    strength[[0, -1], :] = 0.0  # the smoothing wraps around there
    strength[:, [0, -1]] = 0.0
    angle = np.mod(np.arctan2(down, across), np.pi) / np.pi * _DIRECTIONS
    lower = np.floor(angle).astype(int) % _DIRECTIONS
    share = angle - np.floor(angle)
    rows, columns = np.indices(brightness.shape) // (_SIDE // _CELLS)
    cell = (rows * _CELLS + columns) * _DIRECTIONS
    histogram = np.bincount(
        np.concatenate([(cell + lower).ravel(), (cell + (lower + 1) % _DIRECTIONS).ravel()]),
        weights=np.concatenate([(strength * (1 - share)).ravel(), (strength * share).ravel()]),
        minlength=_CELLS * _CELLS * _DIRECTIONS,
    )
    out: Floats = histogram / np.sqrt((histogram**2).sum() + _EDGE_FLOOR**2)
    return out


def _mean(table: Floats, mask: NDArray[np.bool_]) -> float | None:
    return float(table[mask].mean()) if mask.any() else None
