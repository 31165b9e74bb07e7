"""ComfyUI's way with a file of adapters: which names it takes, and what it adds to which weight.

The names are recorded from its own code in comfyui_names.json, which says from which; nothing of the code is here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).parent / "comfyui_names.json"
NAMES: Mapping[str, Mapping[str, Sequence[str]]] = json.loads(FILE.read_text())
PUBLISHED = [2304, 768, 768]
"""Rows of Lumina 2's to_q, to_k and to_v in the only width that diffusers' conversion knows."""


def accepts(family: str, layer: str) -> bool:
    """Whether adapters of a layer are loaded, as it is called before `.lora_B.weight` or `.lora_up.weight`."""
    names = (start + end for start, ends in NAMES[family].items() for end in ends)
    return any(re.fullmatch(re.escape(name).replace(r"\#", r"\d+"), layer) for name in names)


def load(adapter: Any, pipe: Any, modules: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Put adapters on: a layer's name as recorded, alpha from `<layer>.alpha` or else 1 in place of alpha / rank; and
    leave nothing over, which ComfyUI would drop with a line."""
    known: dict[str, torch.nn.Module] = {}
    for name in modules:
        for path, module in getattr(pipe, name).named_modules():
            # transformers 5 drops the outer name that ComfyUI's and kohya's files have
            inner = path if path.startswith("text_model.") or "text_encoder" not in name else f"text_model.{path}"
            kohya = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}.get(name)
            known |= {f"{name}.{inner}": module, f"{kohya}_{inner.replace('.', '_')}": module}
    left, own = dict(tensors), {}
    with torch.no_grad():
        for key in tensors:
            found = re.fullmatch(r"(.*)\.(lora_up|lora_B)\.weight", key)
            if found is None or not accepts(adapter.family, found[1]):
                continue
            layer, down = found[1], {"lora_up": "lora_down", "lora_B": "lora_A"}[found[2]]
            b, a, alpha = left.pop(key), left.pop(f"{layer}.{down}.weight"), left.pop(f"{layer}.alpha", None)
            change = b.flatten(1) @ a.flatten(1) * (1.0 if alpha is None else float(alpha) / len(a))
            if layer.startswith("diffusion_model."):
                own[layer.removeprefix("diffusion_model.") + ".weight"] = change
            else:
                known[layer].weight += change.view_as(known[layer].weight)
        for key, change in from_own(adapter.family, pipe, own).items():
            getattr(pipe, adapter.denoiser).get_parameter(key).add_(change)
    assert not left, f"lora key not loaded: {next(iter(left))}"


def from_own(family: str, pipe: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some of a denoiser's weights as its authors and ComfyUI name them -> as diffusers does, by diffusers' own
    conversion of their checkpoints."""
    from diffusers.loaders import single_file_utils as published

    if not weights:
        return {}
    converted: dict[str, Tensor]
    if family == "flux_2":
        converted = published.convert_flux2_transformer_checkpoint_to_diffusers(dict(weights))
        return converted
    assert family == "lumina_2"
    config = pipe.transformer.config
    head = config.hidden_size // config.num_attention_heads
    rows = [count * head for count in (config.num_attention_heads, config.num_kv_heads, config.num_kv_heads)]
    apart: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if ".qkv." in key and rows != PUBLISHED:
            apart |= {key.replace("qkv", f"to_{n}"): part for n, part in zip("qkv", weight.split(rows), strict=True)}
        else:
            apart[key] = weight
    converted = published.convert_lumina2_to_diffusers(apart)
    return converted
