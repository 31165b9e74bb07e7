"""Sample the pocket pipeline at several stages of its training: pictures for the simulated annotators to rate.

Run by `make pocket` between the SFT run and `annotate.py`. Each prompt gets four pictures from random stages, so a
group mixes good and bad ones. Writes PNGs and samples.jsonl (image, prompt, facts, split, stage).
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
from rewardtune.diffusion.rollout import sample
from rewardtune.plugins import Guidance
from rewardtune.pocket.scenes import sample_scene
from rewardtune.randomness import generator


def load_stage(pipeline: ZImage, checkpoint: Path) -> None:
    """Put the parameters of a checkpoint of `task: sft` into the pipeline."""
    tensors = load_file(checkpoint / "parameters.safetensors")
    for name, module in pipeline.trainable.items():
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        module.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in own.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--stages", type=int, nargs="+", required=True, help="steps that have a checkpoint")
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--validation", type=int, default=40)
    parser.add_argument("--heldout", type=int, default=80)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rng = random.Random(f"stages:{args.seed}")
    jobs: dict[int, list[dict]] = {stage: [] for stage in args.stages}
    for split in ("train", "validation", "heldout"):
        for _ in range(getattr(args, split)):
            scene = sample_scene(rng, split)
            for _ in range(4):
                row = {"prompt": scene.caption, "facts": scene.facts(), "split": split}
                jobs[rng.choice(args.stages)].append(row)
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    pipeline = ZImage.load(
        args.pipeline, ZImage.Config(max_sequence_length=32), revision=None, dtype=torch.float32, device="cpu"
    )
    pipeline.pipe.set_progress_bar_config(disable=True)
    count = 0
    with (args.out / "samples.jsonl").open("w") as manifest:
        for stage, rows in jobs.items():
            load_stage(pipeline, args.run / "checkpoints" / f"step-{stage:06d}")
            for start in range(0, len(rows), 16):
                part = rows[start : start + 16]
                guidance = Guidance("full", rng.choice([1.0, 2.0, 3.0]))
                images = sample(
                    pipeline, [r["prompt"] for r in part],
                    [generator(args.seed, "stages", count + i) for i in range(len(part))],
                    num_steps=args.steps, guidance=guidance,
                )  # fmt: skip
                for row, picture in zip(part, to_pil(images), strict=True):
                    name = f"images/{count:06d}.png"
                    picture.save(args.out / name)
                    manifest.write(json.dumps({"image": name, "stage": stage, **row}) + "\n")
                    count += 1
            print(f"stage {stage}: {len(rows)} pictures", flush=True)


if __name__ == "__main__":
    main()
