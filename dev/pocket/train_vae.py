"""Train the pocket pipeline's AutoencoderKL on rendered scenes; rewardtune has no task for autoencoders.

Run by `make pocket`. First both halves, about 6 minutes on two cores; then the decoder alone, on the latents of the
finished encoder, some 15 minutes. Writes the diffusers folder and a metrics file.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from rewardtune.pocket.faults import degrade
from rewardtune.pocket.scenes import render, sample_scene


def pictures(count: int, seed: int, faulty: float) -> torch.Tensor:
    """`count` pictures of training scenes as uint8 (N, 3, 64, 64); a share of them with drawing faults."""
    rng = random.Random(f"vae:{seed}")
    out = np.empty((count, 3, 64, 64), np.uint8)
    for i in range(count):
        picture = render(sample_scene(rng, "train"))
        if rng.random() < faulty:
            picture = degrade(picture, rng)
        out[i] = np.asarray(picture).transpose(2, 0, 1)
    return torch.from_numpy(out)


def signed(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as the autoencoder takes them, in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def fit(
    module: nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor], *, pictures: int, steps: int, batch: int,
    lr: float, generator: torch.Generator,
) -> None:  # fmt: skip
    """Train a module on `loss_of(rows)`, the loss on `batch` of the pictures by their numbers."""
    started = time.time()
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        loss = loss_of(torch.randint(pictures, (batch,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{type(module).__name__} {step} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)


def train_both(vae: AutoencoderKL, train: torch.Tensor, *, generator: torch.Generator, **how: Any) -> None:
    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        x = signed(train[rows])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(generator=generator)).sample.float()
        return (y - x).abs().mean() + (y - x).pow(2).mean() + 1e-5 * posterior.kl().mean() / (16 * 16)

    fit(vae, loss_of, pictures=len(train), lr=2e-3, generator=generator, **how)


def sharpen(vae: AutoencoderKL, train: torch.Tensor, *, generator: torch.Generator, **how: Any) -> None:
    """Train the decoder on: edges count by themselves, and latents are a little off, as a denoiser's are."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(signed(x)).latent_dist.mode() for x in train.split(128)])

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        z = latents[rows] + 0.03 * torch.randn(latents[rows].shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(z).sample.float()
        difference = y - signed(train[rows])
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        return difference.abs().mean() + difference.pow(2).mean() + 0.5 * edges

    fit(vae.decoder, loss_of, pictures=len(train), lr=1.5e-3, generator=generator, **how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--decoder-steps", type=int, default=3600, help="further steps of the decoder alone")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    started = time.time()
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(16, 32, 64), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, sample_size=64,
        scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters", flush=True)
    train = pictures(12_000, args.seed, faulty=0.15)
    generator = torch.Generator().manual_seed(args.seed)
    train_both(vae, train, steps=args.steps, batch=args.batch, generator=generator)
    sharpen(vae, train, steps=args.decoder_steps, batch=args.batch, generator=generator)
    with torch.no_grad():
        held = signed(pictures(512, args.seed + 1, faulty=0.0))
        means = torch.cat([vae.encode(x).latent_dist.mode() for x in held.split(64)])
        error = torch.cat([(vae.decode(z).sample.clamp(-1, 1) - x).pow(2).mean((1, 2, 3))
                           for z, x in zip(means.split(64), held.split(64), strict=True)])  # fmt: skip
    # latents of unit variance around zero, as the published autoencoders publish them
    vae.register_to_config(scaling_factor=1.0 / means.std().item(), shift_factor=means.mean().item())
    psnr = (10 * torch.log10(4 / error)).mean().item()
    vae.save_pretrained(args.out)
    report = {"psnr_db": round(psnr, 2), "seconds": round(time.time() - started), "steps": args.steps}
    (args.out / "metrics.json").write_text(json.dumps(report) + "\n")
    print(report)


if __name__ == "__main__":
    main()
