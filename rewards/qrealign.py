"""`qrealign`: five words from excellent to bad, read as a distribution: Q-ReAlign, and what Q-Align and DeQA read.

Named by recipes; the forward pass is the engine's `backbones/vlm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from rewardtune.data.references import version
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.backbones.vlm import Asked
    from rewardtune.types import Score

CHECKPOINT = "q-future/Q-ReAlign-Mini-0.8B"
# as cfelicio/ShotSieve pins it (THIRD_PARTY_LICENSES.md); read there, not on the hub. The larger ones are not pinned
PINNED = {CHECKPOINT: "fe1f45a7574c9e9d908875af9f7e90cb946aa19f"}
ASKED = {
    "quality": ("How would you rate the quality of this image?", "The quality of the image is"),
    "aesthetics": ("How would you rate the aesthetics of this image?", "The aesthetics of the image is"),
}
"""Question and start of the answer, as the checkpoints were trained (Q-ReAlign, qalign/prompts.py)."""


class QReAlign:
    """The loaded reward: `value` is the mean level."""

    card = RewardCard(
        name="qrealign",
        summary="quality or aesthetics of a picture, whatever its prompt: distribution over five words read from a "
        "vision-language model in one pass. Q-ReAlign's checkpoints (0.8B, 4B, 9B) by default; `values: [5, 4, 3, 2, "
        "1]` gives DeQA's scale on any Qwen-VL checkpoint trained on these words. DeQA's and Q-Align's own weights are "
        "mPLUG-Owl2, which needs remote code: serve them and judge over HTTP",
        differentiable=True,
        needs_prompt=False,
        range=(0.0, 1.0),
        licence_code="MIT",
        licence_weights="MIT (their pyproject says so; there is no LICENSE file)",
        requires=("transformers",),
        dimensions=("quality",),
        models=PINNED,
        gpu_memory_gib=1.6,
        reference="github.com/Q-Future/Q-ReAlign at f5fd748, README (Quick Run) and docs/METHOD.md; Q-Align arXiv "
        "2312.17090; DeQA-Score arXiv 2501.11561. Levels lie in 0 to 1, so the scale is 1",
    )

    class Config(Options):
        """Options of `qrealign`."""

        checkpoint: str = CHECKPOINT
        """A hub id or a folder: Q-ReAlign-Mini-0.8B, Q-ReAlign-Lite-4B, Q-ReAlign-Pro-9B, or a model of your own."""
        revision: str | None = None
        """Commit, tag or branch of a hub id."""
        aspect: Literal["quality", "aesthetics"] = "quality"
        """What is asked about."""
        words: tuple[str, ...] = (" excellent", " good", " fair", " poor", " bad")
        """The levels, best first, each one token behind the start of the answer."""
        values: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.0)
        """Value of each word."""
        template: str | None = None
        """The whole text before the word, with {image} once; the checkpoint's chat template when None."""
        dtype: Literal["float32", "bfloat16"] = "bfloat16"
        """Dtype of the weights; probabilities are float32 in either case."""
        rounding: bool = False
        """Round the resized pixels to bytes as Pillow leaves them; the gradient passes straight through."""
        gradient_checkpointing: bool = False
        """Run the blocks again on the way back instead of keeping what they computed."""

        @model_validator(mode="after")
        def _fits(self) -> Self:
            if len(self.words) != len(self.values) or len(set(self.values)) != len(self.values) or len(self.words) < 2:
                raise ValueError("words and values must be as many, two or more, and no value twice")
            return self

    def __init__(self, asked: Asked, config: Config) -> None:
        question, stem = ASKED[config.aspect]
        self.asked = asked
        self.template = asked.template(config.template or asked.chat(question, answer=stem))
        # levels rise, as everywhere here
        rising = sorted(zip(config.values, asked.answers(self.template, config.words), strict=True))
        self.values, self.tokens = [value for value, _ in rising], [token for _, token in rising]
        self.card = replace(
            type(self).card,
            range=(self.values[0], self.values[-1]),
            dimensions=(config.aspect,),
            models={config.checkpoint: version(config.checkpoint, config.revision or PINNED.get(config.checkpoint))},
        )

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load the model, frozen. RecipeError: no such checkpoint, or a word that is not one token of it."""
        from rewardtune.backbones.vlm import load_asked

        asked = load_asked(
            cls.card.name, config.checkpoint, revision=config.revision or PINNED.get(config.checkpoint),
            dtype=config.dtype, rounding=config.rounding, gradient_checkpointing=config.gradient_checkpointing,
            device=device,
        )  # fmt: skip
        return cls(asked, config)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`; the prompts are not read."""
        from rewardtune.types import Score

        logits = self.asked.next_logits(images, prompts, self.template)
        distribution = logits[:, None, self.tokens].softmax(-1)
        levels = distribution.new_tensor(self.values)
        value = (distribution @ levels)[:, 0]
        return Score(
            value=value,
            distribution=distribution,
            levels=levels,
            dimensions=self.card.dimensions,
            parts={self.card.dimensions[0]: value},
        )
