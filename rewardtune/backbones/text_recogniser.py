"""A PP-OCR text recogniser with gradient: pieces of pictures that hold one line of text -> characters over time.

CRNN-style recogniser with CTC (PP-OCRv3, arXiv 2206.03001; later generations keep the interface), read from its ONNX
file by `onnx_graph.py`. Input as in rapidocr 3.10.0: BGR in [-1, 1], height 48, width by aspect, grey on the right up
to a width of 320. Shapes here: T time steps (8 pixels each), A characters of the alphabet, 0 is CTC's blank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardtune.backbones.onnx_graph import OnnxGraph
from rewardtune.errors import DataError, RecipeError

HEIGHT = 48
MIN_WIDTH = 320
STRIDE = 8
"""Pixels of width for each time step."""
BATCH = 16
"""Pieces at a time. Ours; a piece takes about 40 MB with graph."""


class Recogniser(nn.Module):
    """The frozen recogniser and its alphabet."""

    def __init__(self, path: str | Path) -> None:
        """path: a PP-OCR recogniser as ONNX, with its characters in the metadata. RecipeError when it is none."""
        super().__init__()
        self.graph = OnnxGraph(path, before_softmax=True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        characters = self.graph.metadata.get("character", "").splitlines()
        if not characters:
            raise RecipeError(
                f"{path}: the file has no list of characters (metadata `character`), so it is no PP-OCR recogniser. "
                "Give one as .onnx, as rapidocr brings them."
            )
        self.alphabet = ("", *characters, " ")
        self._index = {character: i for i, character in enumerate(self.alphabet)}

    def forward(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Pieces (3, 48, W) from `fit`, each of its own width -> log-probabilities (T, A) of each.

        Pieces of one width run together; what comes out of each depends on itself alone.
        """
        found: dict[int, Tensor] = {}
        for width in dict.fromkeys(piece.shape[-1] for piece in pieces):
            members = [i for i, piece in enumerate(pieces) if piece.shape[-1] == width]
            for start in range(0, len(members), BATCH):
                some = members[start : start + BATCH]
                batch = torch.stack([pieces[i] for i in some]).contiguous(memory_format=torch.channels_last)
                found |= zip(some, self.graph(batch).log_softmax(-1), strict=True)
        return [found[i] for i in range(len(pieces))]

    def spelling(self, text: str, *, ignore_case: bool = False) -> list[list[int]]:
        """For each character of a text the entries of the alphabet that count as it.

        Raises DataError for an empty text and for characters that the alphabet lacks.
        """
        if not text:
            raise DataError("the wanted text is empty.")
        spelled, missing = [], []
        for character in text:
            forms = {character, character.lower(), character.upper()} if ignore_case else {character}
            entries = sorted(self._index[form] for form in forms if form in self._index)
            spelled.append(entries)
            if not entries:
                missing.append(f"{character!r} (U+{ord(character):04X})")
        if missing:
            raise DataError(
                f"the recogniser cannot read {', '.join(dict.fromkeys(missing))} of the wanted text {text!r}: not "
                f"among its {len(self.alphabet) - 1} characters. Leave them out, or give a recogniser that has them."
            )
        return spelled

    def read(self, log_probabilities: Tensor) -> str:
        """What greedy decoding makes of (T, A): the likeliest at each step, repeats merged, blanks taken out."""
        best = torch.unique_consecutive(log_probabilities.argmax(-1)).tolist()
        return "".join(self.alphabet[i] for i in best)

    def gap(self, like: Tensor) -> Tensor:
        """(1, A): a step between two pieces of one text that may be a space or nothing, each with one half."""
        step = torch.full((1, len(self.alphabet)), -math.inf, dtype=like.dtype, device=like.device)
        step[0, [0, -1]] = math.log(0.5)
        return step


def fit(piece: Tensor, *, min_width: int = MIN_WIDTH, min_steps: int = 0) -> Tensor:
    """(3, h, w) in [0, 1], RGB -> (3, 48, W) as the recogniser takes it, differentiable.

    Resized by bilinear interpolation with antialiasing (rapidocr's has none, so that most pixels of a large piece get
    no say and no gradient; enlarging is the same), then grey up to `min_width` or `min_steps` steps.
    """
    height, width = piece.shape[-2:]
    ratio = width / height
    room = max(min_width, int(HEIGHT * ratio), 1)
    inner = min(math.ceil(HEIGHT * ratio), room)
    seen = F.interpolate(piece[None], size=(HEIGHT, inner), mode="bilinear", align_corners=False, antialias=True)[0]
    return F.pad((seen.flip(0) - 0.5) / 0.5, (0, max(room, STRIDE * min_steps) - inner))


def crop(image: Tensor, quad: Tensor) -> Tensor:
    """Straighten a region of an image: (3, H, W) and its corners (4, 2) in pixels (x, y) -> (3, h, w).

    Corners run clockwise from the text's upper left; pixel i covers [i, i + 1]. h and w are the longer of the opposite
    sides. Bicubic, the border is repeated outside; differentiable in the image, not in the corners.
    """
    height, width = image.shape[-2:]
    corners = quad.to(device=image.device, dtype=torch.float64)
    sides = (corners - corners.roll(-1, 0)).norm(dim=1)
    across, down = (max(1, round(max(sides[i].item(), sides[i + 2].item()))) for i in (0, 1))
    square = corners.new_tensor([[0, 0], [1, 0], [1, 1], [0, 1]])
    warp = homography(square, corners)
    y, x = torch.meshgrid(
        (torch.arange(down, device=image.device, dtype=torch.float64) + 0.5) / down,
        (torch.arange(across, device=image.device, dtype=torch.float64) + 0.5) / across,
        indexing="ij",
    )
    points = torch.stack([x, y, torch.ones_like(x)], -1) @ warp.T
    points = points[..., :2] / points[..., 2:]
    # grid_sample has the image's edges at -1 and 1
    grid = points / points.new_tensor([width, height]) * 2 - 1
    return F.grid_sample(
        image[None], grid[None].to(image.dtype), mode="bicubic", padding_mode="border", align_corners=False
    )[0]


def homography(source: Tensor, target: Tensor) -> Tensor:
    """The (3, 3) projective map that takes four points (4, 2) to four others."""
    zero, one = torch.zeros_like(source[:, 0]), torch.ones_like(source[:, 0])
    (x, y), (u, v) = source.unbind(1), target.unbind(1)
    rows_u = torch.stack([x, y, one, zero, zero, zero, -x * u, -y * u], 1)
    rows_v = torch.stack([zero, zero, zero, x, y, one, -x * v, -y * v], 1)
    solution = torch.linalg.solve(torch.cat([rows_u, rows_v]), torch.cat([u, v]))
    return torch.cat([solution, solution.new_ones(1)]).view(3, 3)


def steps_needed(spelling: Sequence[Sequence[int]]) -> int:
    """Fewest time steps in which CTC can write a text: one a character, one more between two alike."""
    return len(spelling) + sum(a == b for a, b in pairwise(spelling))


def log_likelihood(log_probabilities: Tensor, spelling: Sequence[Sequence[int]]) -> Tensor:
    """Log-probability (scalar, at most 0) that (T, A) says the text: CTC, Graves et al. 2006, Eq. 3 and 8.

    spelling: for each character the entries that count as it, of which the probabilities are added. Everything that
    is neither blank nor in the text is one further class, so that the classes still sum to 1 (which the gradient of
    torch's ctc_loss takes for granted).
    """
    kinds = [[0], *[list(kind) for kind in dict.fromkeys(tuple(entries) for entries in spelling)]]
    rest = torch.ones(log_probabilities.shape[-1], dtype=torch.bool, device=log_probabilities.device)
    rest[[i for kind in kinds for i in kind]] = False
    columns = [log_probabilities[:, kind].logsumexp(-1) for kind in kinds]
    floor = torch.finfo(log_probabilities.dtype).min / 4  # a gap has no other class at all, and -inf has no gradient
    columns.append(log_probabilities.masked_fill(~rest, floor).clamp(min=floor).logsumexp(-1))
    classes = torch.stack(columns, -1).clamp(min=floor)
    wanted = torch.tensor([[kinds.index(list(entries)) for entries in spelling]], device=log_probabilities.device)
    steps, length = torch.tensor([len(classes)]), torch.tensor([len(spelling)])
    return -F.ctc_loss(classes[:, None], wanted, steps, length, blank=0, reduction="none")[0]
