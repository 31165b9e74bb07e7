"""`zreward`: a trained scorer as a reward, after Z-Reward (arXiv 2606.09076): four dimensions, nine levels, one pass.

Named by recipes and `compare`; the forward pass is the engine's `scorer/model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field

from rewardtune.data.references import version
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.scorer.model import Scorer
    from rewardtune.types import Score

DIMENSIONS = ("alignment", "realism", "aesthetics", "plausibility")


class ZReward:
    """The loaded reward: `value` is the mean over dimensions of the expected score (Eq. 16), with gradient."""

    card = RewardCard(
        name="zreward",
        summary="distribution over nine score levels for alignment, realism, aesthetics and plausibility, read from a "
        "vision-language model in one forward pass; pictures are resized to the scorer's resolution, bicubic with "
        "antialiasing",
        differentiable=True,
        needs_prompt=True,
        range=(1.0, 5.0),
        licence_code="Apache-2.0",
        native_resolution=64,
        licence_weights="Apache-2.0",
        requires=("transformers",),
        dimensions=DIMENSIONS,
        models={"pocket:zreward": "shipped"},
        reference="arXiv 2606.09076, section 3 and Eq. 16. Scores lie in 1 to 5, so the scale is 1",
    )

    class Config(Options):
        """Options of `zreward`."""

        checkpoint: str = "pocket:zreward"
        """A scorer's export, a folder, `pocket:<name>` or a hub id."""
        revision: str | None = None
        """Commit, tag or branch of a hub id."""
        rubric: str | None = None
        """A rubric.json for a checkpoint without one, or the checkpoint's own with another temperature; one whose
        dimensions, levels or prompts it was not trained with is refused."""
        min_pixels: Annotated[int, Field(gt=0)] | None = None
        """Least area of a picture after resizing; the checkpoint's own when left out."""
        max_pixels: Annotated[int, Field(gt=0)] | None = None
        """Most area of a picture after resizing, and so the budget of image tokens. Left out: what the scorer was
        trained with; 1,024 tokens at most (ours) for a checkpoint that was not trained here."""
        dtype: Literal["float32", "bfloat16"] = "float32"
        """Dtype of the weights; probabilities are float32 in either case."""
        rounding: bool = False
        """Round the resized pixels to bytes as Pillow leaves them; the gradient passes straight through."""
        gradient_checkpointing: bool = False
        """Run the blocks again on the way back instead of keeping what they computed."""

    def __init__(self, scorer: Scorer, *, checkpoint: str, revision: str | None) -> None:
        geometry, values = scorer.geometry, scorer.rubric.values
        fixed = geometry.min_pixels == geometry.max_pixels
        self.scorer = scorer
        self.card = replace(
            type(self).card,
            range=(values[0], values[-1]),
            dimensions=scorer.dimensions,
            native_resolution=round(geometry.max_pixels**0.5) if fixed else None,
            models={checkpoint: version(checkpoint, revision)},
        )

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load the scorer, frozen. Raises RecipeError when the checkpoint is none."""
        import torch

        from rewardtune.backbones.frozen import freeze
        from rewardtune.scorer.model import load_scorer

        scorer = load_scorer(
            config.checkpoint, what=f"reward {cls.card.name!r}: checkpoint", revision=config.revision,
            rubric=config.rubric, min_pixels=config.min_pixels, max_pixels=config.max_pixels,
            dtype=getattr(torch, config.dtype), device=device,
        )  # fmt: skip
        freeze(scorer.model, gradient_checkpointing=config.gradient_checkpointing)
        scorer = replace(scorer, geometry=replace(scorer.geometry, rounding=config.rounding))
        return cls(scorer, checkpoint=config.checkpoint, revision=config.revision)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. Parts: the expected score of each dimension."""
        from rewardtune.types import Score

        distribution = self.scorer.distribution(images, prompts)
        levels = self.scorer.levels.to(distribution.dtype)
        means = distribution @ levels
        return Score(
            value=means.mean(-1),
            distribution=distribution,
            levels=levels,
            dimensions=self.scorer.dimensions,
            parts={name: means[:, d] for d, name in enumerate(self.scorer.dimensions)},
        )
