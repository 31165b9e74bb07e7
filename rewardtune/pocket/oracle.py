"""The network behind the held-out judge, and how its maps become facts.

Read by `rewardtune/rewards/pocket_oracle.py`, trained by `dev/pocket/train_oracle.py`; nothing else imports it. Two
towers: one finds and names objects on a 16 x 16 grid; the other, trained after it, measures cleanliness. Whether an
object passes for what a caption asks for is for a third network, which compares it with the artwork (`likeness.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from rewardtune.errors import DataError
from rewardtune.pocket.likeness import Likeness, lay_over, looks
from rewardtune.pocket.scenes import BACKGROUNDS, CONCEPTS, NATURAL, SIZE, tints_of

STRIDE = 4
"""Pixels per grid cell."""
GRID = SIZE // STRIDE
PEAK = 0.35
"""Least height of the objectness map at an object's centre."""
CONFIDENCE = 0.9
"""Least probability of the best concept where nobody asks for anything; below it the object is there but cannot be
named. Of 0.5 to 0.99 this agreed best with a person on pictures of an earlier pipeline that still names 99 % of the
facts of clean renders."""
GLANCES = ((0.0, 0.0, 1.0), (0.015, 0.01, 1.03), (-0.015, -0.01, 1.03), (0.01, -0.015, 0.97), (-0.01, 0.015, 0.97))
"""Shifts in units of an object's side, and sizes, at which it is looked at; the logits are averaged (ours)."""
TOGETHER = 64
"""Objects that are compared at a time, which bounds memory."""
SMALL, LARGE = 24.0, 40.0
"""Pixels: an object below the first is small, above the second large (renders: 18, ordinary 18-32, 48)."""
MARGIN = 6.0
"""Pixels by which mean centres must differ for a relation to hold (renders: 32)."""


@dataclass(frozen=True)
class Detection:
    """One object: its concept (None: cannot be named), tint (None: the artwork's own colours), centre and side in
    pixels, the probabilities of concept and tint, and its cell on the grid."""

    concept: str | None
    tint: str | None
    x: float
    y: float
    side: float
    confidence: float
    tint_confidence: float
    row: int = 0
    column: int = 0


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
    """All three networks as they are stored; the towers have their normalisation folded in."""

    def __init__(self, names: Mapping[str, Sequence[Any]], *, widths: Sequence[int]) -> None:
        super().__init__()
        self.names = names
        self.objects = Objects(names, widths=widths, fused=True)
        self.clean = Cleanliness(widths=widths, fused=True)
        self.likeness = Likeness(len(pairs_of(names)))

    @property
    def paper(self) -> Tensor:
        """Colours (6, 3) of the backgrounds, in [0, 1]."""
        colours = torch.tensor([BACKGROUNDS[name] for name in self.names["backgrounds"]])
        return colours.to(self.likeness.unit) / 255

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


def load(folder: str | Path, *, device: str | torch.device = "cpu", likeness: bool = True) -> Oracle:
    """The stored networks, in float32. DataError when the folder's files are missing or do not belong together.

    likeness: False while the third is still to be trained; it is as drawn by chance then.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        state = {}
        for name, prefix in (("model", ""), ("likeness", "likeness."))[: 1 + likeness]:
            with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    value = file.get_tensor(key)
                    state[prefix + key] = value.float() if value.is_floating_point() else value
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"pocket-oracle: {folder} cannot be read ({error}); rebuild it with `make pocket`.") from error
    model = Oracle(config["names"], widths=config["widths"])
    if not likeness:
        state |= {f"likeness.{key}": value for key, value in model.likeness.state_dict().items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(
            f"pocket-oracle: {folder}: the weights do not fit config.json ({str(error).splitlines()[0]}); "
            "rebuild it with `make pocket`."
        ) from error
    return model.eval().requires_grad_(False).to(device)


def pairs_of(names: Mapping[str, Sequence[Any]]) -> list[tuple[str, str | None]]:
    """Every concept in every tint that shows on it, in the order of the stored templates."""
    return [(concept, tint) for concept in names["concepts"] if concept in CONCEPTS
            for tint in (None, *tints_of(concept))]  # fmt: skip


def cues(maps: Mapping[str, Tensor], row: Tensor, cell: Tensor, asked: Tensor) -> Tensor:
    """What the towers say of objects (N, 5): logits of the asked concept, the asked tint and objectness, log side and
    local error. row (N,): picture; cell (N, 2): row and column on the grid; asked (N, 2): concept and tint."""
    r, c = cell.unbind(1)

    def logit(name: str, which: Tensor) -> Tensor:
        log = maps[name][row, :, r, c].double().log_softmax(-1).gather(1, which[:, None])[:, 0]
        return (log - torch.log1p(-log.exp().clamp(max=1 - 1e-9))).float()

    return torch.stack(
        [logit("concept", asked[:, 0]), logit("tint", asked[:, 1]), maps["heat"][row, r, c], maps["side"][row, r, c],
         maps["error_map"][row, r // 2, c // 2]], 1
    )  # fmt: skip


@torch.no_grad()
def read(model: Oracle, images: Tensor, claims: Sequence[Sequence[Mapping[str, Any]]] | None = None) -> list[Reading]:
    """Read images (B, 3, 64, 64) in [0, 1].

    claims: facts of the caption of each image. An object then has the name of what is asked for and what it is most
    like, if people would name it so; without claims, and for what nobody asks for, the first tower names it.
    """
    images = images.float().clamp(0, 1)
    maps = {name: value.cpu() for name, value in model(images).items()}
    heat = maps["heat"].sigmoid()
    peaks = (heat == F.max_pool2d(heat[:, None], 3, 1, 1)[:, 0]) & (heat >= PEAK)
    background = maps["background"].softmax(-1)
    cleanliness = (-maps["error"]).exp()
    found = [_objects(model, {k: v[i] for k, v in maps.items()}, heat[i], peaks[i]) for i in range(len(heat))]
    if claims is not None:
        found = _named(model, images, maps, found, claims)
    readings = []
    for i, objects in enumerate(found):
        best = int(background[i].argmax())
        readings.append(
            Reading(
                objects=objects,
                background=model.names["backgrounds"][best],
                background_confidence=float(background[i, best]),
                cleanliness=float(cleanliness[i]),
            )
        )
    return readings


def _named(
    model: Oracle,
    images: Tensor,
    maps: Mapping[str, Tensor],
    found: Sequence[tuple[Detection, ...]],
    claims: Sequence[Sequence[Mapping[str, Any]]],
) -> list[tuple[Detection, ...]]:
    """The objects of each picture, named by comparing them with what its caption asks for."""
    names, pairs = model.names, {pair: k for k, pair in enumerate(pairs_of(model.names))}
    asked = [wanted(facts, pairs) for facts in claims]
    candidates: dict[tuple[int, int], list[tuple[str, str | None]]] = {}
    for i, here in enumerate(found):
        for pair in asked[i]:
            for j in _places(names["concepts"].index(pair[0]), {k: v[i] for k, v in maps.items()}, here):
                candidates.setdefault((i, j), []).append(pair)
    objects = sorted(candidates)
    best: dict[tuple[int, int], tuple[float, str]] = {}
    for start in range(0, len(objects), TOGETHER):
        part = objects[start : start + TOGETHER]
        own = [found[i][j] for i, j in part]
        x, y, side = (torch.tensor([getattr(o, name) for o in own]).to(images) for name in ("x", "y", "side"))
        tasks = [(k, pair) for k, place in enumerate(part) for pair in candidates[place]]
        which = torch.tensor([k for k, _ in tasks])
        row = torch.tensor([part[k][0] for k, _ in tasks])
        cell = torch.tensor([(own[k].row, own[k].column) for k, _ in tasks])
        told = torch.tensor([(names["concepts"].index(c), names["tints"].index(t)) for _, (c, t) in tasks])
        ground = model.paper[maps["background"][row].argmax(1).to(images.device)]
        art = model.likeness.artwork(torch.tensor([pairs[pair] for _, pair in tasks]).to(images.device))
        expected = model.likeness.expected(art, ground)
        told = cues(maps, row, cell, told).to(images)
        logits = torch.zeros(len(tasks), device=images.device)
        for right, down, size in GLANCES:
            around = (x + right * side, y + down * side, (side * size).clamp(8, 60))
            views = looks(model.likeness, images[[i for i, _ in part]], *around)
            seen, _ = lay_over([view[which] for view in views], expected)
            logits += model.likeness.compare(seen, expected, told) / len(GLANCES)
        for (k, (concept, _)), logit in zip(tasks, logits.tolist(), strict=True):
            best[part[k]] = max(best.get(part[k], (-float("inf"), "")), (logit, concept))

    def name(i: int, j: int, detection: Detection) -> Detection:
        if (i, j) not in best:
            return detection
        logit, concept = best[i, j]
        if logit > 0:
            return replace(detection, concept=concept, confidence=1 / (1 + math.exp(-logit)))
        other = detection.concept not in {c for c, _ in asked[i]}
        return detection if other else replace(detection, concept=None)

    return [tuple(name(i, j, o) for j, o in enumerate(own)) for i, own in enumerate(found)]


def _places(concept: int, maps: Mapping[str, Tensor], found: Sequence[Detection]) -> list[int]:
    """Which objects may be of a concept: those that the first tower takes for it, and the one that it takes for it the
    most."""
    chances = [maps["concept"][:, o.row, o.column].log_softmax(0) for o in found]
    sure = [float(c[concept]) + float(F.logsigmoid(maps["heat"][o.row, o.column]))
            for c, o in zip(chances, found, strict=True)]  # fmt: skip
    most = max(sure, default=0.0)
    return [j for j, (c, s) in enumerate(zip(chances, sure, strict=True)) if s == most or int(c.argmax()) == concept]


def wanted(
    facts: Sequence[Mapping[str, Any]], pairs: Mapping[tuple[str, str | None], int]
) -> list[tuple[str, str | None]]:
    """What a caption asks for that there is artwork of: concepts with their tints."""
    tints = {fact["concept"]: fact.get("tint") for fact in facts if fact.get("kind") == "colour" and "concept" in fact}
    concepts = dict.fromkeys(fact[key] for fact in facts for key in ("concept", "first", "second") if key in fact)
    asked = [(c, tints.get(c) if (c, tints.get(c)) in pairs else None) for c in concepts]
    return [pair for pair in asked if pair in pairs]


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
            row=row,
            column=column,
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
