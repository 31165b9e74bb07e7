"""`imagereward`: ImageReward v1 (arXiv 2304.05977), BLIP with a head, trained on 137 k comparisons by people.

Named by recipes; the network and its key map are the engine's `backbones/blip.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from rewardtune.data.references import version
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.backbones.blip import BlipReward
    from rewardtune.types import Score

CHECKPOINT, TOKENIZER = "THUDM/ImageReward", "google-bert/bert-base-uncased"
# the first as the README of Precise-SDE (arXiv 2605.23522) pins it, beside those commits of CLIP, PickScore and HPSv2
# that stand in our other cards; the second as public projects pin it throughout. Read there, not on the hub
PINNED = {CHECKPOINT: "5736be03b2652728fb87788c9797b0570450ab72", TOKENIZER: "86b5e0934494bd15c9632b12f734a8a67f723594"}
FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' data (ImageReward/ImageReward.py)."""
TOKENS = 35
"""Every prompt is cut to so many. The reference also fills it up to so many, with tokens that nothing attends to."""


class ImageReward:
    """The loaded reward."""

    card = RewardCard(
        name="imagereward",
        summary="ImageReward v1: how well people like a picture for its prompt; 224 x 224, shorter side resized and "
        "the middle kept; reads the first 35 tokens of a prompt",
        differentiable=True,
        needs_prompt=True,
        range=None,
        native_resolution=224,
        licence_code="Apache-2.0",
        licence_weights="Apache-2.0",
        requires=("transformers",),
        models=PINNED,
        gpu_memory_gib=1.7,
        reference="arXiv 2304.05977; github.com/THUDM/ImageReward at c1392c6, class ImageReward. Values are "
        "standardised there to mean 0 and deviation 1, mostly -2 to 2, so the scale is 1",
    )

    class Config(Options):
        """Options of `imagereward`."""

        checkpoint: str = CHECKPOINT
        """A hub id, a folder with ImageReward.pt and med_config.json, or the file, .pt or .safetensors."""
        revision: str | None = None
        """Commit, tag or branch of a hub id."""
        tokenizer: str = TOKENIZER
        """Hub id or folder of BERT's uncased tokenizer, which the checkpoint does not bring."""
        tokenizer_revision: str | None = None
        """Commit, tag or branch of the tokenizer's hub id."""
        rounding: bool = False
        """Round the resized picture to bytes as the reference does, with the gradient passed through."""
        dtype: Literal["float32", "bfloat16"] = "float32"
        """Dtype of the encoders; the head is float32 in either case."""
        gradient_checkpointing: bool = False
        """Run the encoders' blocks again on the way back instead of keeping what they computed."""

    def __init__(self, model: BlipReward, tokenizer: Any, config: Config) -> None:
        self.model, self.tokenizer, self.rounding = model, tokenizer, config.rounding
        self.size = int(model.vision.config.image_size)  # type: ignore[arg-type]
        given = {
            config.checkpoint: version(config.checkpoint, config.revision or PINNED.get(config.checkpoint)),
            config.tokenizer: version(config.tokenizer, config.tokenizer_revision or PINNED.get(config.tokenizer)),
        }
        self.card = replace(type(self).card, native_resolution=self.size, models=given)

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load the network, frozen. RecipeError: no such checkpoint, or one of another model."""
        import torch

        from rewardtune.backbones.blip import find_med_config, load_blip
        from rewardtune.backbones.frozen import freeze
        from rewardtune.backbones.tokenizer import load_tokenizer
        from rewardtune.backbones.weights import find_file, read_weights

        name = cls.card.name
        revision = config.revision or PINNED.get(config.checkpoint)
        file = find_file(config.checkpoint, FILE, revision=revision, reward=name, option="checkpoint")
        model = load_blip(
            name, read_weights(file, reward=name), dtype=getattr(torch, config.dtype), source=str(file),
            med_config=find_med_config(file, config.checkpoint, revision=revision),
        )  # fmt: skip
        freeze(model, gradient_checkpointing=config.gradient_checkpointing)
        tokenizer = load_tokenizer(
            config.tokenizer, revision=config.tokenizer_revision or PINNED.get(config.tokenizer), reward=name,
            at_most=model.text.config.vocab_size,
        )  # fmt: skip
        return cls(model.to(device), tokenizer, config)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`."""
        from rewardtune.backbones.pixels import CLIP_MEAN, CLIP_STD, normalise, shorter_side
        from rewardtune.data.images import as_bytes
        from rewardtune.types import Score

        words = self.tokenizer(
            [str(prompt) for prompt in prompts], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt",
        ).to(images.device)  # fmt: skip
        seen = shorter_side(images, self.size)
        pixels = normalise(as_bytes(seen) if self.rounding else seen, CLIP_MEAN, CLIP_STD)
        raw = self.model(pixels, words["input_ids"], words["attention_mask"])
        return Score(value=(raw - MEAN) / STD)
