"""`aesthetic`: how people rate the look of a picture, LAION's heads on CLIP L/14 (versions 1 and 2 are both affine)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from rewardtune.data import references
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from rewardtune.backbones.clip import Clip
    from rewardtune.types import Score

MODEL, REVISION = "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"
_GITHUB = "https://raw.githubusercontent.com/"
HEADS = {
    "1": (
        _GITHUB + "LAION-AI/aesthetic-predictor/6d122adad522ab246644d9dc1c6d7a3810ee255f/sa_0_4_vit_l_14_linear.pth",
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
    ),
    "2": (
        _GITHUB + "christophschuhmann/improved-aesthetic-predictor/6934dd81792f086e613a121dbce43082cb8be85e/"
        "sac+logos+ava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
}
"""Version -> the file its authors published, at a commit, and its sha256."""


class Aesthetic:
    """The loaded reward: `value` is the head on the picture's embedding of unit length."""

    card = RewardCard(
        name="aesthetic",
        summary="LAION's rating of a picture's look, mostly 4 to 7 of 10, without its prompt; shorter side to 224, "
        "centre crop. An affine map of CLIP's embedding: easily driven to one painterly style, so mix it with a "
        "reward that reads the prompt",
        differentiable=True,
        needs_prompt=False,
        range=None,
        licence_code="Apache-2.0",
        scale=10.0,
        native_resolution=224,
        licence_weights="Apache-2.0 (version 2), MIT (version 1, CLIP)",
        requires=("transformers",),
        models={MODEL: REVISION, "github.com/christophschuhmann/improved-aesthetic-predictor": "6934dd8"},
        gpu_memory_gib=1.2,
        reference="github.com/christophschuhmann/improved-aesthetic-predictor at 6934dd8; "
        "github.com/LAION-AI/aesthetic-predictor at 6d122ad",
    )

    class Config(Options):
        """Options of `aesthetic`."""

        version: Literal["2", "1"] = "2"
        """Of the head: 2 (ratings of SAC, logos and AVA) or 1 (SAC)."""
        head: str | None = None
        """A file with the head's weights; its authors' file, fetched once and checked by its sha256, when left out."""
        model: str = MODEL
        """The CLIP model under the head, in transformers' form: a folder or a hub id."""
        revision: str | None = None
        """Commit, tag or branch of a hub id; the tested one of the default model when left out."""
        rounding: bool = False
        """Round the resized picture to bytes as the reference does, with the gradient passed through."""
        dtype: Literal["float32", "bfloat16"] = "float32"
        """Dtype of CLIP's weights; pixels are resized and the head computes in float32 in either case."""

    def __init__(self, clip: Clip, head: nn.Module, *, version: str, model: str, revision: str | None) -> None:
        self.clip, self.head = clip, head.requires_grad_(False).eval()
        licence = "Apache-2.0 (head), MIT (CLIP)" if version == "2" else "MIT"
        self.card = replace(
            type(self).card, native_resolution=clip.resolution, licence_weights=licence,
            models={model: references.version(model, revision), "head": f"version {version}"},
        )  # fmt: skip

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load CLIP's vision tower and the head, frozen. Raises RecipeError when either is none."""
        from rewardtune.backbones.clip import Clip, load_model
        from rewardtune.backbones.weights import download, fill, find_file, read_weights

        name = cls.card.name
        revision = config.revision or (REVISION if config.model == MODEL else None)
        model = load_model(config.model, revision=revision, dtype=config.dtype, device=device, reward=name)
        model.text_model = None  # no prompt is read
        if config.head is None:
            file = download(*HEADS[config.version], reward=name, option="head")
        else:
            file = find_file(config.head, "head.pth", revision=None, reward=name, option="head")
        head = make_head(config.version, model.config.projection_dim)
        fill(head, read_weights(file, reward=name), reward=name, source=file)
        clip = Clip(model, None, after="bytes" if config.rounding else "clamp")
        return cls(clip, head.to(device), version=config.version, model=config.model, revision=revision)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`."""
        from rewardtune.types import Score

        return Score(value=self.head(self.clip.image_features(images)).squeeze(-1))


def make_head(version: str, width: int) -> nn.Module:
    """The authors' module, with their names. Nothing nonlinear stands between the layers of version 2."""
    from torch import nn

    if version == "1":
        return nn.Linear(width, 1)
    layers = nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    return nn.Sequential(OrderedDict(layers=layers))
