"""`vqascore`: is this what the prompt says, yes or no? VQAScore (arXiv 2404.01291) on models of the Qwen-VL kind.

Named by recipes; the forward pass is the engine's `backbones/vlm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import field_validator

from rewardtune.data.references import version
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.backbones.vlm import Asked
    from rewardtune.types import Score

CHECKPOINT = "Qwen/Qwen2.5-VL-7B-Instruct"
# as public projects pin it throughout; read there, not on the hub. Other checkpoints are not pinned
PINNED = {CHECKPOINT: "cc594898137f460bfe9f0759e9844b3ce807cfb5"}


class VQAScore:
    """The loaded reward: `value` is P(yes)."""

    card = RewardCard(
        name="vqascore",
        summary="probability that a vision-language model answers yes when asked whether the picture shows the prompt; "
        "any Qwen-VL checkpoint (2, 2.5, 3, 3.5), at the resolution that its own files name",
        differentiable=True,
        needs_prompt=True,
        range=(0.0, 1.0),
        licence_code="Apache-2.0",
        licence_weights="Apache-2.0",
        requires=("transformers",),
        dimensions=("alignment",),
        models=PINNED,
        gpu_memory_gib=15.5,
        reference="arXiv 2404.01291; question of github.com/linzhiqiu/t2v_metrics at 6ecb74f, "
        "vqascore_models/qwen2vl_model.py. A probability needs no scale: 1",
    )

    class Config(Options):
        """Options of `vqascore`."""

        checkpoint: str = CHECKPOINT
        """A hub id or a folder of a Qwen-VL model; other sizes of Qwen2.5-VL have licences of their own."""
        revision: str | None = None
        """Commit, tag or branch of a hub id."""
        question: str = 'Does this figure show "{prompt}"? Please answer Yes or No.'
        """What is asked, with {prompt} once."""
        template: str | None = None
        """The whole text before the answer, with {image} and {prompt} once each; the checkpoint's chat template around
        `question` when None."""
        yes: str = "Yes"
        """The answer whose probability counts, one token."""
        no: str = "No"
        """The other answer, one token."""
        softmax: Literal["answers", "vocabulary"] = "answers"
        """Between the two answers, or over all tokens as VQAScore itself has it; the first has gradient left where the
        model would rather say something else."""
        dtype: Literal["float32", "bfloat16"] = "bfloat16"
        """Dtype of the weights; probabilities are float32 in either case."""
        rounding: bool = False
        """Round the resized pixels to bytes as Pillow leaves them; the gradient passes straight through."""
        gradient_checkpointing: bool = False
        """Run the blocks again on the way back instead of keeping what they computed."""

        @field_validator("question", "template")
        @classmethod
        def _asks_about_the_prompt(cls, text: str | None) -> str | None:
            if text is not None and text.count("{prompt}") != 1:
                raise ValueError("must hold {prompt} exactly once")
            return text

    def __init__(self, asked: Asked, config: Config) -> None:
        self.asked, self.softmax = asked, config.softmax
        self.template = asked.template(config.template or asked.chat(config.question))
        self.yes, self.no = asked.answers(self.template, [config.yes, config.no])
        self.card = replace(
            type(self).card,
            models={config.checkpoint: version(config.checkpoint, config.revision or PINNED.get(config.checkpoint))},
            dimensions=type(self).card.dimensions if config.softmax == "answers" else (),
        )

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load the model, frozen. RecipeError: no such checkpoint, or an answer that is not one token of it."""
        from rewardtune.backbones.vlm import load_asked

        asked = load_asked(
            cls.card.name, config.checkpoint, revision=config.revision or PINNED.get(config.checkpoint),
            dtype=config.dtype, rounding=config.rounding, gradient_checkpointing=config.gradient_checkpointing,
            device=device,
        )  # fmt: skip
        return cls(asked, config)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. Distribution: P(no) and P(yes) where the softmax is between the answers."""
        import torch

        from rewardtune.types import Score

        logits = self.asked.next_logits(images, prompts, self.template)
        if self.softmax == "vocabulary":
            answers = logits.log_softmax(-1)[:, [self.no, self.yes]].exp()
            return Score(value=answers[:, 1], parts={"yes": answers[:, 1], "no": answers[:, 0]})
        answers = logits[:, [self.no, self.yes]].softmax(-1)
        return Score(
            value=answers[:, 1],
            distribution=answers[:, None],
            levels=torch.tensor([0.0, 1.0], device=answers.device),
            dimensions=self.card.dimensions,
            parts={"alignment": answers[:, 1]},
        )
