"""Gradient ascent under `ocr` alone writes a word: python dev/ocr/write_words.py CAT REWARD 42 --out build/words

What is optimised is one coarse stencil a letter, empty at the start: no font, no drawing, no stroke is given. Pixels
themselves would become noise that the recogniser alone can read, so (all numbers are ours)
  - a stencil has 12 x 9 numbers, enlarged by bicubic interpolation: there is no high frequency to hide in;
  - every view is drawn anew: bolder or thinner, stretched, slanted, bent, blurred, in other colours, with noise;
  - every second view has the letters in random order: each must be readable by itself, not as part of a word;
  - little ink and short outlines are preferred.
Prints seconds and readings, by the recogniser itself and by two that had no part in it: tesseract where it is
installed, another generation of PP-OCR where --reader names its file. Writes a picture a word and seed, and words.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardtune.data.images import to_pil
from rewardtune.randomness import generator
from rewardtune.scoring.augment import Augmentation
from rewardtune.scoring.reward_set import load_reward
from rewardtune.types import Prompt

HEIGHT, WIDTH = 44, 32
"""Of a letter's stencil in pixels."""
COARSE = (12, 9)
EMPTY = -1.0
"""Where a stencil starts and what it returns to; ink begins at 0."""
SMOOTH = torch.tensor([[1.0, 2.0, 1.0]]).T.mul(torch.tensor([[1.0, 2.0, 1.0]])).div(16).view(1, 1, 3, 3)
"""Kernel over a stencil's numbers."""
VIEW = 60
"""Height of a view."""


class Word:
    """The stencils of a word's letters, and pictures made of them."""

    def __init__(self, text: str, seed: int) -> None:
        self.text, self.letters = text, list(dict.fromkeys(text))
        self.key = generator(seed, "write-words")
        start = 0.1 * torch.randn(len(self.letters), 1, *COARSE, generator=self.key)
        self.stencils = (EMPTY + start).requires_grad_(True)

    def ink(self, *, contrast: float, bolder: float = 0.0, scale: int = 1) -> Tensor:
        """(letters, h, w) in [0, 1]."""
        size = (HEIGHT * scale, WIDTH * scale)
        fine = F.interpolate(self.stencils, size=size, mode="bicubic", align_corners=False)[:, 0]
        return torch.sigmoid(contrast * (fine + bolder)) * window(*size)

    def line(self, ink: Tensor, indices: list[int], gaps: list[int], *, scale: int = 1) -> Tensor:
        """(h, w): letters side by side on empty ground."""
        pieces = [ink.new_zeros(ink.shape[1], 10 * scale)]
        for index, gap in zip(indices, gaps, strict=True):
            pieces += [ink[index], ink.new_zeros(ink.shape[1], gap * scale)]
        return F.pad(torch.cat([*pieces, pieces[0]], 1), (0, 0, 8 * scale, 8 * scale))

    def view(self, contrast: float) -> tuple[Tensor, str]:
        """((3, h, w), what stands on it): the word or its letters in random order, as on a bad photograph."""
        count = len(self.text)
        shuffled = torch.randint(len(self.letters), (count,), generator=self.key).tolist()
        order = shuffled if self._around() < 0 else [self.letters.index(letter) for letter in self.text]
        gaps = torch.randint(0, 6, (count,), generator=self.key).tolist()
        line = self.line(self.ink(contrast=contrast, bolder=0.7 * self._around()), order, gaps)
        size = (VIEW, 20 + (WIDTH + 5) * count)  # the same for all views, which then run together
        line = F.pad(line, (0, size[1] - line.shape[1]))[None, None]
        squeeze = (1 + 0.25 * self._around(), 1 + 0.25 * self._around())
        slant, turn = 0.4 * self._around() * size[0] / size[1], 0.12 * self._around() * size[1] / size[0]
        moved = (0.06 * self._around(), 0.1 * self._around())
        map_ = torch.tensor([[[squeeze[0], slant, moved[0]], [turn, squeeze[1], moved[1]]]])
        bend = F.interpolate(torch.randn(1, 2, 4, 3 * count, generator=self.key), size=size, mode="bicubic")
        bend = bend * torch.tensor([3 / size[1], 3 / size[0]]).view(1, 2, 1, 1)
        places = F.affine_grid(map_, [1, 1, *size], align_corners=False) + bend.permute(0, 2, 3, 1)
        line = F.grid_sample(line, places, align_corners=False)
        rows = 18 + int(42 * torch.rand(1, generator=self.key).item())  # blur: as if seen from afar
        line = F.interpolate(line, size=(rows, size[1] * rows // size[0]), mode="bilinear", antialias=True)
        line = F.interpolate(line, size=size, mode="bilinear")[0]
        strength = 0.55 + 0.4 * self._around()
        light = 1 - (1 - strength) * 0.5 * torch.rand(3, 1, 1, generator=self.key)
        dark = (1 - strength) * 0.5 * torch.rand(3, 1, 1, generator=self.key)
        ground, colour = (light, dark) if torch.rand(1, generator=self.key) < 0.7 else (dark, light)
        return ground + (colour - ground) * line, "".join(self.letters[i] for i in order)

    def picture(self, scale: int) -> Tensor:
        """(1, 3, h, w): the word itself, black on white."""
        indices = [self.letters.index(letter) for letter in self.text]
        ink = self.line(self.ink(contrast=8, bolder=0.25, scale=scale), indices, [3] * len(indices), scale=scale)
        return (1 - ink).expand(1, 3, -1, -1)

    def _around(self) -> float:
        """Between -0.5 and 0.5."""
        return torch.rand(1, generator=self.key).item() - 0.5


def window(height: int, width: int) -> Tensor:
    """(h, w): 1 in a stencil's middle, falling to 0 at its edge, so that no letter ends in a straight cut."""
    down, across = (torch.linspace(-1, 1, size).abs() for size in (height, width))
    return torch.sigmoid(30 * (0.88 - down))[:, None] * torch.sigmoid(30 * (0.88 - across))


def tidiness(ink: Tensor) -> Tensor:
    """Cost of ink at a stencil's edge, and of the length of outlines."""
    down, across = (torch.linspace(-1, 1, size).abs() for size in ink.shape[1:])
    edge = (torch.maximum(down[:, None], across[None]) - 0.6).clamp(min=0) / 0.4
    outline = ink.diff(dim=1).abs().mean() + ink.diff(dim=2).abs().mean()
    return 6 * (ink * edge**2).mean() + 0.5 * outline


def write(word: Word, reward, *, steps: int) -> None:
    """Ascent on the mean reward of random views, more of them for a short word."""
    views = max(3, 10 // len(word.text))
    noise = Augmentation(copies=1, shift=0.03, noise=0.1)
    optimiser = torch.optim.Adam([word.stencils], lr=0.25, betas=(0.8, 0.95))
    for step in range(steps):
        done = step / steps
        contrast = 2 + 4 * done
        optimiser.param_groups[0]["lr"] = 0.25 * (1 - 0.7 * done)
        lines, texts = zip(*(word.view(contrast) for _ in range(views)), strict=True)
        seen = noise.views(torch.stack(lines), [word.key] * views)
        value = reward.score(seen, [Prompt("", {"text": text}) for text in texts]).value
        loss = tidiness(word.ink(contrast=contrast)) - value.mean()
        (gradient,) = torch.autograd.grad(loss, word.stencils)
        word.stencils.grad = F.conv2d(gradient, SMOOTH, padding=1)  # strokes, not beads
        optimiser.step()
        with torch.no_grad():
            word.stencils.lerp_(torch.full_like(word.stencils, EMPTY), 0.01 * (1 - 0.5 * done))


def tesseract(file: Path) -> str | None:
    """What tesseract reads, told that it is one word (--psm 8); None where it is not installed."""
    if shutil.which("tesseract") is None:
        return None
    return subprocess.run(["tesseract", file, "-", "--psm", "8"], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--reader", type=Path, help="another PP-OCR recogniser as .onnx, which reads the result")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    reward = load_reward("ocr", region="whole", pad=False)
    reader = load_reward("ocr", region="whole", recogniser=str(given.reader)) if given.reader else None
    rows = []
    for text in given.words:
        for seed in given.seeds:
            word, began, cpu = Word(text, seed), time.monotonic(), time.process_time()
            write(word, reward, steps=given.steps)
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
            with torch.no_grad():
                picture = word.picture(3)
                ((line,),) = reward.read(picture, [Prompt("", {"text": text})])
                other = reader.read(picture, [Prompt("", {"text": text})])[0][0].read if reader else None
            file = given.out / f"{text}-{seed}.png"
            to_pil(picture)[0].save(file)
            rows.append(
                {
                    "text": text,
                    "seed": seed,
                    "seconds": round(seconds, 1),
                    "cpu_seconds": round(cpu, 1),
                    "log_likelihood": round(line.log_likelihood.item(), 4),
                    "recogniser": line.read,
                    "reader": other,
                    "tesseract": tesseract(file),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    (given.out / "words.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
