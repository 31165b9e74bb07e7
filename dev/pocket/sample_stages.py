"""Sample the pocket pipeline at several stages of its training, and reward-tuned: pictures for the annotators to rate.

Run by `make pocket` between the SFT run and `annotate.py`. Each prompt gets four pictures, every other one by the
finished pipeline and the rest by earlier stages and adapters, so a group mixes good and bad ones. Writes PNGs and
samples.jsonl (image, prompt, facts, split, stage).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from rewardtune.pipelines.z_image import ZImage
from safetensors.torch import load_file

from rewardtune.data.images import to_pil
from rewardtune.data.references import resolve
from rewardtune.diffusion.rollout import sample
from rewardtune.plugins import Guidance
from rewardtune.pocket.scenes import sample_scene
from rewardtune.randomness import generator

STEPS, GUIDANCE = (4, 4, 6, 12), (1.0, 2.0, 3.0)
"""Sampling settings, drawn for each batch."""
BATCH = 32
PROMPTS = {"train": 1200, "validation": 40, "heldout": 150}


def load_stage(pipeline: ZImage, checkpoint: Path) -> None:
    """Put the parameters of a checkpoint of `task: sft` into the pipeline."""
    tensors = load_file(checkpoint / "parameters.safetensors")
    for name, module in pipeline.trainable.items():
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        module.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in own.items()})


def load(reference: str, painter: Path | None) -> ZImage:
    """The pipeline, as it is, with a checkpoint's weights, or with an exported adapter."""
    # bf16: a third faster on a CPU, and no rating depends on it
    pipeline = ZImage.load(
        resolve(reference), ZImage.Config(max_sequence_length=32), revision=None, dtype=torch.bfloat16, device="cpu"
    )
    pipeline.pipe.vae.float()
    if painter is not None and (painter / "parameters.safetensors").is_file():
        load_stage(pipeline, painter)
    elif painter is not None:
        pipeline.pipe.load_lora_weights(painter)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="pocket:pipeline", help="the finished pipeline")
    parser.add_argument("--stages", type=Path, nargs="*", default=[], help="checkpoints of its training")
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="exports of reward-tuning runs")
    for split, count in PROMPTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"prompts (default {count})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(f"stages:{args.seed}")
    others = [*args.stages, *args.adapters]
    names = {path: path.parent.name if path.name == "export" else path.name for path in others}
    jobs: dict[Path | None, list[dict]] = {None: [], **{path: [] for path in others}}
    for split in PROMPTS:
        for _ in range(getattr(args, split)):
            scene = sample_scene(rng, split)
            for k in range(4):
                painter = rng.choice(others) if others and k % 2 else None
                jobs[painter].append({"prompt": scene.caption, "facts": scene.facts(), "split": split})
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    count = 0
    with (args.out / "samples.jsonl").open("w") as manifest:
        for painter, rows in jobs.items():
            stage = "finished" if painter is None else names[painter]
            pipeline = load(args.pipeline, painter)
            rng.shuffle(rows)
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                images = sample(
                    pipeline, [r["prompt"] for r in part],
                    [generator(args.seed, "stages", count + i) for i in range(len(part))],
                    num_steps=rng.choice(STEPS), guidance=Guidance("full", rng.choice(GUIDANCE)),
                )  # fmt: skip
                for row, picture in zip(part, to_pil(images), strict=True):
                    name = f"images/{count:06d}.png"
                    picture.save(args.out / name, compress_level=1)
                    manifest.write(json.dumps({"image": name, "stage": stage, **row}) + "\n")
                    count += 1
            print(f"{stage}: {len(rows)} pictures", flush=True)


if __name__ == "__main__":
    main()
