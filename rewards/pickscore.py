"""`pickscore`: which picture people picked for a prompt, PickScore v1 (arXiv 2305.01569)."""

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

MODEL, REVISION = "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800"


class PickScore:
    """The loaded reward: `value` is exp(logit_scale) cos(image, prompt), Eq. 2 without its softmax over pictures."""

    card = RewardCard(
        name="pickscore",
        summary="CLIP ViT-H/14 trained on which of two pictures people picked; exp(logit_scale) cos, mostly 18 to 24; "
        "shorter side to 224, centre crop. Differences of 0.3 are already large",
        differentiable=True,
        needs_prompt=True,
        range=(-100.0, 100.0),
        licence_code="Apache-2.0",
        scale=26.0,
        native_resolution=224,
        licence_weights="MIT (of its repository)",
        requires=("transformers",),
        models={MODEL: REVISION},
        gpu_memory_gib=3.7,
        reference="arXiv 2305.01569; github.com/yuvalkirstain/PickScore; scale 26 as in flow_grpo",
    )

    class Config(Options):
        """Options of `pickscore`."""

        model: str = MODEL
        """The model in transformers' form: a folder or a hub id."""
        revision: str | None = None
        """Commit, tag or branch of a hub id; the tested one of the default model when left out."""
        rounding: bool = False
        """Round the resized picture to bytes as the reference does, with the gradient passed through."""
        dtype: Literal["float32", "bfloat16"] = "float32"
        """Dtype of the weights; pixels are resized and features compared in float32 in either case."""

    def __init__(self, clip: Clip, *, model: str, revision: str | None) -> None:
        self.clip = clip
        self.factor = float(clip.model.logit_scale.float().exp())
        models = {model: version(model, revision)}
        self.card = replace(type(self).card, native_resolution=clip.resolution, models=models)

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load the model, frozen. Raises RecipeError when it is none."""
        from rewardtune.backbones.clip import Clip, load_model, load_tokenizer

        revision = config.revision or (REVISION if config.model == MODEL else None)
        model = load_model(config.model, revision=revision, dtype=config.dtype, device=device, reward=cls.card.name)
        tokenizer = load_tokenizer(config.model, revision=revision, reward=cls.card.name)
        return cls(
            Clip(model, tokenizer, after="bytes" if config.rounding else "clamp"), model=config.model, revision=revision
        )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`."""
        from rewardtune.types import Score

        return Score(value=self.factor * self.clip.similarity(images, prompts))
