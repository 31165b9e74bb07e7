"""rapidocr: where the text of a picture is and what it says, and its recogniser's file. Never with gradient.

The package (Apache-2.0, code and weights) brings PP-OCR's detector and recogniser as ONNX files; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardtune.data.images import to_pil
from rewardtune.errors import MissingExtra

RECOGNISER = "PP-OCRv6_rec_small.onnx"


def shipped_recogniser() -> Path:
    """The recogniser's file inside the installed package rapidocr. MissingExtra where it is not there."""
    found = importlib.util.find_spec("rapidocr")
    path = Path(found.origin).parent / "models" / RECOGNISER if found and found.origin else None
    if path is None or not path.is_file():
        lacking = "is not installed" if path is None else f"is there without {RECOGNISER}, which came with version 3.10"
        raise MissingExtra(f"the package rapidocr {lacking}: pip install --upgrade 'rewardtune[ocr]'.")
    return path


@dataclass(frozen=True)
class Found:
    """A piece of text in a picture. quad: its corners (4, 2) in pixels (x, y), clockwise from the text's upper left."""

    text: str
    quad: Tensor


class TextReader:
    """rapidocr's pipeline: detector, direction of a line, recogniser."""

    def __init__(self, *, enlarge: bool) -> None:
        """enlarge: let the detector see small pictures enlarged to 736 pixels, rapidocr's own setting, which takes a
        second of a CPU core each; else it sees them as they are, and those above 960 pixels made smaller."""
        from rapidocr import RapidOCR

        seen = {} if enlarge else {"Det.limit_type": "max", "Det.limit_side_len": 960}
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "critical",  # it warns of every picture without text
                **seen,
                "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            }
        )

    def regions(self, image: Tensor) -> list[Tensor]:
        """Corners (4, 2) of each piece of text in (3, H, W) in [0, 1], in reading order; [] where there is none.

        A region more than 1.5 times as high as wide is taken for a line that runs downwards, as by rapidocr.
        """
        found = self._engine(_pixels(image), use_det=True, use_cls=False, use_rec=False)
        return [_upright(torch.as_tensor(box)) for box in _listed(found.boxes)]

    def read(self, image: Tensor) -> list[Found]:
        """Every piece of text in (3, H, W) in [0, 1], in reading order; rapidocr leaves out what it is not sure of."""
        found = self._engine(_pixels(image), use_det=True, use_cls=True, use_rec=True)
        quads = [torch.as_tensor(box) for box in _listed(getattr(found, "boxes", None))]
        return [Found(text, quad) for text, quad in zip(_listed(getattr(found, "txts", None)), quads, strict=False)]


def rows(quads: Sequence[Tensor]) -> list[list[int]]:
    """Which of some regions (4, 2), given in reading order, stand in one row: indices, row by row, left to right.

    Two stand in one row when they share at least half of the height of the less high. Ours.
    """
    found: list[list[int]] = []
    for i, quad in enumerate(quads):
        top, bottom = quad[:, 1].min().item(), quad[:, 1].max().item()
        for row in found:
            low, high = (quads[row[-1]][:, 1].min().item(), quads[row[-1]][:, 1].max().item())
            if min(bottom, high) - max(top, low) >= 0.5 * min(bottom - top, high - low):
                row.append(i)
                break
        else:
            found.append([i])
    return [sorted(row, key=lambda i: quads[i][:, 0].min().item()) for row in found]


def _upright(quad: Tensor) -> Tensor:
    sides = (quad - quad.roll(-1, 0)).norm(dim=1)
    across, down = max(sides[0], sides[2]), max(sides[1], sides[3])
    return quad.roll(-1, 0) if down >= 1.5 * across else quad


def _pixels(image: Tensor) -> Any:
    """What OpenCV would have read: (H, W, 3) bytes, BGR."""
    import numpy as np

    return np.ascontiguousarray(np.asarray(to_pil(image[None])[0])[..., ::-1])


def _listed(found: Any) -> list[Any]:
    return [] if found is None else list(found)
