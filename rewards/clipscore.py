"""`clipscore`: how well a picture fits its caption by CLIP's cosine (Hessel et al., arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from rewardtune.data.references import version
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.backbones.clip import Clip
    from rewardtune.types import Score

MODEL, REVISION = "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"
GOOD_COSINE = 0.3
"""Ours: a high cosine of CLIP L/14, by which values are scaled before they are mixed."""


class ClipScore:
    """The loaded reward: `value` is CLIP-S, w max(cos(image, prefix + caption), 0), Eq. 1."""

    card = RewardCard(
        name="clipscore",
        summary="cosine of picture and caption in CLIP's space, 2.5 max(cos, 0) with the prefix 'A photo depicts'; "
        "shorter side to 224, centre crop; blind to most of what people like, and without gradient where the cosine is "
        "negative",
        differentiable=True,
        needs_prompt=True,
        range=(0.0, 2.5),
        licence_code="Apache-2.0",
        scale=2.5 * GOOD_COSINE,
        native_resolution=224,
        licence_weights="MIT",
        requires=("transformers",),
        models={MODEL: REVISION},
        gpu_memory_gib=1.6,
        reference="arXiv 2104.08718; github.com/jmhessel/clipscore",
    )

    class Config(Options):
        """Options of `clipscore`."""

        model: str = MODEL
        """A CLIP model in transformers' form: a folder or a hub id."""
        revision: str | None = None
        """Commit, tag or branch of a hub id; the tested one of the default model when left out."""
        prefix: str = "A photo depicts "
        """Goes before each caption. The paper's; torchmetrics has none."""
        w: float = 2.5
        """Factor of the cosine. The paper's is 2.5; torchmetrics and the logits of CLIP itself have 100."""
        rounding: bool = False
        """Round the resized picture to bytes as the reference does, with the gradient passed through."""
        dtype: Literal["float32", "bfloat16"] = "float32"
        """Dtype of the weights; pixels are resized and features compared in float32 in either case."""

    def __init__(self, clip: Clip, *, prefix: str, w: float, model: str, revision: str | None) -> None:
        self.clip, self.prefix, self.w = clip, prefix, w
        self.card = replace(
            type(self).card, range=(0.0, w), scale=w * GOOD_COSINE, native_resolution=clip.resolution,
            models={model: version(model, revision)},
        )  # fmt: skip

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load the model, frozen. Raises RecipeError when it is none."""
        from rewardtune.backbones.clip import Clip, load_model, load_tokenizer

        revision = config.revision or (REVISION if config.model == MODEL else None)
        model = load_model(config.model, revision=revision, dtype=config.dtype, device=device, reward=cls.card.name)
        tokenizer = load_tokenizer(config.model, revision=revision, reward=cls.card.name)
        clip = Clip(model, tokenizer, after="bytes" if config.rounding else "clamp")
        return cls(clip, prefix=config.prefix, w=config.w, model=config.model, revision=revision)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. Parts: the cosine."""
        from rewardtune.types import Score

        cosine = self.clip.similarity(images, [self.prefix + prompt for prompt in prompts])
        return Score(value=self.w * cosine.clamp(min=0), parts={"cosine": cosine})
