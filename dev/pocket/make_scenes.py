"""Write the pictures and prompts of the pocket world: first step of `make pocket`.

Captioned training pictures go to a folder (never committed); the three prompt lists go into the package. The pictures
are of mixed quality, as collected ones are: some captions are wrong and some pictures are soft, pale or badly lit. A
model trained on them draws the mixture, which is what rewards are there to mend.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image

from rewardtune.pocket.faults import degrade, misread
from rewardtune.pocket.scenes import Scene, Split, render, sample_scene, simple_scene

PROMPTS: dict[Split, int] = {"train": 2000, "validation": 128, "heldout": 256}
MISCAPTIONED, SPOILED = 0.3, 0.45
"""Shares of training pictures that break a claim of their caption, and that carry a drawing fault. Ours."""
COMMON_FAULTS = ("blur", "pale", "cast", "blotches")
"""Faults that collected pictures have: of focus and light."""
PROMPT_FOLDER = Path(__file__).parents[2] / "rewardtune" / "pocket" / "data" / "prompts"


def write_scenes(folder: Path, *, count: int, simple: int, seed: int) -> None:
    """Render `count` scenes of the train split and `simple` simple ones to `folder`, with manifest.jsonl."""
    rng = random.Random(f"scenes/{seed}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
        for i in range(count + simple):
            scene = sample_scene(rng, "train") if i < count else simple_scene(rng)
            name = f"images/{i:06d}.png"
            collected(scene, rng).save(folder / name, compress_level=1)
            manifest.write(json.dumps({"image": name, "caption": scene.caption, "facts": scene.facts()}) + "\n")


def collected(scene: Scene, rng: random.Random) -> Image.Image:
    """A picture for the caption of a scene as a collection would have it; never a composition of another split."""
    drawn = scene
    if rng.random() < MISCAPTIONED:
        drawn = misread(scene, rng)
        while drawn.split != "train":
            drawn = misread(scene, rng)
    picture = render(drawn)
    if rng.random() < SPOILED:
        picture = degrade(picture, rng, COMMON_FAULTS)
    return picture


def draw_prompts(*, split: Split, count: int, seed: int) -> list[Scene]:
    """`count` scenes of one split, no caption twice."""
    rng = random.Random(f"prompts/{split}/{seed}")
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, split)
        scenes.setdefault(scene.caption, scene)
    return list(scenes.values())


def write_prompts(folder: Path, *, seed: int) -> None:
    """Write {train, validation, heldout}.jsonl: one row a prompt with its facts and composition."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in PROMPTS.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for scene in draw_prompts(split=split, count=count, seed=seed):
                row = {"prompt": scene.caption, "facts": scene.facts(), "composition": scene.composition}
                file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the training pictures go")
    parser.add_argument("--count", type=int, default=24_000)
    parser.add_argument("--simple", type=int, default=12_000, help="further scenes of one or two untinted objects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=Path, default=PROMPT_FOLDER, help="where the three prompt lists go")
    args = parser.parse_args()
    write_scenes(args.folder, count=args.count, simple=args.simple, seed=args.seed)
    write_prompts(args.prompts, seed=args.seed)


if __name__ == "__main__":
    main()
