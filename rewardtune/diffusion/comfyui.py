"""Adapters for ComfyUI: the keys that its loader looks for, and the scale where it reads it.

ComfyUI takes adapters of UNets under kohya's names, and of the transformers it knows under diffusers' names with the
module in front; alpha only from a tensor `<layer>.alpha`. What it does not find it leaves out with a line in its log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewardtune.diffusion import lora
from rewardtune.diffusion.export import provenance_metadata
from rewardtune.errors import RecipeError
from rewardtune.plugins import AnyPipeline

FILE = "comfyui_lora.safetensors"


def export(
    pipeline: AnyPipeline, modules: Sequence[str], folder: Path, provenance: Mapping[str, str], *, base: str
) -> None:
    """Write `comfyui_lora.safetensors`. Raises RecipeError for a family whose keys ComfyUI is not known to accept."""
    from safetensors.torch import save_file

    tensors = keys(pipeline, modules)
    save_file(tensors, folder / FILE, metadata={"format": "pt", **provenance_metadata(provenance, base)})


def keys(pipeline: AnyPipeline, modules: Sequence[str]) -> dict[str, Tensor]:
    """The adapters under ComfyUI's names, alpha = rank."""
    if pipeline.comfyui is None:
        raise RecipeError(
            f"export --format comfyui: ComfyUI has no names for adapters of the family {pipeline.family!r} that are "
            "known to load. Export for diffusers, or with --merge as a whole pipeline."
        )
    state: dict[str, Tensor] = {}
    for name in modules:
        for path, tensor in lora.folded(pipeline.trainable[name]).items():
            state[_outer(name, path)] = tensor.float()
    if pipeline.comfyui == "kohya":
        from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

        named: dict[str, Tensor] = convert_state_dict_to_kohya(state)
        return {name: tensor.float() if name.endswith(".alpha") else tensor for name, tensor in named.items()}
    alphas = {
        path.replace(".lora_A.weight", ".alpha"): torch.tensor(float(len(tensor)))
        for path, tensor in state.items()
        if path.endswith(".lora_A.weight")
    }
    return state | alphas


def _outer(module: str, path: str) -> str:
    """CLIP's text models have lost their outer name in transformers 5; ComfyUI looks for it."""
    lost = module.startswith("text_encoder") and not path.startswith("text_model.")
    return f"{module}.text_model.{path}" if lost else f"{module}.{path}"
