"""A small CLIP of transformers' own classes, saved as the published ones are; its tokenizer knows bytes only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def tokenizer() -> Any:
    """CLIP's class and rules, with the 512 bytes that its vocabulary starts with and no merges."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def model(*, size: int = 28, width: int = 32) -> Any:
    """A CLIPModel with seeded weights. Both towers lean the same way, so that cosines are positive as those of real
    pictures and their captions are."""
    from transformers import CLIPConfig, CLIPModel

    words = tokenizer()
    shared = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    vision = {"image_size": size, "patch_size": 7}
    config = CLIPConfig(
        text_config={**shared, **text, "projection_dim": 24},
        vision_config={**shared, **vision, "projection_dim": 24},
        projection_dim=24,
    )
    made: Any = CLIPModel(config)
    seed(made)
    with torch.no_grad():
        lean = torch.linspace(-1, 1, 24)
        for norm, projection in (
            (made.text_model.final_layer_norm, made.text_projection),
            (made.vision_model.post_layernorm, made.visual_projection),
        ):
            norm.bias.copy_(torch.linalg.pinv(projection.weight) @ lean * 3)
    return made


def text_tower(*, width: int, heads: int) -> Any:
    """A CLIPModel with one block of a real width in its text tower; its vision tower is of no use."""
    from transformers import CLIPConfig, CLIPModel

    words = tokenizer()
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 1, "num_attention_heads": heads,
            "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
            "vocab_size": len(words)}  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    made: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    seed(made.text_model, spread=width**-0.5)
    seed(made.text_projection, spread=width**-0.5)
    return made


def seed(module: torch.nn.Module, number: int = 0, spread: float = 0.2) -> None:
    """Normal weights by their names' order, 1 for what scales after a norm; stable over versions of torch."""
    drawn = np.random.RandomState(number)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(normal(drawn, tuple(parameter.shape), spread))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def normal(drawn: np.random.RandomState, shape: tuple[int, ...], spread: float) -> Tensor:
    return torch.from_numpy(np.asarray(drawn.standard_normal(shape) * spread, dtype=np.float32))


def save(folder: Path) -> str:
    """Weights, config and tokenizer in one folder, as on the hub."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
