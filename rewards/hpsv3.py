"""`hpsv3`: HPSv3 (arXiv 2508.03789), Qwen2-VL with a head that gives mean and deviation of how people like a picture.

Named by recipes. What the checkpoint was trained with is kept as it is, the text word for word: its source is
github.com/MizzenAI/HPSv3 (MIT), PyPI hpsv3 1.0.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from rewardtune.data.references import version
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.backbones.vlm import Asked, Template
    from rewardtune.types import Score

CHECKPOINT, BASE = "MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"
# both as several independent public projects pin them together; read there, not on the hub
PINNED = {CHECKPOINT: "4f81e3e09edd82fe3c5f636444c721b592a735ca", BASE: "eed13092ef92e448dd6875b2a00151bd3f7db0ac"}
FILE = "HPSv3.safetensors"
TOKEN = "<|Reward|>"
"""Added to the tokenizer behind its last token; the head reads where it stands."""
PIXELS = 256 * 28 * 28
"""Area of every picture after resizing: 256 image tokens."""
LEVELS = (-25.0, 35.0, 0.5)
"""First and last level and step of the distribution (ours): published scores run from about -3 to 15."""
HEAD = (0, 3, 5)
"""Places of the affine maps in the published head; a ReLU follows the first two."""

SAID = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst "
    "and 10 being the best. \n\n**Visual Quality:**  \nEvaluate the overall visual quality of the image. The "
    "following sub-dimensions should be considered:\n- **Reasonableness:** The image should not contain any "
    "significant biological or logical errors, such as abnormal body structures or nonsensical environmental "
    "setups.\n- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy "
    "to interpret, with no blurring or indistinct areas.\n- **Detail Richness:** Consider the level of detail in "
    "textures, materials, lighting, and other visual elements (e.g., hair, clothing, shadows).\n- **Aesthetic and "
    "Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, atmosphere, "
    "depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.\n- "
    "**Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. "
    "\n\n**Text Alignment:**  \nAssess how well the image matches the textual prompt across the following "
    "sub-dimensions:\n- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, "
    "animal, object) align with the textual description. The subject should match the description in terms of "
    "number, appearance, and behavior.\n- **Style Relevance:** If the prompt specifies a particular artistic or "
    "stylistic style, evaluate how well the image adheres to this style.\n- **Contextual Consistency**: Assess "
    "whether the background, setting, and surrounding elements in the image logically fit the scenario described in "
    "the prompt. The environment should support and enhance the subject without contradictions.\n- **Attribute "
    "Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, "
    "expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical "
    "attributes should be preserved.\n- **Semantic Coherence**: Evaluate whether the overall meaning and intent of "
    "the prompt are captured in the image. The generated content should not introduce elements that conflict with or "
    "distort the original description.\nTextual prompt - {prompt}\n\n\n\nPlease provide the overall ratings of this "
    "image: "
)
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{image}<|vision_end|>" + SAID
)
"""Up to the added token: what the reference puts behind it stands after the place that is read, and changes nothing."""


@dataclass(frozen=True)
class Network:
    """Qwen2-VL without its output layer, and the head."""

    asked: Asked
    head: Any
    """Three affine maps, fp32."""

    def read(self, inputs: Mapping[str, Any]) -> Tensor:
        """(B, 2) mean and logarithm of the deviation, where each row ends; fp32, with graph.

        inputs: as `Asked.inputs` gives them, each row ending with the added token.
        """
        # HPSv3's forward hands embeddings to the language model and no grid, so that it counts image tokens as it does
        # words: its weights know one position a token, not the rows and columns of Qwen2-VL.
        mask = inputs["attention_mask"]
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        model: Any = self.asked.model
        hidden = model(**inputs, position_ids=places.expand(3, *places.shape), use_cache=False).last_hidden_state
        last = hidden[:, -1].to(self.head[0].weight.dtype)
        found: Tensor = self.head[2](self.head[1](self.head[0](last).relu()).relu())
        return found


class HPSv3:
    """The loaded reward: `value` is the mean, with gradient."""

    card = RewardCard(
        name="hpsv3",
        summary="HPSv3: how well people like a picture for its prompt, mean and deviation, from a vision-language "
        "model of 7B; every picture is resized to about 448 x 448, its shape kept. The distribution is that normal one "
        "on levels from -25 to 35 in halves, with the mean kept exactly",
        differentiable=True,
        needs_prompt=True,
        range=None,
        scale=15.0,
        native_resolution=448,
        licence_code="MIT",
        licence_weights="MIT, and Apache-2.0 of Qwen2-VL-7B",
        requires=("transformers",),
        dimensions=("preference",),
        models=PINNED,
        gpu_memory_gib=14.5,
        reference="arXiv 2508.03789; github.com/MizzenAI/HPSv3 at d232ff8 and PyPI hpsv3 1.0.0. Scale 15: UniRL's, "
        "which divides by it, since published scores run from about -3 to 15",
    )

    class Config(Options):
        """Options of `hpsv3`."""

        checkpoint: str = CHECKPOINT
        """A hub id or a folder with HPSv3.safetensors, or the file, under the names of transformers 4 or 5."""
        revision: str | None = None
        """Commit, tag or branch of a hub id."""
        base: str = BASE
        """Hub id or folder whose config and tokenizer it was trained with; no weights are taken from it."""
        base_revision: str | None = None
        """Commit, tag or branch of the base's hub id."""
        dtype: Literal["float32", "bfloat16"] = "bfloat16"
        """Dtype of the weights, published in bfloat16; the head is float32 in either case."""
        rounding: bool = False
        """Round the resized pixels to bytes as Pillow leaves them; the gradient passes straight through."""
        gradient_checkpointing: bool = False
        """Run the blocks again on the way back instead of keeping what they computed."""

    def __init__(self, network: Network, token: int, config: Config) -> None:
        self.network, self.token = network, token
        self.template: Template = network.asked.template(TEMPLATE)
        given = {
            config.checkpoint: version(config.checkpoint, config.revision or PINNED.get(config.checkpoint)),
            config.base: version(config.base, config.base_revision or PINNED.get(config.base)),
        }
        self.card = replace(type(self).card, models=given)

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load the network, frozen. RecipeError: no such checkpoint, or one that does not fit its base."""
        from transformers import AutoConfig

        from rewardtune.backbones.tokenizer import load_tokenizer
        from rewardtune.backbones.weights import find_file, read_weights
        from rewardtune.data.references import resolve, why_not_loaded
        from rewardtune.errors import RecipeError

        name = cls.card.name
        revision = config.revision or PINNED.get(config.checkpoint)
        base_revision = config.base_revision or PINNED.get(config.base)
        file = find_file(config.checkpoint, FILE, revision=revision, reward=name, option="checkpoint")
        state = renamed(read_weights(file, reward=name))
        rows = state["language_model.embed_tokens.weight"].shape[0] if _complete(state) else 0
        try:
            base = AutoConfig.from_pretrained(resolve(config.base), revision=base_revision)
        except (OSError, ValueError, KeyError) as error:
            raise RecipeError(
                f"reward {name!r}: the config of {config.base!r} does not load: {why_not_loaded(error, config.base)} "
                f"Give the option `base`: a folder with config and tokenizer of {BASE}, or its hub id."
            ) from error
        if base.model_type != "qwen2_vl":
            raise RecipeError(f"reward {name!r}: base {config.base!r} is a {base.model_type} model, not qwen2_vl.")
        network = build(base, state, file=str(file), config=config, device=device)
        tokenizer = load_tokenizer(config.base, revision=base_revision, reward=name, at_most=rows)
        token = tokenizer.get_added_vocab().get(TOKEN, len(tokenizer))
        if token != rows - 1:
            raise RecipeError(
                f"reward {name!r}: {TOKEN} would be token {token:,} of the tokenizer of {config.base!r}, and {file} "
                f"has its row for {rows - 1:,}. Give the base that the checkpoint was trained from ({BASE})."
            )
        network = replace(network, asked=replace(network.asked, tokenizer=tokenizer))
        return cls(network, token, config)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. Parts: `mean` and `deviation`."""
        import torch

        from rewardtune.backbones.discrete_normal import discrete_normal
        from rewardtune.types import Score

        inputs = self.network.asked.inputs(images, prompts, self.template, behind=[self.token])
        mean, spread = self.network.read(inputs).unbind(-1)
        # the loss it was trained with takes exp of the second output for the deviation
        deviation = spread.exp()
        first, last, step = LEVELS
        levels = torch.arange(first, last + step / 2, step, device=mean.device)
        return Score(
            value=mean,
            distribution=discrete_normal(mean, deviation, levels)[:, None],
            levels=levels,
            dimensions=self.card.dimensions,
            parts={"mean": mean, "deviation": deviation},
        )


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of transformers 4 (`visual.*`, `model.*`) or 5 -> under `Qwen2VLModel`'s and `head.*`."""
    rules = (
        (r"^model\.(visual|language_model)\.", r"\1."),
        (r"^model\.", "language_model."),
        *((rf"^rm_head\.{place}\.", f"head.{i}.") for i, place in enumerate(HEAD)),
    )
    found = {}
    for name, value in state.items():
        if name.startswith("lm_head."):
            continue  # no score reads it
        for pattern, replacement in rules:
            new, hits = re.subn(pattern, replacement, name)
            if hits:
                break
        found[new] = value
    return found


def build(base: Any, state: Mapping[str, Tensor], *, file: str, config: HPSv3.Config, device: Any) -> Network:
    """The network of renamed weights, frozen; its tokenizer is still to come. RecipeError where they do not fit."""
    import torch
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import Qwen2VLModel

    from rewardtune.backbones.frozen import freeze
    from rewardtune.backbones.vlm import Asked
    from rewardtune.backbones.weights import fill
    from rewardtune.scorer.patches import Geometry

    text, eye = base.get_text_config(), base.vision_config
    with init_empty_weights(include_buffers=False):
        if _complete(state):
            # the reference cuts the table of words down to the tokenizer's
            text.vocab_size = state["language_model.embed_tokens.weight"].shape[0]
        model: Any = Qwen2VLModel(base)
        whole = nn.Module()
        whole.visual, whole.language_model = model.visual, model.language_model
        whole.head = nn.ModuleList(nn.Linear(a, b) for a, b in ((text.hidden_size, 1024), (1024, 16), (16, 2)))
    fill(whole, state, reward=HPSv3.card.name, source=file)
    model.to(device=device, dtype=getattr(torch, config.dtype))
    head = whole.head.to(device=device, dtype=torch.float32)
    head.requires_grad_(False)
    freeze(model, gradient_checkpointing=config.gradient_checkpointing)
    from rewardtune.backbones.pixels import CLIP_MEAN, CLIP_STD

    geometry = Geometry(
        patch=eye.patch_size, merge=eye.spatial_merge_size, temporal=eye.temporal_patch_size, mean=CLIP_MEAN,
        std=CLIP_STD, min_pixels=PIXELS, max_pixels=PIXELS, rounding=config.rounding,
    )  # fmt: skip
    return Network(Asked(HPSv3.card.name, model, None, geometry), head)


def _complete(state: Mapping[str, Tensor]) -> bool:
    return "language_model.embed_tokens.weight" in state
