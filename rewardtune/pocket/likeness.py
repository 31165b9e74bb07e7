"""Whether a drawing is like the artwork of what was asked for: the held-out judge's third network.

People who check a caption look from the picture to the artwork and back; so does this network. The artwork is not at
hand at run time, hence its features are stored, one template for each pair of concept and tint. A drawing is first
laid over its template: of some sizes and places around the box that the judge's first tower found, the nearest in
feature space counts. Used by `pocket/oracle.py`, trained by `dev/pocket/train_likeness.py`; nothing else imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW, ROOM = 40, 8
"""Pixels a side of what is compared, and of the border around it within which it is shifted."""
WIDE = 1.3
"""Side of the window in units of the object's."""
SIZES = (0.85, 0.95, 1.06, 1.18)
"""Sizes that are tried, in units of the box's (ours)."""
CUES = 5
"""Further numbers of the first tower: logits of concept, tint and objectness, log side, local error."""
FEATURES = 16


def _conv(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(width, width), nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def encoder(inputs: int) -> nn.Sequential:
    """Pixels -> features (B, 16, H / 2, W / 2)."""
    return nn.Sequential(_conv(inputs, 24), _conv(24, FEATURES, stride=2), _Residual(FEATURES))


class Likeness(nn.Module):
    """The network. `templates`: stored features (T, 16, 20, 20) of the artwork on nothing, in the order of `pairs`."""

    templates: Tensor
    unit: Tensor
    cue_mean: Tensor
    cue_deviation: Tensor

    def __init__(self, templates: int) -> None:
        super().__init__()
        self.picture = encoder(3)
        side = WINDOW // 2
        self.register_buffer("templates", torch.zeros(templates, FEATURES, side, side, dtype=torch.int8))
        self.register_buffer("unit", torch.ones(FEATURES))
        # the same artwork looks another on another background
        self.ground = nn.Sequential(
            nn.Conv2d(FEATURES + 3, 32, 1), nn.ReLU(inplace=True), nn.Conv2d(32, FEATURES, 3, 1, 1)
        )
        self.join = nn.Sequential(
            _conv(4 * FEATURES, 48), _conv(48, 72, stride=2), _Residual(72), _conv(72, 96, stride=2), _Residual(96)
        )
        self.head = nn.Sequential(nn.Linear(2 * 96 + CUES, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 1))
        self.register_buffer("cue_mean", torch.zeros(CUES))
        self.register_buffer("cue_deviation", torch.ones(CUES))

    def artwork(self, which: Tensor) -> Tensor:
        """Stored templates (B, 16, 20, 20) by index."""
        return self.templates[which].float() * self.unit[:, None, None]

    def expected(self, art: Tensor, background: Tensor) -> Tensor:
        """Features (B, 16, 20, 20) that a drawing like this artwork has on a background (B, 3) in [0, 1]."""
        ground = background[:, :, None, None].expand(-1, -1, *art.shape[2:])
        found: Tensor = F.relu(self.ground(torch.cat([art, ground * 2 - 1], 1)))
        return found

    def compare(self, seen: Tensor, expected: Tensor, cues: Tensor) -> Tensor:
        """Logits (B,) that people would name it. seen, expected: features (B, 16, 20, 20) that lie one over the other;
        cues: (B, 5)."""
        h = self.join(torch.cat([seen, expected, (seen - expected).abs(), seen * expected], 1))
        cues = (cues - self.cue_mean) / self.cue_deviation
        found: Tensor = self.head(torch.cat([h.mean((2, 3)), h.amax((2, 3)), cues], 1))
        return found[:, 0]


def windows(images: Tensor, x: Tensor, y: Tensor, side: Tensor, *, room: int = ROOM) -> Tensor:
    """Windows (B, 3, 40 + 2 room, 40 + 2 room) in [-1, 1] around centres `x`, `y` of objects `side` pixels long, one of
    each image (B, 3, 64, 64) in [0, 1]."""
    pixels = WINDOW + 2 * room
    line = (torch.arange(pixels, device=images.device) + 0.5 - pixels / 2) / (WINDOW / 2)
    half = side * WIDE / 2
    across, down = (((at[:, None] + line * half[:, None]) / 32 - 1) for at in (x, y))
    grid = torch.stack([across[:, None, :].expand(-1, pixels, -1), down[:, :, None].expand(-1, -1, pixels)], -1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False) * 2 - 1


def looks(model: Likeness, images: Tensor, x: Tensor, y: Tensor, side: Tensor) -> list[Tensor]:
    """Features (B, 16, 28, 28) of each object's surroundings at every size that is tried."""
    return [model.picture(windows(images, x, y, side * size)) for size in SIZES]


def lay_over(seen: Sequence[Tensor], expected: Tensor) -> tuple[Tensor, Tensor]:
    """Where each template fits best: features (B, 16, 20, 20) there, and (B, 3): index of the size, row, column.

    Best is the least squared distance of features over all sizes and places.
    """
    b, _, h, w = expected.shape
    wide = seen[0].shape[-1]
    gaps = []
    for features in seen:
        # |s - e|^2 = s^2 - 2 s e + e^2; the last is the same everywhere
        square = F.avg_pool2d(features.square().sum(1, keepdim=True), (h, w), 1) * (h * w)
        product = F.conv2d(features.reshape(1, -1, wide, wide), expected, groups=b)
        gaps.append(square[:, 0] - 2 * product[0])
    places = torch.stack(gaps, 1)  # (B, sizes, 9, 9)
    best = places.flatten(1).argmin(1)
    shifts = places.shape[-1]
    size, row, column = best // shifts**2, best // shifts % shifts, best % shifts
    found = torch.stack(
        [
            seen[s][i, :, r : r + h, c : c + w]
            for i, (s, r, c) in enumerate(zip(size.tolist(), row.tolist(), column.tolist(), strict=True))
        ]
    )
    return found, torch.stack([size, row, column], 1)
