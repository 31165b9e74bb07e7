"""Have the simulated panel rate pictures, and write preference records in the format of docs/data.md.

Groups of four pictures of one prompt: renders (clean, misread, with faults), renders passed through the autoencoder,
and samples of the pipeline where a folder of them is given. Writes into OUT:

    images/<split>/*.png
    train.jsonl validation.jsonl heldout.jsonl   all annotators' scores, their aggregate, critiques on some pictures
    preferences.jsonl                            pairs of train groups with nothing but a choice
    pictures.jsonl                               how each picture was made and what a careful person would say
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image

from rewardtune.data.images import open_image, to_pil, to_tensor
from rewardtune.data.records import PreferenceGroup, RatedImage, read_prompts, write_records
from rewardtune.pocket import panel
from rewardtune.pocket.faults import FAULTS, misread
from rewardtune.pocket.scenes import Group, Scene, Split, place, render, sample_scene
from rewardtune.randomness import choice
from rewardtune.types import Prompt

GROUPS: dict[Split, int] = {"train": 2500, "validation": 150, "heldout": 300}
CRITIQUED = 0.4
"""Share of pictures that get a critique."""
RENDERED = 0.3
"""Least share of groups without samples, so that the known scale stays in the data."""


@dataclass
class Picture:
    """A picture on its way to the panel. `drawn` is None for samples: nothing but the facts is known of them."""

    source: str
    image: Image.Image
    drawn: Scene | None
    faults: list[panel.Fault] = field(default_factory=list)
    opinion: panel.Opinion | None = None


def scene_of(facts: Sequence[panel.Fact]) -> Scene:
    """The scene that a prompt's facts describe, without places."""
    by_kind: dict[str, list[panel.Fact]] = defaultdict(list)
    for fact in facts:
        by_kind[fact["kind"]].append(fact)
    sizes = {f["group"]: f["size"] for f in by_kind["size"]}
    groups = tuple(
        Group(o["concept"], t["tint"], c["count"], sizes.get(o["group"]))
        for o, c, t in zip(by_kind["object"], by_kind["count"], by_kind["colour"], strict=True)
    )
    relations = by_kind["relation"]
    relation = relations[0]["relation"] if relations else None
    third = relations[1]["relation"] if len(relations) > 1 else None
    return Scene(groups, by_kind["background"][0]["background"], relation, third)


def make_render(asked: Scene, kind: str, rng: random.Random) -> Picture:
    """A render that answers the caption of `asked`, in one of the ways that `KINDS` names."""
    placed = place(asked, rng)
    drawn = placed
    if "misread" in kind:
        drawn = misread(placed, rng)
    elif "other" in kind:
        drawn = place(sample_scene(rng, asked.split), rng)
    picture = Picture(kind, render(drawn), drawn)
    if "faulty" in kind:
        for name in rng.sample(sorted(FAULTS), rng.choices([1, 2], [3, 1])[0]):
            # small severities are as common as large ones: the eye must learn the difference between 4 and 5
            severity = rng.random() ** 1.5
            # A smear or a cut that misses the objects teaches nothing; three tries make most of them hit.
            tries = [panel.apply_fault(picture.image, name, severity, rng) for _ in range(TRIES.get(name, 1))]
            picture.image, fault = max(tries, key=lambda made: made[1].seen)
            picture.faults.append(fault)
    return picture


KINDS = {
    "clean": 2.0, "misread": 3.0, "faulty": 3.0, "misread faulty": 2.0, "other": 0.8,
    "decoded": 2.0, "misread decoded": 2.0, "other decoded": 0.8,
}  # fmt: skip
"""Ways to make a render and how often each is taken: `other` is a scene that has nothing to do with the caption,
`decoded` ones pass through the autoencoder (ours)."""
TRIES = {"smear": 3, "shear_halves": 3}


def decode(pictures: Sequence[Picture], vae: Any, rng: random.Random) -> None:
    """Pass pictures through the autoencoder, with noise on the latents for some of them."""
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    for start in range(0, len(pictures), 64):
        part = pictures[start : start + 64]
        with torch.no_grad():
            latents = vae.encode(to_tensor([p.image for p in part]) * 2 - 1).latent_dist.mode()
            amount = torch.tensor([max(0.0, rng.uniform(-0.3, 0.6)) for _ in part]).view(-1, 1, 1, 1)
            noise = torch.randn(latents.shape, generator=generator) * amount / vae.config.scaling_factor
            images = to_pil(vae.decode(latents + noise).sample / 2 + 0.5)
        for picture, image in zip(part, images, strict=True):
            picture.image = image


def judge(picture: Picture, asked: Scene, facts: Sequence[panel.Fact]) -> panel.Opinion:
    """What is known of a picture's making decides; the eye fills in the rest."""
    if picture.drawn is None:
        return panel.judge_picture(picture.image, facts)
    known = panel.judge_recipe(asked, picture.drawn, picture.faults)
    if "decoded" not in picture.source:
        return known
    seen = panel.judge_picture(picture.image, facts)
    return panel.Opinion({**seen.values, "alignment": known.values["alignment"]}, known.wrong, seen.flaws)


@dataclass
class Draft:
    """A group before it is rated."""

    prompt: Prompt
    asked: Scene
    pictures: list[Picture]


Samples = dict[str, tuple[Prompt, list[tuple[Path, str]]]]
"""Prompt -> the prompt with its facts, and its samples with the stage that each is of."""


def read_samples(folder: Path) -> Samples:
    """Samples of every .jsonl in `folder`: rows with `image`, `prompt`, `facts` and, where known, `stage`."""
    found: Samples = {}
    for manifest in sorted(folder.rglob("*.jsonl")):
        for prompt in read_prompts(manifest):
            _, images = found.setdefault(str(prompt), (prompt, []))
            stage = str(prompt.metadata.get("stage", manifest.parent.name))
            images.append((manifest.parent / prompt.metadata["image"], stage))
    return found


def draft_groups(split: Split, count: int, *, seed: int, samples: Samples, decoding: bool) -> list[Draft]:
    """Groups of four: first those with samples, mixed over the stages and filled up with renders, then renders only."""
    drafts: list[Draft] = []
    rng = choice(seed, f"annotate/{split}")
    kinds = [k for k in KINDS if decoding or "decoded" not in k]
    chunks: list[tuple[Prompt, Scene, list[tuple[Path, str]]]] = []
    for prompt, images in samples.values():
        asked = scene_of(prompt.metadata["facts"])
        if asked.split == split:
            rng.shuffle(images)
            while images:
                size = rng.choice([4, 3, 2])
                chunks.append((prompt, asked, images[:size]))
                images = images[size:]
    rng.shuffle(chunks)
    for prompt, asked, images in chunks[: int(count * (1 - RENDERED))]:
        pictures = [Picture(f"sample {stage}", open_image(path), None) for path, stage in images]
        drafts.append(Draft(prompt, asked, pictures))
    while len(drafts) < count:
        asked = sample_scene(rng, split)
        drafts.append(Draft(Prompt(asked.caption, {"facts": asked.facts()}), asked, []))
    for draft in drafts:
        chosen = rng.choices(kinds, [KINDS[k] for k in kinds], k=4 - len(draft.pictures))
        draft.pictures += [make_render(draft.asked, kind, rng) for kind in chosen]
        rng.shuffle(draft.pictures)
    return drafts


def rate_group(name: str, draft: Draft, folder: Path, *, split: Split, rng: random.Random) -> PreferenceGroup:
    """Save the pictures of a group and let every annotator rate them."""
    rated = []
    for k, picture in enumerate(draft.pictures):
        path = folder / f"{name}-{k}.png"
        picture.image.save(path, compress_level=1)
        picture.opinion = judge(picture, draft.asked, draft.prompt.metadata["facts"])
        annotations = tuple(panel.rate(picture.opinion, rng))
        scores = panel.aggregate(annotations, trimmed=split == "heldout")
        note = panel.critique(picture.opinion, rng) if rng.random() < CRITIQUED else None
        rated.append(RatedImage(path.resolve(), scores, annotations, note))
    prompt = Prompt(str(draft.prompt), {"facts": draft.prompt.metadata["facts"],
                                        "composition": draft.asked.composition})  # fmt: skip
    return PreferenceGroup(name, prompt, tuple(rated))


def choose(group: PreferenceGroup, rng: random.Random) -> PreferenceGroup | None:
    """Only the choices of one annotator between pictures that differ for them; None if there is no such pair."""
    member = rng.randrange(len(panel.PANEL))
    weights = panel.PANEL[member].emphasis
    values = [sum(w * image.annotations[member][d] for w, d in zip(weights, panel.DIMENSIONS, strict=True))
              for image in group.images]  # fmt: skip
    pairs = tuple((a, b) for a in range(len(values)) for b in range(len(values)) if values[a] - values[b] >= 1.0)
    picked = tuple(rng.sample(pairs, min(len(pairs), 3)))
    if not picked:
        return None
    images = tuple(RatedImage(image.image) for image in group.images)
    kept = sorted({i for pair in picked for i in pair})
    order = {i: k for k, i in enumerate(kept)}
    return PreferenceGroup(group.id, group.prompt, tuple(images[i] for i in kept),
                           tuple((order[a], order[b]) for a, b in picked))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=Path, help="folder of samples: PNG and .jsonl (image, prompt, facts)")
    parser.add_argument("--vae", type=Path, help="folder of the pipeline's autoencoder")
    parser.add_argument("--seed", type=int, default=0)
    for split, count in GROUPS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"groups (default {count})")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    vae = None
    if args.vae:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(args.vae, use_safetensors=True).eval()
    samples = read_samples(args.samples) if args.samples else {}
    made: list[dict[str, Any]] = []
    for split in get_args(Split):
        folder = args.out / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        count = getattr(args, split)
        drafts = draft_groups(split, count, seed=args.seed, samples=samples, decoding=vae is not None)
        if vae is not None:
            decode([p for d in drafts for p in d.pictures if "decoded" in p.source], vae, choice(args.seed, split))
        groups = []
        for i, draft in enumerate(drafts):
            rng = choice(args.seed, f"rate/{split}", i)
            group = rate_group(f"{split}-{i:05d}", draft, folder, split=split, rng=rng)
            groups.append(group)
            for rated, picture in zip(group.images, draft.pictures, strict=True):
                assert picture.opinion is not None
                made.append({
                    "image": rated.image.relative_to(args.out.resolve()).as_posix(), "source": picture.source,
                    "faults": {f.name: round(f.severity, 3) for f in picture.faults},
                    "values": {d: round(v, 3) for d, v in picture.opinion.values.items()},
                    "notes": [*picture.opinion.wrong, *picture.opinion.flaws],
                })  # fmt: skip
        write_records(groups, args.out / f"{split}.jsonl")
        if split == "train":
            chosen = [choose(g, choice(args.seed, "choose", i)) for i, g in enumerate(groups[: count // 5])]
            write_records([g for g in chosen if g], args.out / "preferences.jsonl")
        print(f"{split}: {len(groups)} groups after {time.monotonic() - started:.0f} s", flush=True)
    text = "".join(json.dumps(row) + "\n" for row in made)
    (args.out / "pictures.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
