"""Train the held-out judge's third network, which says whether people would name a drawing (`pocket/likeness.py`).

First on drawings whose truth is known, with the faults of `train_oracle.py`; then on what people said of the pipeline's
samples (`oracle_lessons.jsonl`). Run by `make pocket` after `train_oracle.py`, on one thread; adds likeness.safetensors
to its folder and its part to training.json.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle_lessons import Lesson, load_lessons
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_oracle import NAMES, PLAIN, Latents, batch

from rewardtune.pocket.likeness import CUES, ROOM, SIZES, WIDE, WINDOW, Likeness, encoder, lay_over, looks, windows
from rewardtune.pocket.oracle import Oracle, cues, load, pairs_of
from rewardtune.pocket.scenes import BACKGROUNDS, CONCEPTS, sprite, tints_of
from rewardtune.randomness import choice

HELD_OUT = 0.2
"""Share of the pictures drawn by chance that people labelled and that only show the course (ours)."""
MEMORY = 0.99
"""Decay of the running mean of the weights, which is what is kept (ours)."""


class Pair(nn.Module):
    """What is trained: the network, and the encoder of artwork, of which only its output is kept."""

    def __init__(self, pairs: Sequence[tuple[str, str | None]]) -> None:
        super().__init__()
        self.likeness = Likeness(len(pairs))
        self.art = encoder(4)
        self.pixels = torch.stack([artwork(concept, tint) for concept, tint in pairs])

    def forward(
        self, views: Tensor, which: Tensor, background: Tensor, cues: Tensor, flip: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (B,), and how far the features of clean drawings are from what is expected of them."""
        art = torch.where(flip[:, None, None, None], self.pixels[which].flip(-1), self.pixels[which])
        expected = self.likeness.expected(_inside(self.art(_framed(art))), background)
        seen = _inside(self.likeness.picture(views))
        clean = art[:, :3] + (1 - art[:, 3:]) * background[:, :, None, None]
        with torch.no_grad():
            target = _inside(self.likeness.picture(_framed(clean * 2 - 1, background * 2 - 1)))
        mimic = (expected - target).square().mean() / target.var().clamp(min=1e-3)
        return self.likeness.compare(seen, expected, cues), mimic

    def templates(self, which: Tensor) -> Tensor:
        """Features (B, 16, 20, 20) of artwork by index."""
        return _inside(self.art(_framed(self.pixels[which])))


def forward(pair: Pair, views: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """The pair in bfloat16 where that serves; logits and the mimic's part in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, mimic = pair(views.contiguous(memory_format=torch.channels_last), *rest)
    return logits.float(), mimic.float()


def _inside(features: Tensor) -> Tensor:
    """The window's part of features of a window with its border."""
    edge = ROOM // 2
    return features[..., edge:-edge, edge:-edge]


def _framed(x: Tensor, colour: Tensor | None = None) -> Tensor:
    """Windows with their border, empty or of one colour (B, C)."""
    framed = F.pad(x, (ROOM,) * 4)
    if colour is not None:
        outside = F.pad(torch.zeros_like(x[:, :1]), (ROOM,) * 4, value=1.0)
        framed = framed + outside * colour[:, :, None, None]
    return framed


def artwork(concept: str, tint: str | None) -> Tensor:
    """(4, 40, 40): colours times alpha, and alpha, as it lies in a window."""
    art, canvas = sprite(concept, tint), Image.new("RGBA", (WINDOW, WINDOW))
    scale = WINDOW / WIDE / max(art.size)
    w, h = max(1, round(art.width * scale)), max(1, round(art.height * scale))
    canvas.paste(art.resize((w, h), Image.Resampling.LANCZOS), (round((WINDOW - w) / 2), round((WINDOW - h) / 2)))
    found = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
    return torch.cat([found[:3] * found[3:], found[3:]])


def paper(names: Mapping[str, Sequence[Any]]) -> Tensor:
    """Colours (6, 3) of the backgrounds."""
    return torch.tensor([BACKGROUNDS[name] for name in names["backgrounds"]]).float() / 255


# --- drawings with known truth


def drawn(
    oracle: Oracle, index: Mapping[tuple[int, int], int], step: int, *, size: int, seed: int, latents: Any
) -> tuple[Tensor, ...]:
    """Windows, pairs, backgrounds, cues and the share (B,) in which each object is what was asked for."""
    x, objects, background, _, _ = batch(step, size=size, seed=seed, faults=PLAIN, latents=latents)
    rng = random.Random(f"likeness:{seed}:{step}")
    with torch.no_grad():
        maps = oracle(x)
    rows, cells, asked, share, boxes = [], [], [], [], []
    for i, j in (objects[..., 2] > 0).nonzero().tolist():
        cx, cy, side, first, second, of_second, tint = objects[i, j].tolist()
        # the tower may know more names than there are now
        first, second = (oracle.names["concepts"].index(NAMES["concepts"][int(k)]) for k in (first, second))
        cell = (min(15, max(0, int(cy // 4))), min(15, max(0, int(cx // 4))))
        if rng.random() < 0.5:
            concept, much = first, 1 - of_second
        elif of_second > 0:
            concept, much = second, of_second
        else:  # what the first tower would take it for next, or anything
            guesses = maps["concept"][i, :, cell[0], cell[1]].topk(6).indices.tolist()
            concept = rng.choice([k for k in guesses if k != first] or guesses)
            if rng.random() < 0.3 or oracle.names["concepts"][concept] not in CONCEPTS:
                concept = oracle.names["concepts"].index(rng.choice(sorted(CONCEPTS)))
            much = float(concept == first)
        name = oracle.names["concepts"][concept]
        colour = int(tint) if oracle.names["tints"][int(tint)] in (None, *tints_of(name)) else 0
        if rng.random() < 0.1:
            colour = oracle.names["tints"].index(rng.choice([None, *tints_of(name)]))
        rows.append(i), cells.append(cell), asked.append((concept, colour)), share.append(much)
        boxes.append((cx + rng.gauss(0, 0.5), cy + rng.gauss(0, 0.5), side * (1 + rng.gauss(0, 0.04))))
    row, box = torch.tensor(rows), torch.tensor(boxes)
    views = windows(x[row], box[:, 0], box[:, 1], box[:, 2])
    told = cues(maps, row, torch.tensor(cells), torch.tensor(asked))
    which = torch.tensor([index[pair] for pair in asked])
    return views, which, paper(oracle.names)[background[row]], told, torch.tensor(share)


# --- samples that people looked at


class Told:
    """Lessons with the place of each object as the first tower finds it; `aligned` by the network as it is."""

    def __init__(self, oracle: Oracle, x: Tensor, of: Sequence[Lesson], index: Mapping[tuple[int, int], int]) -> None:
        parts = [oracle(part) for part in x.split(128)]
        maps = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        self.x, self.row = x, torch.tensor([k.picture for k in of])
        asked = torch.tensor([(k.concept, k.tint) for k in of])
        sure = maps["concept"].log_softmax(1)[self.row, asked[:, 0]] + F.logsigmoid(maps["heat"])[self.row]
        best = sure.flatten(1).argmax(1)
        cell = torch.stack([best // 16, best % 16], 1)
        r, c = cell[:, 0], cell[:, 1]
        self.cues = cues(maps, self.row, cell, asked)
        self.box = torch.stack(
            [(c + 0.5 + maps["offset"][self.row, 0, r, c]) * 4, (r + 0.5 + maps["offset"][self.row, 1, r, c]) * 4,
             (maps["side"][self.row, r, c].exp() * 16).clamp(8, 60)], 1
        )  # fmt: skip
        self.background = paper(oracle.names)[maps["background"][self.row].argmax(1)]
        self.which = torch.tensor([index[k.concept, k.tint] for k in of])
        self.named = torch.tensor([float(k.named) for k in of])

    @torch.no_grad()
    def align(self, pair: Pair) -> None:
        """Move and scale each box to where its template fits best."""
        pair.eval()
        boxes = []
        for part in torch.arange(len(self.row)).split(128):
            x, y, side = self.box[part].unbind(1)
            expected = pair.likeness.expected(pair.templates(self.which[part]), self.background[part])
            _, where = lay_over(looks(pair.likeness, self.x[self.row[part]], x, y, side), expected)
            size = torch.tensor(SIZES)[where[:, 0]]
            step = side * size * WIDE / WINDOW * 2  # a feature is two pixels of the window
            boxes.append(torch.stack([x + (where[:, 2] - 4) * step, y + (where[:, 1] - 4) * step, side * size], 1))
        self.aligned = torch.cat(boxes)

    def views(self, which: Tensor, g: torch.Generator | None = None) -> Tensor:
        """Windows around the aligned boxes, with a little of chance where a generator is given."""
        x, y, side = self.aligned[which].unbind(1)
        if g is None:
            return windows(self.x[self.row[which]], x, y, side)
        x, y = (at + 0.6 * torch.randn(len(which), generator=g) for at in (x, y))
        side = side * (1 + 0.04 * torch.randn(len(which), generator=g))
        return changed(windows(self.x[self.row[which]], x, y, side), g)


def changed(views: Tensor, g: torch.Generator) -> Tensor:
    """A little lighter or darker, noisier, of more or less contrast: the same to a person."""
    n = len(views)
    contrast = 1 + 0.08 * torch.randn(n, 1, 1, 1, generator=g)
    light = 0.06 * torch.randn(n, 3, 1, 1, generator=g)
    noise = 0.05 * torch.rand(n, 1, 1, 1, generator=g) * torch.randn(views.shape, generator=g)
    return views * contrast + light + noise


@torch.no_grad()
def look(pair: Pair, told: Told, which: Tensor) -> dict[str, float]:
    """Agreement with people at 0.5, and how well the order of logits separates what they name."""
    from scipy.stats import mannwhitneyu

    which = which[told.named[which] != 0.5]
    pair.eval()
    logits = torch.cat([
        pair(told.views(part), told.which[part], told.background[part], told.cues[part],
             torch.zeros(len(part), dtype=torch.bool))[0] for part in which.split(128)
    ])  # fmt: skip
    said = told.named[which] > 0.5
    above = mannwhitneyu(logits[said], logits[~said]).statistic / (int(said.sum()) * int((~said).sum()))
    return {"objects": len(which), "agreement": round(((logits > 0) == said).float().mean().item(), 4),
            "auc": round(float(above), 4)}  # fmt: skip


def learner(pair: Pair, steps: int, rate: float, decay: float) -> Callable[[Tensor], None]:
    """One optimiser step on a loss."""
    optimizer = torch.optim.AdamW(pair.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.parameters(), 5.0)
        optimizer.step()
        schedule.step()

    return step


def flipped(views: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the windows mirrored, and which; their artwork is mirrored likewise."""
    flip = torch.rand(len(views), generator=g) < 0.5
    return torch.where(flip[:, None, None, None], views.flip(-1), views), flip


def learn_drawings(
    pair: Pair, oracle: Oracle, index: Mapping[tuple[int, int], int], vae: Path, steps: int, seed: int
) -> None:
    """Train on drawings whose truth is known."""
    latents, learn, started = Latents(vae), learner(pair, steps, 3e-3, 0.02), time.time()
    pair.train()
    for step in range(steps):
        views, which, ground, told, share = drawn(oracle, index, step, size=48, seed=seed, latents=latents)
        if step == 0:
            pair.likeness.cue_mean.copy_(told.mean(0))
            pair.likeness.cue_deviation.copy_(told.std(0))
        g = torch.Generator().manual_seed(step)
        # half of the time it has nothing but what it sees
        hidden = torch.rand(len(told), 1, generator=g) < 0.5
        views, flip = flipped(views, g)
        told = torch.where(hidden, pair.likeness.cue_mean, told)
        logits, mimic = forward(pair, views, which, ground, told, flip)
        learn(F.binary_cross_entropy_with_logits(logits, share) + 0.2 * mimic)
        if step % 50 == 0:
            right = ((logits > 0) == (share > 0.5)).float()[hidden[:, 0]].mean().item()
            print(f"drawings {step}: {right:.3f} right unaided, {time.time() - started:.0f} s", flush=True)


def learn_words(pair: Pair, told: Told, held: Tensor, steps: int, seed: int) -> tuple[Pair, list[dict[str, float]]]:
    """Go on with what people said; returns the running mean, and its course on the objects (N,) that are `held`."""
    test, own = held.nonzero()[:, 0], (~held).nonzero()[:, 0]
    spread = told.cues[own].std(0)
    pair.likeness.cue_mean.copy_(told.cues[own].mean(0))
    pair.likeness.cue_deviation.copy_(spread)
    learn, course, started = learner(pair, steps, 1e-3, 0.05), [], time.time()
    mean = AveragedModel(pair, multi_avg_fn=get_ema_multi_avg_fn(MEMORY), use_buffers=True)
    for step in range(steps):
        g = torch.Generator().manual_seed(step + 10**6 * (seed + 1))
        which = own[torch.randint(len(own), (64,), generator=g)]
        views, flip = flipped(told.views(which, g), g)
        cues = told.cues[which] + 0.1 * spread * torch.randn(64, CUES, generator=g)
        pair.train()
        logits, mimic = forward(pair, views, told.which[which], told.background[which], cues, flip)
        # people err as well: nothing is quite sure
        learn(F.binary_cross_entropy_with_logits(logits, told.named[which] * 0.94 + 0.03) + 0.1 * mimic)
        mean.update_parameters(pair)
        if step % 250 == 249 or step == steps - 1:
            course.append({"step": step + 1, **look(mean.module, told, test)})
            print(course[-1], f"{time.time() - started:.0f} s", flush=True)
    return mean.module, course


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the judge's folder")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--drawn", type=Path, help="keep the state after the first half here, or start from it")
    parser.add_argument("--steps", type=int, nargs=2, default=[800, 1500], help="on drawings, and on people's words")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    started = time.time()
    oracle = load(args.out, likeness=False)
    names, pairs = oracle.names, pairs_of(oracle.names)
    index = {(names["concepts"].index(c), names["tints"].index(t)): k for k, (c, t) in enumerate(pairs)}
    pair = Pair(pairs).to(memory_format=torch.channels_last)
    if args.drawn and args.drawn.exists():
        pair.load_state_dict(torch.load(args.drawn))
    else:
        learn_drawings(pair, oracle, index, args.vae, args.steps[0], args.seed)
        if args.drawn:
            torch.save(pair.state_dict(), args.drawn)
    x, every, typical = load_lessons(names)
    held = set(choice(args.seed, "lessons/split").sample(typical, int(HELD_OUT * len(typical))))
    with torch.no_grad():
        told = Told(oracle, x, every, index)
    told.align(pair)
    kept, course = learn_words(pair, told, torch.tensor([k.picture in held for k in every]), args.steps[1], args.seed)
    store(kept, args.out)
    report = {"steps": args.steps, "seed": args.seed, "objects": len(every), "pictures": len(x), "course": course,
              "parameters": sum(p.numel() for p in pair.likeness.parameters()),
              "seconds": round(time.time() - started)}  # fmt: skip
    card = args.out / "training.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"likeness": report}, indent=1) + "\n")


@torch.no_grad()
def store(pair: Pair, folder: Path) -> None:
    """Write the network as float16 and the templates as bytes."""
    pair.eval()
    art = pair.templates(torch.arange(len(pair.pixels)))
    unit = art.amax((0, 2, 3)).clamp(min=1e-6) / 127
    state = {k: v.half() if v.is_floating_point() else v for k, v in pair.likeness.state_dict().items()}
    state |= {"templates": (art / unit[:, None, None]).round().to(torch.int8), "unit": unit.half()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "likeness.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
