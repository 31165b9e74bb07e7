"""Weights in open_clip's layout -> transformers' `CLIPModel`, so that open_clip and its torchvision stay away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rewardtune.errors import RecipeError

TOP = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
TOWERS = {"transformer.resblocks.": "text_model", "visual.transformer.resblocks.": "vision_model"}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def to_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and shapes -> CLIPModel's: query, key and value are split, projections turned. What has no
    counterpart keeps its name, for `check_keys` to tell of."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in TOP:
            turned = name in ("text_projection", "visual.proj")
            found[TOP[name]] = tensor.t().contiguous() if turned else tensor
            continue
        # the text tower's prefix is the end of the vision tower's
        start = next((prefix for prefix in TOWERS if name.startswith(prefix)), None)
        if start is None:
            found[name] = tensor
            continue
        layer, _, rest = name.removeprefix(start).partition(".")
        stem = f"{TOWERS[start]}.encoder.layers.{layer}"
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.rpartition("_")[2]
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{stem}.self_attn.{part}_proj.{kind}"] = piece.contiguous()
        else:
            part, _, kind = rest.rpartition(".")
            found[f"{stem}.{PARTS.get(part, part)}.{kind}"] = tensor
    return found


def clip_config(tensors: Mapping[str, Tensor], *, vision_head: int, text_head: int, reward: str) -> Any:
    """The CLIPConfig that open_clip weights belong to, from their shapes; widths of the attention heads are not in
    them. Raises RecipeError for weights of another model."""
    from transformers import CLIPConfig

    try:
        positions, width = tensors["visual.positional_embedding"].shape
        patch = tensors["visual.conv1.weight"].shape[-1]
        embedded = tensors["visual.proj"].shape[1]
        vocabulary, text_width = tensors["token_embedding.weight"].shape
        vision = {
            "hidden_size": width,
            "intermediate_size": tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _layers(tensors, "visual.transformer.resblocks."),
            "num_attention_heads": width // vision_head,
            "image_size": patch * round((positions - 1) ** 0.5),
            "patch_size": patch,
        }
        text = {
            "hidden_size": text_width,
            "intermediate_size": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _layers(tensors, "transformer.resblocks."),
            "num_attention_heads": text_width // text_head,
            "vocab_size": vocabulary,
            "max_position_embeddings": tensors["positional_embedding"].shape[0],
            # the end token is the last of the vocabulary, where features are read
            "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2,
        }
    except (KeyError, ValueError) as error:
        raise RecipeError(
            f"reward {reward!r}: the weights are of another model: they lack {error}, which open_clip's ViT has. Give "
            f"the file that the card names (`rewardtune rewards show {reward}`)."
        ) from error
    shared = {"projection_dim": embedded, "hidden_act": "gelu"}
    return CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=embedded)


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).partition(".")[0]) for name in tensors if name.startswith(prefix))
