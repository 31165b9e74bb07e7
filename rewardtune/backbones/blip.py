"""ImageReward's network: BLIP's text encoder reads a prompt, sees the image by cross-attention, and a head scores it.

transformers' own BLIP classes under the names of the published file (github.com/THUDM/ImageReward at c1392c6: BLIP's
`vit.py` and `med.py`). `rewards/imagereward.py` adds pixels, words and scale.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardtune.backbones.weights import check_keys, fill
from rewardtune.data.references import why_not_loaded
from rewardtune.errors import RecipeError

HEAD_WIDTH = 64
"""Width of an attention head of the vision tower, in ViT-B as in ViT-L; no published file says how many there are."""
MED_CONFIG: Mapping[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "max_position_embeddings": 512, "vocab_size": 30524, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
"""What the published med_config.json says, for weights that stand alone."""

VISION = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.(\d+)\.norm(\d)\.": r"encoder.layers.\1.layer_norm\2.",
    r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"^blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
    r"^norm\.": "post_layernorm.",
}
UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|\.position_ids$")
"""In the file for BLIP's contrastive loss; no score reads it."""


class Attention(nn.Module):
    """The vision tower's attention by torch's fused kernel, under the same names.

    transformers' own writes out the (B, heads, T, T) weights several times: more time, and more to keep for the way
    back.
    """

    def __init__(self, plain: Any) -> None:
        """plain: transformers' `BlipAttention`."""
        super().__init__()
        self.heads, self.qkv, self.projection = plain.num_heads, plain.qkv, plain.projection

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """(B, T, D) -> the same, and no weights to look at."""
        parts = self.qkv(hidden_states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.projection(mixed.transpose(1, 2).flatten(2)), None


class Gelu(nn.Module):
    """GELU, in place where no gradient is wanted: what goes in is a linear map's output, which nothing else reads."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.gelu(x)
        found: Tensor = torch.ops.aten.gelu_(x)
        return found


class BlipReward(nn.Module):
    """pixels, ids -> (B,) fp32, before the scale of the reward."""

    def __init__(self, vision: Any, text: Any, head: list[int]) -> None:
        """vision, text: the configs of the two encoders. head: widths of the affine maps, the text's first."""
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        self.vision = BlipVisionModel(vision)
        for block in self.vision.encoder.layers:
            block.self_attn = Attention(block.self_attn)
            block.mlp.activation_fn = Gelu()  # type: ignore[union-attr]
        self.text = BlipTextModel(text, add_pooling_layer=False)
        # no activation between them: the published head is one affine map, kept in parts as its weights are
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(head))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """pixels: (B, 3, S, S), normalised. ids, mask: (B, L)."""
        seen = self.vision(pixels.to(self.dtype)).last_hidden_state
        # `is_decoder` turns the self-attention causal, while the config needs it for the cross-attention to be there
        read = self.text(
            ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False, use_cache=False
        ).last_hidden_state[:, 0]
        score = read.to(self.head[0].weight.dtype)
        for layer in self.head:
            score = layer(score)
        found: Tensor = score[:, 0]
        return found

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vision.dtype
        return dtype


def find_med_config(file: Path, reference: str, *, revision: str | None) -> Path | None:
    """med_config.json beside the weights, or at the hub id that they came from; None where there is none."""
    beside = file.with_name("med_config.json")
    if beside.is_file() or Path(reference).expanduser().exists():
        return beside if beside.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(reference, beside.name, revision=revision))
    except LocalEntryNotFoundError as error:  # the hub was not reached, so nobody knows whether there is one
        raise _not_fetched(reference, error) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise _not_fetched(reference, error) from error


def _not_fetched(reference: str, error: Exception) -> RecipeError:
    return RecipeError(
        f"reward 'imagereward': med_config.json of checkpoint {reference!r} cannot be fetched from the hub: "
        f"{why_not_loaded(error, reference)} Give a folder that holds it beside ImageReward.pt."
    )


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the published names -> under ours; names that are in neither stay as they are."""
    found = {}
    steps = sorted({int(m[1]) for name in state if (m := re.match(r"mlp\.layers\.(\d+)\.", name))})
    for name, value in state.items():
        if UNUSED.search(name):
            continue
        if name.startswith("blip.visual_encoder."):
            inner = name.removeprefix("blip.visual_encoder.")
            for pattern, replacement in VISION.items():
                inner = re.sub(pattern, replacement, inner)
            found[f"vision.{inner}"] = value
        elif name.startswith("blip.text_encoder."):
            found[f"text.{name.removeprefix('blip.text_encoder.')}"] = value
        elif match := re.match(r"mlp\.layers\.(\d+)\.(.*)", name):
            found[f"head.{steps.index(int(match[1]))}.{match[2]}"] = value
        else:
            found[name] = value
    return found


def load_blip(
    reward: str, published: Mapping[str, Tensor], *, med_config: Path | None, dtype: torch.dtype, source: str
) -> BlipReward:
    """The network of a published file. Raises RecipeError where the file is of another model.

    med_config: the text encoder's config beside the weights; the published one when None. The head stays fp32.
    """
    from accelerate import init_empty_weights
    from transformers import BlipTextConfig, BlipVisionConfig

    state = renamed(published)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    needed = ("vision.embeddings.position_embedding", "vision.embeddings.patch_embedding.weight", "head.0.weight",
              "vision.encoder.layers.0.mlp.fc1.weight", "text.embeddings.word_embeddings.weight")  # fmt: skip
    if any(name not in state for name in needed):
        check_keys(dict.fromkeys(needed, ()), shapes, reward=reward, source=source)
    places, width = state[needed[0]].shape[1:]
    patch = state[needed[1]].shape[-1]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state[needed[3]].shape[0],
        num_hidden_layers=_count(state, r"vision\.encoder\.layers\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round((places - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    told = json.loads(med_config.read_text(encoding="utf-8")) if med_config is not None else {}
    text = BlipTextConfig(
        **{name: told.get(name, value) for name, value in MED_CONFIG.items()},
        encoder_hidden_size=width,  # the file's own `encoder_width` is not read by the reference either
        is_decoder=True,
        use_cache=False,
    )
    head = [state["head.0.weight"].shape[1]]
    head += [state[f"head.{i}.weight"].shape[0] for i in range(_count(state, r"head\.(\d+)\."))]
    with init_empty_weights(include_buffers=False):
        model = BlipReward(vision, text, head)
    fill(model, state, reward=reward, source=source)
    model.to(dtype)
    model.head.float()
    return model


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)
