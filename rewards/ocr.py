"""`ocr`: does the picture say the wanted text? CTC log-likelihood under PP-OCR's recogniser, with gradient.

Named by recipes. The recogniser is the one inside the package rapidocr, run by `backbones/text_recogniser.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from rewardtune.errors import DataError, RecipeError
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.backbones.text_reader import TextReader
    from rewardtune.backbones.text_recogniser import Recogniser
    from rewardtune.backbones.wanted_text import WantedLine
    from rewardtune.types import Score


@dataclass(frozen=True)
class ReadLine:
    """One wanted line and what stands in its place.

    log_likelihood: scalar, of the whole line, at most 0. quads: the regions that were read one after the other, corners
    (4, 2) in pixels (x, y); empty where it was the whole picture.
    """

    wanted: str
    read: str
    log_likelihood: Tensor
    quads: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Piece:
    """A part of a picture as the recogniser takes it. quad: None for the whole picture."""

    pixels: Tensor
    quad: Tensor | None


_Place = tuple[int, ...]
"""Where a line may stand: indices of pieces that are read one after the other."""


class Ocr:
    """The loaded reward: mean log-probability of a wanted character, over all lines of a prompt."""

    card = RewardCard(
        name="ocr",
        summary="log-likelihood of the text that the prompt's metadata `text` or its quotes want, "
        "under PP-OCRv6's recogniser (CTC): 0 where it is surely read, about -8 where it is not there. Regions are "
        "given by metadata `box`, found by PP-OCRv6's detector, or the whole picture. Pieces are resized to height 48, "
        "bilinear with antialiasing",
        differentiable=True,
        needs_prompt=True,
        range=None,
        licence_code="Apache-2.0",
        scale=4.0,  # ours: half of what lies between absent and written
        native_resolution=None,
        licence_weights="Apache-2.0",
        requires=("rapidocr", "onnx", "onnxruntime"),
        extra="ocr",
        models={"PP-OCRv6_rec_small (rapidocr)": "3.10.0", "PP-OCRv6_det_small (rapidocr)": "3.10.0"},
        gpu_memory_gib=0.02,
        reference="PP-OCR recogniser and its pre-processing as in rapidocr 3.10.0; CTC, Graves et al. 2006",
    )

    class Config(Options):
        """Options of `ocr`."""

        region: Literal["detect", "whole"] = "detect"
        """Where a line without a `box` is looked for: in what the detector finds and in the whole picture, whichever
        reads it best; or in the whole picture alone."""
        case: Literal["exact", "ignore"] = "exact"
        """Whether `Cat` is read where `CAT` is wanted."""
        recogniser: str | None = None
        """Another PP-OCR recogniser as .onnx, e.g. for another script; the one in rapidocr when none is given."""

        pad: bool = True
        """Grey beside a short line up to a width of 320, as rapidocr has it. Without, a line of three letters takes
        half the time and has a slightly other value."""

    def __init__(self, recogniser: Recogniser, config: Config, reader: TextReader | None) -> None:
        self.recogniser, self.config, self._reader = recogniser, config, reader

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load the recogniser, frozen, and the detector where one is asked for.

        Raises MissingExtra without rapidocr, RecipeError for a file that is no PP-OCR recogniser.
        """
        from rewardtune.backbones.text_reader import TextReader, shipped_recogniser
        from rewardtune.backbones.text_recogniser import Recogniser

        path = config.recogniser or shipped_recogniser()
        try:
            recogniser = Recogniser(path).to(device).eval()
        except RecipeError as error:
            raise RecipeError(f"reward 'ocr': recogniser {error}") from error
        return cls(recogniser, config, TextReader(enlarge=False) if config.region == "detect" else None)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. Images may have any size; metadata as in `wanted_text.wanted_lines`.

        value: sum over a prompt's lines of their log-likelihoods over the number of characters, at most 0. parts:
        `probability` of the whole text, `exact` (1 where greedy decoding reads every line as wanted, else 0).
        Raises DataError for a prompt without wanted text and for characters that the recogniser does not know.
        """
        import torch

        from rewardtune.types import Score

        found = self.read(images, prompts)
        totals = torch.stack([torch.stack([line.log_likelihood for line in lines]).sum() for lines in found]).float()
        lengths = totals.new_tensor([sum(len(line.wanted) for line in lines) for lines in found])
        exact = [all(self._as_wanted(line) for line in lines) for lines in found]
        parts = {"probability": totals.detach().exp(), "exact": totals.new_tensor(exact)}
        return Score(value=totals / lengths, parts=parts)

    def read(self, images: Tensor, prompts: Sequence[str]) -> list[list[ReadLine]]:
        """For each image and each line that its prompt wants: where it was read best, what was read, how likely it is.

        Log-likelihoods carry a graph where the images do; which places are read is chosen without.
        """
        import torch

        from rewardtune.backbones.text_recogniser import log_likelihood
        from rewardtune.backbones.wanted_text import wanted_lines

        wanted = [wanted_lines(prompt, reward="ocr") for prompt in prompts]
        spelled = [[self._spelling(line) for line in lines] for lines in wanted]
        pieces: list[_Piece] = []
        options: list[list[list[_Place]]] = []  # image, line, places where it may stand
        for image, lines, spellings in zip(images.to(self._dtype), wanted, spelled, strict=True):
            options.append(self._places(image, lines, spellings, pieces))

        seen: dict[int, Tensor] = {}
        if any(len(places) > 1 for lines in options for places in lines):
            with torch.no_grad():
                seen = self._look(pieces, options)
                options = [
                    _best(
                        places,
                        [
                            [log_likelihood(self._joined(seen, p), s).item() for p in ps]
                            for ps, s in zip(places, spellings, strict=True)
                        ],
                    )
                    for places, spellings in zip(options, spelled, strict=True)
                ]
        if torch.is_grad_enabled() or not seen:
            seen = self._look(pieces, options)
        return [
            [
                ReadLine(
                    wanted=line.text,
                    read=" ".join(self.recogniser.read(seen[k]) for k in place),
                    log_likelihood=log_likelihood(self._joined(seen, place), spelling),
                    quads=tuple(quad for k in place if (quad := pieces[k].quad) is not None),
                )
                for line, spelling, (place,) in zip(lines, spellings, places, strict=True)
            ]
            for lines, spellings, places in zip(wanted, spelled, options, strict=True)
        ]

    def _as_wanted(self, line: ReadLine) -> bool:
        """Where a line was put together from several pieces, spaces do not count: a script may do without."""
        read, wanted = line.read, line.wanted
        if len(line.quads) > 1:
            read, wanted = read.replace(" ", ""), wanted.replace(" ", "")
        return read.lower() == wanted.lower() if self.config.case == "ignore" else read == wanted

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.recogniser.parameters()).dtype

    def _spelling(self, line: WantedLine) -> list[list[int]]:
        try:
            return self.recogniser.spelling(line.text, ignore_case=self.config.case == "ignore")
        except DataError as error:
            raise DataError(f"ocr: {error}") from None

    def _places(
        self, image: Tensor, lines: Sequence[WantedLine], spellings: Sequence[list[list[int]]], pieces: list[_Piece]
    ) -> list[list[_Place]]:
        """For each line the places where it may stand; adds the image's pieces to `pieces`.

        A line without a box may stand in one region, in all of a row, in all there are, or be the whole picture.
        """
        import torch

        from rewardtune.backbones.text_reader import rows
        from rewardtune.backbones.text_recogniser import MIN_WIDTH, crop, fit, steps_needed

        steps = max(map(steps_needed, spellings))

        least = MIN_WIDTH if self.config.pad else 0

        def add(quad: Tensor | None) -> int:
            piece = image if quad is None else crop(image, quad)
            pieces.append(_Piece(fit(piece, min_width=least, min_steps=steps), quad))
            return len(pieces) - 1

        free: list[_Place] = []
        count = sum(line.box is None for line in lines)
        if count > 1 and self._reader is None:
            raise DataError(
                f"ocr: {count} lines without a `box` are wanted, {', '.join(repr(line.text) for line in lines)}, and "
                "with region: whole each would be the whole picture. Give each a `box`, or use region: detect."
            )
        if count:
            quads = self._reader.regions(image) if self._reader else []
            found = [add(quad) for quad in quads]
            free = [(k,) for k in found]
            lengthwise = [tuple(found[i] for i in row) for row in rows(quads)]
            whole_text = tuple(k for row in lengthwise for k in row)
            free += [row for row in dict.fromkeys([*lengthwise, whole_text]) if len(row) > 1]
            free.append((add(None),))
        height, width = image.shape[-2:]
        places = []
        for line in lines:
            if line.box is None:
                places.append(free)
                continue
            left, top, right, bottom = (x * side for x, side in zip(line.box, (width, height) * 2, strict=True))
            quad = torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]])
            places.append([(add(quad),)])
        return places

    def _look(self, pieces: Sequence[_Piece], options: Sequence[Sequence[Sequence[_Place]]]) -> dict[int, Tensor]:
        """Log-probabilities (T, A) of every piece of some places."""
        wanted = sorted({k for lines in options for places in lines for place in places for k in place})
        return dict(zip(wanted, self.recogniser([pieces[k].pixels for k in wanted]), strict=True))

    def _joined(self, seen: Mapping[int, Tensor], place: _Place) -> Tensor:
        """Log-probabilities of the pieces of a place as if they stood in one line."""
        import torch

        first, *others = (seen[k] for k in place)
        return torch.cat([first, *(x for other in others for x in (self.recogniser.gap(other), other))])


def _best(options: Sequence[Sequence[_Place]], likelihoods: Sequence[Sequence[float]]) -> list[list[_Place]]:
    """One place for each line, such that the sum of log-likelihoods is largest and no two lines share a place.

    The last place of a line, the whole picture or a box of its own, may be shared: there is always one left.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    shared = list(dict.fromkeys(place for places in options for place in places[:-1]))
    cost = np.full((len(options), len(shared) + len(options)), 1e9)
    for i, (places, values) in enumerate(zip(options, likelihoods, strict=True)):
        for place, value in zip(places[:-1], values[:-1], strict=True):
            cost[i, shared.index(place)] = -value
        cost[i, len(shared) + i] = -values[-1]
    columns = linear_sum_assignment(cost)[1]
    return [[shared[c] if c < len(shared) else places[-1]] for places, c in zip(options, columns, strict=True)]
