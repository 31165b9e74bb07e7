"""What the authors of HPSv3 publish, at a small size, and the config and tokenizer of the base that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reference_numbers import weights
from safetensors.torch import save_file
from tiny_vlm import tokenizer
from transformers import Qwen2VLConfig, Qwen2VLModel


def write_files(folder: Path) -> dict[str, Any]:
    """Options with which the reward loads them."""
    words = tokenizer("qwen2_vl")
    ids = words.convert_tokens_to_ids
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": len(words) + 400, "max_position_embeddings": 4096}  # fmt: skip
    eye = {"depth": 1, "embed_dim": 16, "num_heads": 1, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14,
           "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    base = folder / "base"
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=eye, image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    config.save_pretrained(base)
    words.save_pretrained(base)
    rows = len(words) + 1  # the added token
    shapes = {}
    for name, value in Qwen2VLModel(config).state_dict().items():
        name = name if name.startswith("visual.") else name.replace("language_model.", "model.")
        shapes[name] = [rows, *value.shape[1:]] if "embed_tokens" in name else list(value.shape)
    shapes["lm_head.weight"] = [rows, 32]
    for place, (out, into) in {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}.items():
        shapes |= {f"rm_head.{place}.weight": [out, into], f"rm_head.{place}.bias": [out]}
    save_file(weights(shapes, spread=0.15), folder / "HPSv3.safetensors")
    return {"checkpoint": str(folder), "base": str(base), "dtype": "float32"}
