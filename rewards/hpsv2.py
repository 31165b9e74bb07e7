"""`hpsv2`: Human Preference Score v2.1 (arXiv 2306.09341), open_clip weights read into transformers' CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from rewardtune.data.references import version
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import CLIPModel

    from rewardtune.backbones.clip import Clip
    from rewardtune.types import Score

MODEL, REVISION = "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"
FILES = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}
TOKENIZER, TOKENIZER_REVISION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c"
VISION_HEAD, TEXT_HEAD = 80, 64
"""Widths of the attention heads of open_clip's ViT-H-14, which the shapes of its weights do not tell."""


class HpsV2:
    """The loaded reward: `value` is cos(image, prompt), as its authors' `img_score.py` has it."""

    card = RewardCard(
        name="hpsv2",
        summary="CLIP ViT-H/14 trained on human preferences; cosine without a factor, mostly 0.20 to 0.32; longer side "
        "to 224, the rest black, as its authors have it, while most ports crop: the same for square pictures only",
        differentiable=True,
        needs_prompt=True,
        range=(-1.0, 1.0),
        licence_code="Apache-2.0",
        scale=0.3,
        native_resolution=224,
        licence_weights="Apache-2.0",
        requires=("transformers",),
        models={MODEL: REVISION, TOKENIZER: TOKENIZER_REVISION},
        gpu_memory_gib=3.7,
        reference="arXiv 2306.09341; github.com/tgxs002/HPSv2 at 866735e; the scale is ours",
    )

    class Config(Options):
        """Options of `hpsv2`."""

        model: str = MODEL
        """The published checkpoint or one of the same layout: a file, a folder that holds it, or a hub id."""
        revision: str | None = None
        """Commit, tag or branch of a hub id; the tested one of the default model when left out."""
        version: Literal["2.1", "2.0"] = "2.1"
        """Which of the two published checkpoints."""
        tokenizer: str = TOKENIZER
        """CLIP's tokenizer: a folder or a hub id."""
        dtype: Literal["float32", "bfloat16"] = "float32"
        """Dtype of the weights; pixels are resized and features compared in float32 in either case."""

    def __init__(self, clip: Clip, *, models: dict[str, str]) -> None:
        self.clip = clip
        self.card = replace(type(self).card, native_resolution=clip.resolution, models=models)

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load the checkpoint, frozen. Raises RecipeError when it is none."""
        from rewardtune.backbones.clip import Clip, load_tokenizer
        from rewardtune.backbones.pixels import longer_side
        from rewardtune.backbones.weights import find_file, read_weights

        name = cls.card.name
        revision = config.revision or (REVISION if config.model == MODEL else None)
        file = find_file(config.model, FILES[config.version], revision=revision, reward=name, option="model")
        model: Any = clip_model(read_weights(file, reward=name, key="state_dict"), dtype=config.dtype, source=file)
        tokenizer_revision = TOKENIZER_REVISION if config.tokenizer == TOKENIZER else None
        tokenizer = load_tokenizer(config.tokenizer, revision=tokenizer_revision, reward=name)
        # its authors resize floats, which nothing cuts off
        clip = Clip(model.to(device), tokenizer, fit=longer_side, after="nothing")
        models = {
            config.model: version(config.model, revision),
            config.tokenizer: version(config.tokenizer, tokenizer_revision),
        }
        return cls(clip, models=models)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`."""
        from rewardtune.types import Score

        return Score(value=self.clip.similarity(images, prompts))


def clip_model(tensors: dict[str, Tensor], *, dtype: str, source: object) -> CLIPModel:
    """Weights in open_clip's layout -> a whole CLIPModel. Raises RecipeError for those of another model."""
    import torch
    from transformers import CLIPModel

    from rewardtune.backbones.open_clip import clip_config, to_clip
    from rewardtune.backbones.weights import fill

    config = clip_config(tensors, vision_head=VISION_HEAD, text_head=TEXT_HEAD, reward=HpsV2.card.name)
    model: Any = CLIPModel(config)
    fill(model, to_clip(tensors), reward=HpsV2.card.name, source=source)
    made: CLIPModel = model.to(getattr(torch, dtype))
    return made
