"""`ocr-edit-distance`: how much of the wanted text a whole OCR pipeline reads, as flow_grpo scores it. No gradient.

Named by `compare` and `guard`; the reward with gradient is `ocr`, which shares the recogniser, so it is no second
opinion on what was trained with that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.backbones.text_reader import TextReader
    from rewardtune.types import Score


class OcrEditDistance:
    """The loaded reward: rapidocr with its own settings."""

    card = RewardCard(
        name="ocr-edit-distance",
        summary="1 - min(edit distance, n) / n between what PP-OCRv6 reads in the whole picture and the n characters "
        "of the text that the prompt's metadata `text` or its quotes want, both lower case and without spaces; 1 where "
        "the wanted text is part of what is read",
        differentiable=False,
        needs_prompt=True,
        range=(0.0, 1.0),
        licence_code="Apache-2.0",
        pillow_difference=None,
        licence_weights="Apache-2.0",
        requires=("rapidocr", "onnxruntime"),
        extra="ocr",
        models={"PP-OCRv6 small (rapidocr)": "3.10.0"},
        reference="flow_grpo/ocr.py of yifan123/flow_grpo, which reads with PaddleOCR 2 and takes every piece, where "
        "rapidocr leaves out those below its own threshold of 0.5",
    )

    class Config(Options):
        """No options."""

    def __init__(self, reader: TextReader) -> None:
        self._reader = reader

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load detector and recogniser into onnxruntime, on the CPU whatever the device."""
        from rewardtune.backbones.text_reader import TextReader

        return cls(TextReader(enlarge=True))

    def read(self, images: Tensor) -> list[str]:
        """What is read in each image, pieces in reading order, spaces between them."""
        return [" ".join(found.text for found in self._reader.read(image)) for image in images]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. Several wanted lines count as one text, in their order. parts: `exact`, `characters`.

        `exact`: 1 where the text is read and nothing else. `characters`: how many were read.
        """
        import torch

        from rewardtune.backbones.wanted_text import wanted_lines
        from rewardtune.types import Score

        wanted = [
            normalise("".join(line.text for line in wanted_lines(p, reward="ocr-edit-distance"))) for p in prompts
        ]
        read = [normalise(text) for text in self.read(images)]
        rows = {
            "value": [similarity(r, w) for r, w in zip(read, wanted, strict=True)],
            "exact": [float(r == w) for r, w in zip(read, wanted, strict=True)],
            "characters": [float(len(r)) for r in read],
        }
        parts = {name: torch.tensor(row, device=images.device) for name, row in rows.items()}
        return Score(value=parts.pop("value"), parts=parts)


def normalise(text: str) -> str:
    """Lower case, without white space."""
    return "".join(text.split()).lower()


def similarity(read: str, wanted: str) -> float:
    """1 where `wanted` is part of `read`, else 1 - min(edit distance, n) / n for its n characters."""
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions that turn one into the other (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]
