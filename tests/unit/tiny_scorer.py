"""A tiny, randomly initialised Qwen3.5 scorer with Qwen3.5's tokenizer class on bytes, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
LEVELS = [*"123456789"]
NAMES = ["alignment", "realism", "aesthetics", "plausibility"]
PROMPTS = ["a red dog", "two cats and a dog on the left of a red dog", "a cat"]
RUBRIC = {
    "dimensions": NAMES,
    "levels": [{"token": text, "value": 1 + k / 2} for k, text in enumerate(LEVELS)],
    "template": "<|im_start|>user<|vision_start|>{image}<|vision_end|> {prompt}<|im_end|><|im_start|>assistant",
    "reads": [f" {name}:" for name in NAMES],
}


def tokenizer() -> Qwen3_5Tokenizer:
    """Qwen3.5's class with bytes for words: its splitting of digits is the real one."""
    table = {w: i for i, w in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    return Qwen3_5Tokenizer(
        vocab=table, merges=[], unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL[2:],
    )  # fmt: skip


def write_scorer(folder: Path, *, layers: list[str], dtype: torch.dtype = torch.float32) -> Path:
    """Patches of 4, merged 2 x 2, pictures of 16 x 16: 4 image tokens."""
    words = tokenizer()
    ids = words.convert_tokens_to_ids
    torch.manual_seed(0)
    text = {
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": len(layers),
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "layer_types": layers,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "tie_word_embeddings": True, "max_position_embeddings": 256, "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
                            "mrope_interleaved": True, "partial_rotary_factor": 1.0},
    }  # fmt: skip
    eye = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "initializer_range": 0.2, "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 32,
        "num_position_embeddings": 16,
    }  # fmt: skip
    config = Qwen3_5Config(
        text_config=text, vision_config=eye, tie_word_embeddings=True, image_token_id=ids("<|image_pad|>"),
        video_token_id=len(words) - 1, vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    Qwen3_5ForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 256, "longest_edge": 256},
    ).save_pretrained(folder)  # fmt: skip
    (folder / "rubric.json").write_text(json.dumps(RUBRIC))
    return folder


def pictures(count: int, *, seed: int = 0, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


PROMPTS = ["a red dog", "two cats and a dog on the left of a red dog", "a cat"]


THINKING = {
    "template": "<|im_start|>user<|vision_start|>{image}<|vision_end|> {prompt} rate {dimension}<|im_end|>"
    "<|im_start|>assistant ",
    "close": "<|im_end|>\n",
    "reads": [f"{name}:" for name in NAMES],
    "max_tokens": 6,
}


COMPARISON = {
    "template": "<|im_start|>user<|vision_start|>{reference}<|vision_end|><|vision_start|>{image}<|vision_end|> "
    "{prompt} second better in {dimension}?<|im_end|><|im_start|>assistant ",
    "yes": "y",
    "no": "n",
}


def write_comparer(folder: Path, *, layers: list[str]) -> Path:
    write_scorer(folder, layers=layers)
    (folder / "rubric.json").write_text(json.dumps({**RUBRIC, "comparison": COMPARISON}))
    return folder


def write_reasoner(folder: Path, *, layers: list[str]) -> Path:
    write_scorer(folder, layers=layers)
    (folder / "rubric.json").write_text(json.dumps({**RUBRIC, "thinking": THINKING}))
    return folder


def as_qwen3_vl(folder: Path) -> Path:
    """The other class, whose vision tower also feeds deeper layers, in place of a folder's weights."""
    words = tokenizer()
    ids = words.convert_tokens_to_ids
    torch.manual_seed(1)
    text = {
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True,
        "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
                            "mrope_interleaved": True},
    }  # fmt: skip
    eye = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "initializer_range": 0.2, "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=eye, tie_word_embeddings=True, image_token_id=ids("<|image_pad|>"),
        video_token_id=len(words) - 1, vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    (folder / "model.safetensors").unlink()
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    return folder
