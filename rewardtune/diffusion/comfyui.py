"""Adapters for ComfyUI: the keys that its loader looks for, and the scale where it reads it.

ComfyUI takes adapters of UNets under kohya's names, of some transformers under diffusers' names with the module in
front, of every one under its own layers' names behind `diffusion_model.`, and of CLIP's text models; alpha only from a
tensor `<layer>.alpha`. What it does not find it leaves out with a line in its log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rewardtune.diffusion import lora
from rewardtune.diffusion.export import provenance_metadata
from rewardtune.errors import RecipeError
from rewardtune.plugins import AnyPipeline

FILE = "comfyui_lora.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_CLIP = re.compile(r"text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
"""The layers of text encoders that it has diffusers' and kohya's names for."""


def export(
    pipeline: AnyPipeline,
    modules: Sequence[str],
    folder: Path,
    provenance: Mapping[str, str],
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Write `comfyui_lora.safetensors`. Raises RecipeError for adapters whose keys ComfyUI is not known to accept."""
    from safetensors.torch import save_file

    tensors = keys(pipeline, modules)
    metadata = provenance_metadata(provenance, base, revision)
    save_file(tensors, folder / FILE, metadata={"format": "pt", **metadata})


def keys(pipeline: AnyPipeline, modules: Sequence[str]) -> dict[str, Tensor]:
    """The adapters under ComfyUI's names, alpha = rank."""
    names = pipeline.comfyui
    if names is None:
        raise RecipeError(
            f"export --format comfyui: ComfyUI has no names for adapters of the family {pipeline.family!r} that are "
            "known to load. Export for diffusers, or with --merge as a whole pipeline."
        )
    state: dict[str, Tensor] = {}
    for name in modules:
        adapters = lora.folded(pipeline.trainable[name])
        if name == pipeline.denoiser and not isinstance(names, str):
            adapters = _own(names, pipeline.trainable[name], adapters)
        else:
            adapters = {_outer(name, path): tensor for path, tensor in adapters.items()}
        state.update({path: tensor.float() for path, tensor in adapters.items()})
    for path in state:
        layer = path.removesuffix(_A).removesuffix(_B)
        if layer.startswith("text_encoder") and not _CLIP.fullmatch(layer):
            raise _unknown(layer)
    if names == "kohya":
        from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

        named: dict[str, Tensor] = convert_state_dict_to_kohya(state)
        return {name: tensor.float() if name.endswith(".alpha") else tensor for name, tensor in named.items()}
    alphas = {
        path.replace(_A, ".alpha"): torch.tensor(float(len(tensor)))
        for path, tensor in state.items()
        if path.endswith(_A)
    }
    return state | alphas


def _own(names: Mapping[str, Sequence[str]], module: nn.Module, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under ComfyUI's own layers' names. Where such a layer is several of diffusers' stacked, their A are stacked too
    and their B put on a diagonal: a higher rank, and exactly the same sum for each."""
    state: dict[str, Tensor] = {}
    home = {part: own for own, parts in names.items() for part in parts}
    for path in adapters:
        if not path.endswith(_A):
            continue
        layer = path.removesuffix(_A)
        block = re.search(r"(?<=\.)\d+(?=\.)", layer)
        number = block.group() if block else ""
        own = home.get(layer.replace(f".{number}.", ".#.", 1) if block else layer)
        if own is None:
            raise _unknown(layer)
        ups, downs = [], []
        for part in (part.replace("#", number) for part in names[own]):
            if part + _A in adapters:
                downs.append(adapters[part + _A])
                ups.append(adapters[part + _B])
            else:
                # its rows stay as they are
                linear = module.get_submodule(part)
                ups.append(torch.zeros(int(linear.out_features), 0))  # type: ignore[arg-type]
        name = f"diffusion_model.{own.replace('#', number)}"
        state[name + _A], state[name + _B] = torch.cat(downs), torch.block_diag(*ups)
    return state


def _unknown(layer: str) -> RecipeError:
    return RecipeError(
        f"export --format comfyui: ComfyUI is not known to load adapters of {layer}. Train without it (lora.modules, "
        "lora.targets), or export for diffusers, or with --merge as a whole pipeline."
    )


def _outer(module: str, path: str) -> str:
    """CLIP's text models have lost their outer name in transformers 5; ComfyUI looks for it."""
    lost = module.startswith("text_encoder") and not path.startswith("text_model.")
    return f"{module}.text_model.{path}" if lost else f"{module}.{path}"
