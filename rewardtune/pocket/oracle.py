"""The network behind the held-out judge, and how its maps become facts.

Read by `rewardtune/rewards/pocket_oracle.py`, trained by `dev/pocket/train_oracle.py`; nothing else imports it. Two
towers: one finds and names objects on a 16 x 16 grid; the other, trained after it, measures cleanliness.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from rewardtune.errors import DataError
from rewardtune.pocket.scenes import NATURAL, SIZE

STRIDE = 4
"""Pixels per grid cell."""
GRID = SIZE // STRIDE
PEAK = 0.35
"""Least height of the objectness map at an object's centre."""
CONFIDENCE = 0.9
"""Least probability of the best concept; below it the object is there but cannot be named. Of 0.5 to 0.99 this agreed
best with a person on pictures of an earlier pipeline that still names 99 % of the facts of clean renders."""
SMALL, LARGE = 24.0, 40.0
"""Pixels: an object below the first is small, above the second large (renders: 18, ordinary 18-32, 48)."""
MARGIN = 6.0
"""Pixels by which mean centres must differ for a relation to hold (renders: 32)."""


@dataclass(frozen=True)
class Detection:
    """One object: its concept (None: cannot be named), tint (None: the artwork's own colours), centre and side in
    pixels, and the probabilities of concept and tint."""

    concept: str | None
    tint: str | None
    x: float
    y: float
    side: float
    confidence: float
    tint_confidence: float


@dataclass(frozen=True)
class Reading:
    """What the judge sees in one picture. `cleanliness` is 1 for a clean render and falls towards 0."""

    objects: tuple[Detection, ...]
    background: str
    background_confidence: float
    cleanliness: float


class _Conv(nn.Sequential):
    """Convolution, normalisation, ReLU. `fused`: the normalisation is already folded into the convolution."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, fused: bool) -> None:
        norm = nn.Identity() if fused else nn.BatchNorm2d(outputs)
        super().__init__(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=fused), norm, nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(_Conv(width, width, fused=fused), _Conv(width, width, fused=fused))

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.body(x)
        return x + change


class Objects(nn.Module):
    """The first tower: images (B, 3, 64, 64) in [0, 1] -> what is where. `names`: what the logits stand for."""

    def __init__(self, names: Mapping[str, Sequence[Any]], *, widths: Sequence[int], fused: bool) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.stem = nn.Sequential(_Conv(3, a, kernel=5, stride=2, fused=fused), _Conv(a, a, fused=fused))
        self.down4 = nn.Sequential(_Conv(a, b, stride=2, fused=fused), *(_Residual(b, fused=fused) for _ in range(2)))
        self.down8 = nn.Sequential(_Conv(b, c, stride=2, fused=fused), *(_Residual(c, fused=fused) for _ in range(2)))
        self.down16 = nn.Sequential(_Conv(c, d, stride=2, fused=fused), _Residual(d, fused=fused))
        self.across16, self.across8 = nn.Conv2d(d, c, 1), nn.Conv2d(c, b, 1)
        self.merge8, self.merge4 = _Conv(c, c, fused=fused), _Conv(b, b, fused=fused)
        self.head = _Conv(b, e, fused=fused)
        # objectness, offset x y, log side | concepts | tints | background logits and their weight
        self.sections = (1, 2, 1, len(names["concepts"]), len(names["tints"]), len(names["backgrounds"]), 1)
        self.out = nn.Conv2d(e, sum(self.sections), 1)

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Logits over the grid (B, ?, 16, 16) with `background` (B, 6), and features at 16 x 16 and 8 x 8."""
        x4 = self.down4(self.stem(images * 4 - 2))
        x8 = self.down8(x4)
        x16 = self.down16(x8)
        x8 = self.merge8(x8 + F.interpolate(self.across16(x16), scale_factor=2.0))
        x4 = self.head(self.merge4(x4 + F.interpolate(self.across8(x8), scale_factor=2.0)))
        maps = self.out(x4).float().split(self.sections, dim=1)
        heat, offset, side, concept, tint, background, weight = maps
        shares = weight.flatten(2).softmax(-1)
        return {
            "heat": heat[:, 0],
            "offset": offset,
            "side": side[:, 0],
            "concept": concept,
            "tint": tint,
            "background": (background.flatten(2) * shares).sum(-1),
        }, (x4, x8)


class Cleanliness(nn.Module):
    """The second tower: looks at the pixels, and knows from the first tower's features what should be there."""

    def __init__(self, *, widths: Sequence[int], fused: bool) -> None:
        super().__init__()
        _, _, c, _, e = widths
        self.pixels = nn.Sequential(
            _Conv(3, 24, kernel=5, stride=2, fused=fused), _Conv(24, 48, stride=2, fused=fused),
            _Residual(48, fused=fused),
        )  # fmt: skip
        self.join4 = _Conv(48 + e, 96, kernel=1, fused=fused)
        self.down8 = _Conv(96, 96, stride=2, fused=fused)
        self.join8 = nn.Sequential(_Conv(96 + c, 96, kernel=1, fused=fused), _Residual(96, fused=fused))
        self.out = nn.Conv2d(96, 2, 1)

    def forward(self, images: Tensor, features: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """`error` (B,), the distance from a clean render, and `error_map` (B, 8, 8); cleanliness is exp(-error)."""
        x = self.join4(torch.cat([self.pixels(images * 4 - 2), features[0]], 1))
        x = self.join8(torch.cat([self.down8(x), features[1]], 1))
        local, weight = self.out(x).float().split(1, dim=1)
        error_map = F.softplus(local)[:, 0]
        shares = weight.flatten(1).softmax(-1)
        return {"error_map": error_map, "error": (error_map.flatten(1) * shares).sum(-1)}


class Oracle(nn.Module):
    """Both towers as they are stored, normalisation folded in."""

    def __init__(self, names: Mapping[str, Sequence[Any]], *, widths: Sequence[int]) -> None:
        super().__init__()
        self.names = names
        self.objects = Objects(names, widths=widths, fused=True)
        self.clean = Cleanliness(widths=widths, fused=True)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """All maps of images (B, 3, 64, 64) in [0, 1]."""
        maps, features = self.objects(images)
        cleanliness: dict[str, Tensor] = self.clean(images, features)
        return {**maps, **cleanliness}


def fold(tower: nn.Module, into: nn.Module) -> None:
    """Copy a trained tower into one of the same kind without normalisation layers, folding those into convolutions."""
    state: dict[str, Tensor] = {}
    for name, module in tower.named_modules():
        if isinstance(module, _Conv):
            convolution, norm = module[0], module[1]
            assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            conv = nn.utils.fuse_conv_bn_eval(convolution.eval(), norm.eval())
            assert conv.bias is not None
            state |= {f"{name}.0.weight": conv.weight, f"{name}.0.bias": conv.bias}
    own = tower.state_dict()
    into.load_state_dict(state | {key: own[key] for key in into.state_dict() if key not in state})


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> Oracle:
    """The stored network, in float32. DataError when the folder's files are missing or do not belong together."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"pocket-oracle: {folder} cannot be read ({error}); rebuild it with `make pocket`.") from error
    model = Oracle(config["names"], widths=config["widths"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(
            f"pocket-oracle: {folder}: model.safetensors does not fit config.json ({str(error).splitlines()[0]}); "
            "rebuild it with `make pocket`."
        ) from error
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def read(model: Oracle, images: Tensor) -> list[Reading]:
    """Read images (B, 3, 64, 64) in [0, 1]."""
    maps = {name: value.cpu() for name, value in model(images.float().clamp(0, 1)).items()}
    heat = maps["heat"].sigmoid()
    peaks = (heat == F.max_pool2d(heat[:, None], 3, 1, 1)[:, 0]) & (heat >= PEAK)
    background = maps["background"].softmax(-1)
    cleanliness = (-maps["error"]).exp()
    readings = []
    for i in range(len(heat)):
        best = int(background[i].argmax())
        readings.append(
            Reading(
                objects=_objects(model, {k: v[i] for k, v in maps.items()}, heat[i], peaks[i]),
                background=model.names["backgrounds"][best],
                background_confidence=float(background[i, best]),
                cleanliness=float(cleanliness[i]),
            )
        )
    return readings


def _objects(model: Oracle, maps: Mapping[str, Tensor], heat: Tensor, peaks: Tensor) -> tuple[Detection, ...]:
    """The objects of one picture, highest peak first; a peak inside a higher one's object is its echo."""
    found: list[Detection] = []
    cells = sorted(peaks.nonzero().tolist(), key=lambda cell: -float(heat[cell[0], cell[1]]))
    for row, column in cells:
        concept = maps["concept"][:, row, column].softmax(0)
        tint = maps["tint"][:, row, column].softmax(0)
        best, hue = int(concept.argmax()), int(tint.argmax())
        name, colour = model.names["concepts"][best], model.names["tints"][hue]
        detection = Detection(
            concept=name if float(concept[best]) >= CONFIDENCE else None,
            # a blue whale is a whale in its own colours
            tint=None if name in NATURAL.get(colour, ()) else colour,
            x=(column + 0.5 + float(maps["offset"][0, row, column])) * STRIDE,
            y=(row + 0.5 + float(maps["offset"][1, row, column])) * STRIDE,
            side=float(maps["side"][row, column].exp()) * 16.0,
            confidence=float(concept[best]),
            tint_confidence=float(tint[hue]),
        )
        reach = 0.4
        if all((detection.x - o.x) ** 2 + (detection.y - o.y) ** 2 > (reach * max(detection.side, o.side)) ** 2
               for o in found):  # fmt: skip
            found.append(detection)
    return tuple(found)


def check(reading: Reading, facts: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each fact (the form of `Scene.facts`) holds in a reading. DataError for a fact of another form."""
    return [_holds(reading, fact) for fact in facts]


def _holds(reading: Reading, fact: Mapping[str, Any]) -> bool:
    def instances(concept: str) -> list[Detection]:
        return [o for o in reading.objects if o.concept == concept]

    try:
        match fact["kind"]:
            case "object":
                return bool(instances(fact["concept"]))
            case "count":
                return bool(len(instances(fact["concept"])) == fact["count"])
            case "colour":
                them = instances(fact["concept"])
                return bool(them) and all(o.tint == fact["tint"] for o in them)
            case "size":
                them = instances(fact["concept"])
                small = {"small": True, "large": False}[fact["size"]]
                return bool(them) and all(o.side < SMALL if small else o.side > LARGE for o in them)
            case "relation":
                first, second = instances(fact["first"]), instances(fact["second"])
                if not first or not second:
                    return False
                dx = sum(o.x for o in first) / len(first) - sum(o.x for o in second) / len(second)
                dy = sum(o.y for o in first) / len(first) - sum(o.y for o in second) / len(second)
                return {"left": -dx, "right": dx, "above": -dy, "below": dy}[fact["relation"]] > MARGIN
            case "background":
                return bool(reading.background == fact["background"])
            case kind:
                raise DataError(f"pocket-oracle: a fact of the kind {kind!r} is not one that it can check: {fact!r}.")
    except (KeyError, TypeError) as error:
        raise DataError(
            f"pocket-oracle: the fact {fact!r} lacks or misspells {error}; facts have the form that the prompts of "
            "`pocket:prompts/heldout` show."
        ) from error
