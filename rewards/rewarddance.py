"""`rewarddance`: is a picture better than a reference of the same prompt? RewardDance (arXiv 2509.08826) as a reward.

Named by recipes; loads what the task `reward_dance` trains in its pairwise form, through `scorer/comparison.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field

from rewardtune.data.references import version
from rewardtune.errors import DataError
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.scorer.comparison import Comparer
    from rewardtune.types import Score


class RewardDance:
    """The loaded reward: `value` is the mean over dimensions of P(yes), the picture is better than its reference."""

    card = RewardCard(
        name="rewarddance",
        summary="probability that a picture is better than a reference picture of the same prompt, in each dimension "
        "of the scorer's rubric; needs a scorer trained by reward_dance with `objective: {form: pairwise}`, since "
        "RewardDance's own weights are not published. Each prompt names its reference, a file, as `reference`",
        differentiable=True,
        needs_prompt=True,
        range=(0.0, 1.0),
        licence_code="Apache-2.0",
        licence_weights="those of your scorer",
        requires=("transformers",),
        dimensions=("alignment", "realism", "aesthetics", "plausibility"),
        metadata=("reference",),
        models={"a scorer of your own": "local"},
        reference="arXiv 2509.08826, r(x1, x2, y, i) = P(yes | x1, x2, y, i). A probability needs no scale: 1",
    )

    class Config(Options):
        """Options of `rewarddance`."""

        checkpoint: str
        """The export of a pairwise reward_dance run, a folder or a hub id whose rubric.json has a `comparison`."""
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

    def __init__(self, comparer: Comparer, config: Config) -> None:
        self.comparer = comparer
        # references come again with every epoch; a folder of them is small beside the model
        self._seen: dict[Path, Tensor] = {}
        self.card = replace(
            type(self).card,
            dimensions=comparer.scorer.dimensions,
            models={config.checkpoint: version(config.checkpoint, config.revision)},
        )

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load the scorer, frozen. RecipeError: no such checkpoint, or one that was not taught to compare."""
        import torch

        from rewardtune.backbones.frozen import freeze
        from rewardtune.scorer.comparison import load_comparer
        from rewardtune.scorer.model import load_scorer

        scorer = load_scorer(
            config.checkpoint, what=f"reward {cls.card.name!r}: checkpoint", revision=config.revision,
            rubric=config.rubric, min_pixels=config.min_pixels, max_pixels=config.max_pixels,
            dtype=getattr(torch, config.dtype), device=device,
        )  # fmt: skip
        freeze(scorer.model, gradient_checkpointing=config.gradient_checkpointing)
        scorer = replace(scorer, geometry=replace(scorer.geometry, rounding=config.rounding))
        return cls(load_comparer(scorer), config)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. Distribution: P(no) and P(yes) of each dimension. DataError for a missing reference."""
        import torch

        from rewardtune.scorer.comparison import PairQuestion
        from rewardtune.types import Score

        count, names = len(images), self.comparer.scorer.dimensions
        paths = [reference_of(prompt) for prompt in prompts]
        others = {path: count + place for place, path in enumerate(dict.fromkeys(paths))}
        asked = [
            PairQuestion(image, others[path], str(prompt), dimension)
            for image, (path, prompt) in enumerate(zip(paths, prompts, strict=True))
            for dimension in range(len(names))
        ]
        shown = [*images, *(self._reference(path) for path in others)]
        answers = self.comparer.read(shown, asked).logits.softmax(-1).unflatten(0, (count, len(names)))
        better = answers[..., 0]
        return Score(
            value=better.mean(-1),
            distribution=answers.flip(-1),
            levels=torch.tensor([0.0, 1.0], device=answers.device, dtype=answers.dtype),
            dimensions=names,
            parts={name: better[:, d] for d, name in enumerate(names)},
        )

    def _reference(self, path: Path) -> Tensor:
        from rewardtune.data.images import read_tensors

        if path not in self._seen:
            (self._seen[path],) = read_tensors([path], device=self.comparer.scorer.device)
        return self._seen[path]


def reference_of(prompt: str) -> Path:
    """The picture that a prompt names. DataError when it names none."""
    named = getattr(prompt, "metadata", {}).get("reference")
    if not isinstance(named, str) or not named:
        raise DataError(
            f"rewarddance: the prompt {str(prompt)[:80]!r} names no reference picture. Give prompts as a .jsonl file "
            "whose rows have `prompt` and `reference`, the path of a picture made for it, for instance by the "
            "pipeline before training."
        )
    return Path(named).expanduser()
