"""Train the held-out judge on pictures of its own: own scenes, own drawing faults, no file shared with the scorer.

Run by `make pocket` after the VAE. One thread; writes model.safetensors, config.json and training.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from rewardtune.pocket.oracle import GRID, STRIDE, Cleanliness, Objects, Oracle, fold, load
from rewardtune.pocket.scenes import BACKGROUNDS, CONCEPTS, SIZE, TINTS, paste, sprite, tints_of

NAMES = {"concepts": sorted(CONCEPTS), "tints": [None, *sorted(TINTS)], "backgrounds": sorted(BACKGROUNDS)}
WIDTHS = (32, 64, 96, 96, 144)
MOST = 4
"""Objects in a training picture, at most."""
SCALE = 0.08
"""Unit of distance: this far from its clean render a picture has cleanliness 1/e. A Gaussian blur of 2.5 pixels has
about 0.08, the autoencoder's reconstruction about 0.04."""


# --- scenes: objects anywhere, in any size, beyond what captions can say


def places(rng: random.Random) -> list[tuple[float, float, float]]:
    """Centres and sides of one to four objects that overlap a little at most."""
    count = rng.choices([1, 2, 3, 4], weights=[18, 34, 36, 12])[0]
    typical = {1: (14, 54), 2: (15, 33), 3: (14, 27), 4: (13, 22)}[count]
    even = rng.uniform(*typical) if rng.random() < 0.7 else None
    out: list[tuple[float, float, float]] = []
    for _ in range(60):
        side = (even or rng.uniform(*typical)) * rng.uniform(0.95, 1.05)
        edge = side * 0.46
        x, y = rng.uniform(edge, SIZE - edge), rng.uniform(edge, SIZE - edge)
        if all(max(abs(x - a), abs(y - b)) > 0.88 * (side + s) / 2 for a, b, s in out):
            out.append((x, y, side))
        if len(out) == count:
            break
    return out


def scramble(art: Image.Image, rng: random.Random) -> Image.Image:
    """Nine tiles of an artwork in another order: something is there, but nothing that has a name."""
    w, h = art.width // 3, art.height // 3
    spots = [(i * w, j * h) for i in range(3) for j in range(3)]
    out = Image.new("RGBA", (3 * w, 3 * h))
    for (x, y), (u, v) in zip(spots, rng.sample(spots, 9), strict=True):
        out.paste(art.crop((x, y, x + w, y + h)), (u, v))
    return out


def fade(art: Image.Image, share: float, rng: random.Random) -> Image.Image:
    """The artwork with its alpha multiplied: everywhere by `share`, or by 0 and 1 on two sides of a line."""
    alpha = np.asarray(art.getchannel("A")).astype(np.float32)
    if rng.random() < 0.5:
        alpha *= share
    else:
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[: art.height, : art.width]
        along = math.cos(angle) * (x / art.width - 0.5) + math.sin(angle) * (y / art.height - 0.5)
        alpha *= along < np.quantile(along, share)
    out = art.copy()
    out.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return out


def draw(rng: random.Random) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """One picture: as drawn, its clean render (64, 64, 3), objects (4, 7) and the background's index.

    Objects: x, y, side, concept, second concept, share of the second, tint; side 0 pads.
    """
    background = rng.randrange(len(NAMES["backgrounds"]))
    clean = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[NAMES["backgrounds"][background]])
    drawn = clean.copy()
    rows = np.zeros((MOST, 7), np.float32)
    spots = places(rng)
    same: tuple[str, str | None] | None = None
    dirty = rng.random() < 0.35
    if dirty and len(spots) < MOST and rng.random() < 0.4:
        junk(drawn, spots, rng)
    for row, (x, y, side) in zip(rows, spots, strict=False):
        if same is None or rng.random() > 0.3:
            concept = rng.choice(NAMES["concepts"])
            tint = rng.choice(tints_of(concept) or [None]) if rng.random() < 0.6 else None
            same = (concept, tint)
        else:
            concept, tint = same
            if rng.random() < 0.25:
                tint = rng.choice([None, *tints_of(concept)])
        art = sprite(concept, tint)
        paste(clean, art, x, y, side)
        other, share = concept, 0.0
        if dirty and rng.random() < 0.15:
            paste(drawn, fade(art, rng.uniform(0.6, 0.95), rng), x, y, side)  # a part is missing or see-through
        else:
            paste(drawn, art, x, y, side)
        if dirty and rng.random() < 0.3:
            other = rng.choice(NAMES["concepts"])
            amount = rng.uniform(0.15, 0.5)
            second = sprite(other, tint if tint in tints_of(other) else None)
            paste(drawn, fade(second, amount, rng), x, y, side * rng.uniform(0.8, 1.05))
            # a person names the larger share; only near one half is it anybody's guess
            share = amount**3 / (amount**3 + (1 - amount) ** 3)
        elif dirty and rng.random() < 0.15 and tints_of(concept):
            paste(drawn, fade(sprite(concept, rng.choice(tints_of(concept))), rng.uniform(0.1, 0.35), rng), x, y, side)
        indices = [NAMES["concepts"].index(concept), NAMES["concepts"].index(other), share, NAMES["tints"].index(tint)]
        row[:] = [x, y, side, *indices]
    return np.asarray(drawn), np.asarray(clean), rows, background


def junk(canvas: Image.Image, taken: list[tuple[float, float, float]], rng: random.Random) -> None:
    """Something without a name on a free spot: scrambled artwork, a torn-off part, or a blob."""
    for _ in range(20):
        side = rng.uniform(8, 26)
        x, y = rng.uniform(0, SIZE), rng.uniform(0, SIZE)
        if all(max(abs(x - a), abs(y - b)) > (side + s) / 2 for a, b, s in taken):
            break
    else:
        return
    concept = rng.choice(NAMES["concepts"])
    art = sprite(concept, rng.choice([None, *tints_of(concept)]))
    kind = rng.random()
    if kind < 0.5:
        paste(canvas, scramble(art, rng), x, y, side)
    elif kind < 0.8:
        w, h = art.width * rng.uniform(0.25, 0.5), art.height * rng.uniform(0.25, 0.5)
        u, v = rng.uniform(0, art.width - w), rng.uniform(0, art.height - h)
        paste(canvas, art.crop((int(u), int(v), int(u + w), int(v + h))), x, y, side * 0.6)
    else:
        colour = tuple(rng.randrange(256) for _ in range(3))
        ImageDraw.Draw(canvas).ellipse((x - side / 2, y - side / 3, x + side / 2, y + side / 3), fill=colour)


# --- drawing faults on tensors (n, 3, 64, 64); `much` (n,) in 0..1


def _shape(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _clouds(n: int, channels: int, cells: int, g: torch.Generator) -> Tensor:
    coarse = torch.randn(n, channels, cells, cells, generator=g)
    return F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=True)


def soften(x: Tensor, much: Tensor, g: torch.Generator) -> Tensor:
    sigma = 0.3 + 2.6 * much
    taps = torch.arange(-7, 8, dtype=torch.float32)
    kernel = (-0.5 * (taps / sigma[:, None]) ** 2).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    flat = F.pad(x.reshape(1, -1, SIZE, SIZE), (7, 7, 7, 7), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel)).view_as(x)


def coarsen(x: Tensor, much: Tensor, g: torch.Generator) -> Tensor:
    few = int(SIZE * (1 - 0.72 * much.mean()))
    small = F.interpolate(x, size=(few, few), mode="bilinear", antialias=True)
    return F.interpolate(small, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)


def speckle(x: Tensor, much: Tensor, g: torch.Generator) -> Tensor:
    return (x + torch.randn(x.shape, generator=g) * _shape(0.02 + 0.13 * much)).clamp(0, 1)


def cloud(x: Tensor, much: Tensor, g: torch.Generator) -> Tensor:
    cells = int(torch.randint(4, 20, (1,), generator=g))
    return (x + _clouds(len(x), 3, cells, g) * _shape(0.02 + 0.13 * much)).clamp(0, 1)


def bend(x: Tensor, much: Tensor, g: torch.Generator) -> Tensor:
    cells = int(torch.randint(5, 13, (1,), generator=g))
    shift = _clouds(len(x), 2, cells, g) * _shape(0.3 + 3.2 * much) * (2 / SIZE)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) + shift.permute(0, 2, 3, 1)
    mode = "bilinear" if torch.rand(1, generator=g) < 0.5 else "nearest"
    return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)


def tone(x: Tensor, much: Tensor, g: torch.Generator) -> Tensor:
    """Saturation, contrast, gain and a slope of brightness."""
    n = len(x)
    pick = torch.rand(n, 6, generator=g) * 2 - 1
    x = x + (x.mean(1, keepdim=True) - x) * _shape((0.2 + 0.7 * much) * pick[:, 0].clamp(-0.4, 1))
    x = 0.5 + (x - 0.5) * _shape(1 - 0.5 * much * pick[:, 1])
    x = x + (pick[:, 2:5] * 0.22 * much[:, None])[..., None, None]
    slope = torch.linspace(-1, 1, SIZE)
    slope = slope[:, None] if pick[0, 5] > 0 else slope[None, :]
    return (x * (1 + slope * _shape(0.25 * much * pick[:, 5]))).clamp(0, 1)


def melt(x: Tensor, much: Tensor, g: torch.Generator) -> Tensor:
    mask = (_clouds(len(x), 1, 5, g) * 4 + _shape(much * 4 - 2)).sigmoid()
    return x + (soften(x, 0.5 + 0.5 * much, g) - x) * mask


def slip(x: Tensor, much: Tensor, g: torch.Generator) -> Tensor:
    """A band of rows or columns is shifted along itself."""
    out = x.clone()
    for i in range(len(x)):
        start, wide = int(torch.randint(8, 40, (1,), generator=g)), int(torch.randint(8, 40, (1,), generator=g))
        step = round(1 + 7 * float(much[i])) * (1 if torch.rand(1, generator=g) < 0.5 else -1)
        picture = out[i] if torch.rand(1, generator=g) < 0.5 else out[i].transpose(1, 2)
        picture[:, start : start + wide] = picture[:, start : start + wide].roll(step, -1)
    return out


def echo(x: Tensor, much: Tensor, g: torch.Generator) -> Tensor:
    """A faint second picture on top: the same one shifted, or another one."""
    dx, dy = (int(v) for v in torch.randint(-6, 7, (2,), generator=g))
    other = x.roll((dy, dx), (2, 3)) if torch.rand(1, generator=g) < 0.6 else x.roll(1, 0)
    return x + (other - x) * _shape(0.08 + 0.34 * much)


class Latents:
    """Faults in the latents of the pipeline's autoencoder: what a diffusion model's errors look like decoded."""

    def __init__(self, folder: Path) -> None:
        self.vae = AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
        self.vae = self.vae.to(memory_format=torch.channels_last)

    def __call__(self, x: Tensor, much: Tensor, g: torch.Generator) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z = self.vae.encode(x * 2 - 1).latent_dist.mode().float()
            noise = torch.randn(z.shape, generator=g)
            wide = F.avg_pool2d(F.pad(noise, (1, 1, 1, 1)), 3, 1) * 3
            kind = torch.rand(len(x), 3, generator=g)
            # averaged noise stains, plain noise frays; averaging the latents themselves makes outlines vague
            stain = torch.where(_shape(kind[:, 0]) < 0.5, wide, noise) * z.std()
            z = z + stain * _shape(0.55 * much * (kind[:, 1] < 0.7))
            vague = F.avg_pool2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), 3, 1)
            z = z + (vague - z) * _shape(0.8 * much * (kind[:, 2] < 0.5))
            patches = F.interpolate(torch.randn(len(z), 1, 4, 4, generator=g), size=z.shape[-2:], mode="bicubic")
            mask = (patches * 3).sigmoid()
            z = z + (z.roll(1, 0) - z) * mask * _shape(0.45 * much * (kind[:, 0] > 0.6))
            return (self.vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1)


Fault = Callable[[Tensor, Tensor, torch.Generator], Tensor]
PLAIN: tuple[Fault, ...] = (soften, coarsen, speckle, cloud, bend, tone, melt, slip, echo)
CLEANLINESS: tuple[Fault, ...] = (*PLAIN, bend, slip, slip)
"""The second tower sees more of what keeps colours and edges and breaks shapes only: the hardest to notice."""


def spoil(x: Tensor, *, faults: Sequence[Fault], latents: Fault, g: torch.Generator) -> Tensor:
    """A third stays as drawn, a third gets plain faults, a third goes through the autoencoder (some after a fault)."""
    x = x.clone()
    third = len(x) // 3
    touched = torch.arange(third, len(x))
    once = touched[:third]
    again = touched[torch.randperm(len(touched), generator=g)[:third]]
    for rows in (once, again):
        for part in rows[torch.randperm(len(rows), generator=g)].chunk(3):
            fault = faults[int(torch.randint(len(faults), (1,), generator=g))]
            x[part] = fault(x[part], torch.rand(len(part), generator=g) ** 1.3, g)
    through = touched[third:]
    much = torch.rand(len(through), generator=g) * (torch.rand(len(through), generator=g) < 0.75)
    x[through] = latents(x[through], much, g)
    return x


# --- targets and loss


def distance(picture: Tensor, clean: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """How far a picture is from its clean render: (B,) and per 8 x 8 patch (B, 8, 8).

    Mean absolute difference of colours at three scales and of neighbour differences; objects and background count
    half each, so that a small object's faults are not drowned by a flat background.
    """
    gap = torch.zeros_like(picture[:, 0])
    for size in (1, 2, 4):
        difference = picture - clean if size == 1 else F.avg_pool2d(picture - clean, size)
        gap += F.interpolate(difference.abs().mean(1, keepdim=True), scale_factor=float(size))[:, 0] / 3
    for dim in (2, 3):
        steps = (picture.diff(dim=dim) - clean.diff(dim=dim)).abs().mean(1)
        gap += F.pad(steps, (0, 1) if dim == 3 else (0, 0, 0, 1)) / 2
    axis = torch.arange(SIZE) + 0.5
    x, y, half = objects[:, :, 0, None], objects[:, :, 1, None], objects[:, :, 2, None] / 2
    inside = ((axis - x).abs() < half)[:, :, None, :] & ((axis - y).abs() < half)[:, :, :, None]
    mask = inside.any(1).float()
    on = (gap * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
    off = (gap * (1 - mask)).sum((1, 2)) / (1 - mask).sum((1, 2)).clamp(min=1)
    return (on + off) / 2, F.avg_pool2d(gap, 8)


def loss_of_facts(maps: dict[str, Tensor], objects: Tensor, background: Tensor) -> Tensor:
    """Sum of the first tower's parts; objectness is CenterNet's focal loss (arXiv 1904.07850, Eq. 1)."""
    present = objects[..., 2] > 0
    centre = objects[..., :2] / STRIDE - 0.5
    cell = centre.round().clamp(0, GRID - 1)
    axis = torch.arange(GRID, dtype=torch.float32)
    squared = ((axis - cell[..., 0, None]) ** 2)[:, :, None, :] + ((axis - cell[..., 1, None]) ** 2)[:, :, :, None]
    spread = (0.09 * objects[..., 2] / STRIDE).clamp(min=0.6)
    bumps = (-squared / (2 * spread**2)[..., None, None]).exp() * present[..., None, None]
    target, owner = bumps.max(1)
    heat = maps["heat"]
    positive = target == 1
    up, down = F.logsigmoid(heat), F.logsigmoid(-heat)
    focal = torch.where(positive, (1 - up.exp()) ** 2 * up, (1 - target) ** 4 * up.exp() ** 2 * down)
    total = -focal.sum() / positive.sum().clamp(min=1)

    weight = target * (target > 0.2)
    weight = weight / weight.sum().clamp(min=1)
    own = torch.gather(objects, 1, owner.flatten(1)[..., None].expand(-1, -1, objects.shape[2]))
    own = own.view(*owner.shape, -1)
    names = maps["concept"].log_softmax(1)
    first = names.gather(1, own[..., 3].long()[:, None])[:, 0]
    second = names.gather(1, own[..., 4].long()[:, None])[:, 0]
    total = total - (weight * ((1 - own[..., 5]) * first + own[..., 5] * second)).sum()
    tint = F.cross_entropy(maps["tint"], own[..., 6].long(), reduction="none")
    total = total + 0.5 * (weight * tint).sum()
    off_x = own[..., 0] / STRIDE - 0.5 - axis
    off_y = own[..., 1] / STRIDE - 0.5 - axis[:, None]
    total = total + 0.5 * (weight * ((maps["offset"][:, 0] - off_x).abs() + (maps["offset"][:, 1] - off_y).abs())).sum()
    side = (own[..., 2].clamp(min=1) / 16).log()
    total = total + (weight * (maps["side"] - side).abs()).sum()
    return total + 0.3 * F.cross_entropy(maps["background"], background)


def loss_of_cleanliness(maps: dict[str, Tensor], error: Tensor, local: Tensor) -> Tensor:
    """Mean absolute error of the second tower, overall and by patch, in units of cleanliness."""
    whole = ((-maps["error"]).exp() - (-error / SCALE).exp()).abs().mean()
    return whole + 0.25 * ((-maps["error_map"]).exp() - (-local / SCALE).exp()).abs().mean()


def batch(step: int, *, size: int, seed: int, faults: Sequence[Fault], latents: Fault) -> tuple[Tensor, ...]:
    """Pictures (B, 3, 64, 64) and their targets; depends on seed and step only."""
    rng = random.Random(f"oracle:{seed}:{step}")
    drawn, clean, objects, background = zip(*(draw(rng) for _ in range(size)), strict=True)

    def tensor(pictures: tuple[np.ndarray, ...]) -> Tensor:
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255

    rows = torch.from_numpy(np.stack(objects))
    g = torch.Generator().manual_seed(rng.getrandbits(48))
    x = spoil(tensor(drawn), faults=faults, latents=latents, g=g)
    x = (x * 255).round() / 255
    return x, rows, torch.tensor(background), *distance(x, tensor(clean), rows)


def train(
    tower: Objects | Cleanliness, *, seen_by: Objects | None, vae: Path, steps: int, size: int, seed: int
) -> dict[str, Any]:
    """Train a tower; `seen_by` is the finished first tower when it is the second's turn. Returns what the card says."""
    started, mean = time.time(), 0.0
    tower = tower.to(memory_format=torch.channels_last)
    faults, latents = (PLAIN, soften) if seen_by is None else (CLEANLINESS, Latents(vae))
    optimizer = torch.optim.AdamW(tower.parameters(), lr=3e-3, weight_decay=0.02, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        if step == steps * 2 // 5 and seen_by is None:
            latents = Latents(vae)  # for objects the costlier faults come only once the plain ones are learnt
        x, objects, background, error, local = batch(step, size=size, seed=seed, faults=faults, latents=latents)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            if seen_by is None:
                loss = loss_of_facts(tower(x)[0], objects, background)
            else:
                with torch.no_grad():
                    features = seen_by(x)[1]
                loss = loss_of_cleanliness(tower(x, features), error, local)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if step == 0 else 0.97 * mean + 0.03 * loss.item()
        if step % 50 == 0:
            print(f"{type(tower).__name__} {step} loss {mean:.3f} {time.time() - started:.0f} s", flush=True)
    parameters = sum(p.numel() for p in tower.parameters())
    return {"steps": steps, "batch": size, "seed": seed, "loss": round(mean, 4), "parameters": parameters,
            "seconds": round(time.time() - started)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--keep-objects", action="store_true", help="train only cleanliness anew, on the stored tower")
    parser.add_argument("--steps", type=int, nargs=2, default=[1900, 1000], help="of objects and of cleanliness")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    options = {"vae": args.vae, "size": args.batch, "seed": args.seed}
    card = args.out / "training.json"
    if args.keep_objects:
        oracle, report = load(args.out), json.loads(card.read_text())
    else:
        oracle, report = Oracle(NAMES, widths=WIDTHS).eval().requires_grad_(False), {}
        tower = Objects(NAMES, widths=WIDTHS, fused=False)
        report["objects"] = train(tower, seen_by=None, steps=args.steps[0], **options)
        fold(tower, oracle.objects)
        store(oracle, args.out)
    second = Cleanliness(widths=WIDTHS, fused=False)
    report["cleanliness"] = train(second, seen_by=oracle.objects, steps=args.steps[1], **options)
    fold(second, oracle.clean)
    store(oracle, args.out)
    card.write_text(json.dumps(report, indent=1) + "\n")
    print(report)


def store(oracle: Oracle, folder: Path) -> None:
    """Write the network as float16, and what its outputs mean."""
    state = {k: v.half().contiguous() for k, v in oracle.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"names": oracle.names, "widths": list(WIDTHS)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
