"""Low-rank adapters through peft: put on by `build.py`, switched off for the frozen start, listed for export and read
from it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.diffusion.lora_files import DIFFUSERS
from rewardtune.errors import RecipeError
from rewardtune.plugins import AnyPipeline
from rewardtune.randomness import key

ADAPTER = "default"


def attach(
    modules: Mapping[str, nn.Module],
    *,
    rank: int,
    alpha: int | None = None,
    targets: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> None:
    """Freeze each module and put a fp32 adapter on the linear layers that its `targets` name.

    alpha: `rank` when None, so that the adapter's scale is 1. Initial values depend on `seed` and the layer's name
    only; the adapters change nothing until they are trained. Raises RecipeError when a target matches no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for name, module in modules.items():
        wanted = list(targets[name])
        for target in wanted:
            if not any(layer == target or layer.endswith(f".{target}") for layer, _ in module.named_modules()):
                raise RecipeError(
                    f"lora.targets: {name} has no layer whose name ends in {target!r}. "
                    f"Its linear layers end in: {', '.join(_linear_names(module))}."
                )
        config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=wanted, lora_dropout=0.0)
        module.requires_grad_(False)
        add_adapter: Any = getattr(module, "add_adapter", None)
        try:
            if add_adapter is not None:
                # diffusers and transformers also note the adapter, which their savers and loaders look for.
                add_adapter(config, adapter_name=ADAPTER)
            else:
                inject_adapter_in_model(config, module, adapter_name=ADAPTER)
        except ValueError as error:  # a name may be that of a linear layer here and of a block there
            told = " ".join(str(error).split())
            raise RecipeError(f"lora.targets: {name} takes no adapters of {', '.join(wanted)}: {told}") from error
        for path, parameter in module.named_parameters():
            adapter = f".{ADAPTER}." in path and ".lora_" in path
            parameter.requires_grad_(adapter)
            if adapter:
                parameter.data = parameter.data.float()
                if ".lora_A." in path:
                    random = torch.Generator().manual_seed(key(seed, f"lora/{name}/{path}"))
                    # peft's own start: kaiming uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)).
                    bound = parameter.shape[1] ** -0.5
                    values = torch.rand(parameter.shape, generator=random) * 2 * bound - bound
                    parameter.data.copy_(values)


@contextmanager
def disabled(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the modules compute as if they had no adapters: the frozen start."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for module in modules.values() for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer.enable_adapters(not off)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def as_exported(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the adapters are what diffusers' loader makes of their file: scale folded in, in their layers' dtype."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [
        layer for module in modules.values() for layer in module.modules() if isinstance(layer, LoraLayer)
    ]
    kept = [
        (layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data, layer.scaling[ADAPTER])
        for layer in layers
    ]
    for layer, (a, b, scale) in zip(layers, kept, strict=True):
        dtype = layer.get_base_layer().weight.dtype
        layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data = a.to(dtype), (b * scale).to(dtype)
        layer.scaling[ADAPTER] = 1.0
    try:
        yield
    finally:
        for layer, (a, b, scale) in zip(layers, kept, strict=True):
            layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data = a, b
            layer.scaling[ADAPTER] = scale


def state(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Adapter tensors under diffusers' keys: `<module>.<layer>.lora_A.weight` and `.lora_B.weight`."""
    from peft import get_peft_model_state_dict

    return {
        f"{name}.{path}": tensor.detach()
        for name, module in modules.items()
        for path, tensor in get_peft_model_state_dict(module, adapter_name=ADAPTER).items()
    }


def folded(module: nn.Module) -> dict[str, Tensor]:
    """A module's adapter tensors by layer, on the CPU, as they are with alpha = rank: the scale lies in `lora_B`."""
    from peft import get_peft_model_state_dict

    adapted: Any = module
    config = adapted.peft_config[ADAPTER]
    scale = config.lora_alpha / config.r
    return {
        path: (tensor * scale if "lora_B" in path else tensor).detach().cpu().contiguous()
        for path, tensor in get_peft_model_state_dict(module, adapter_name=ADAPTER).items()
    }


def has_loader(pipeline: AnyPipeline) -> bool:
    """Whether diffusers has a loader for adapters of the denoiser.

    Some pipelines have inherited one that is for other modules than theirs (PRX, Kolors with perturbed-attention
    guidance), or for another class of denoiser (Kandinsky 3).
    """
    modules: Sequence[str] = getattr(pipeline.pipe, "_lora_loadable_modules", ())
    return (
        pipeline.denoiser in modules
        and all(hasattr(pipeline.pipe, name) for name in modules)
        and hasattr(pipeline.trainable[pipeline.denoiser], "load_lora_adapter")
    )


def loadable(pipeline: AnyPipeline) -> Sequence[str]:
    """Modules whose exported adapters can be put on a pipeline again."""
    modules: Sequence[str] = pipeline.pipe._lora_loadable_modules if has_loader(pipeline) else (pipeline.denoiser,)
    return modules


def load(pipeline: AnyPipeline, folder: Path) -> None:
    """Put exported adapters on, as a user of the family does: with diffusers' loader or, where it has none, peft's."""
    pipe = pipeline.pipe
    if has_loader(pipeline):
        pipe.load_lora_weights(str(folder), weight_name=DIFFUSERS)
        return
    from peft import PeftModel

    setattr(pipe, pipeline.denoiser, PeftModel.from_pretrained(getattr(pipe, pipeline.denoiser), str(folder)))


def unload(pipeline: AnyPipeline) -> None:
    """Take off what `load` put on."""
    pipe = pipeline.pipe
    if has_loader(pipeline):
        pipe.unload_lora_weights()
    else:
        setattr(pipe, pipeline.denoiser, getattr(pipe, pipeline.denoiser).unload())


def set_scale(modules: Iterable[nn.Module], scale: float) -> None:
    """Sample between the start (0) and the tuned model (1): each layer adds `scale` times what its adapters do.

    DRaFT's LoRA scaling (arXiv 2309.17400). It interpolates weights, so `scale` is not the share of the reward gained.
    """
    from peft.tuners.lora import LoraLayer

    for module in modules:
        for layer in module.modules():
            if isinstance(layer, LoraLayer):
                for adapter in layer.active_adapters:
                    layer.set_scale(adapter, scale)


def shrink(modules: Iterable[nn.Module], scale: float) -> None:
    """`set_scale` for good: in the weights, so that whatever is made of them has it."""
    for module in modules:
        for path, parameter in module.named_parameters():
            if ".lora_B." in path:
                parameter.data.mul_(scale)


def merge(modules: Mapping[str, nn.Module]) -> None:
    """Fold adapters into the layers that they are on, and take them off."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in modules.values():
        for layer in list(module.modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge(safe_merge=True)
        recurse_remove_peft_layers(module)
        for leftover in ("peft_config", "_hf_peft_config_loaded"):
            if hasattr(module, leftover):
                delattr(module, leftover)


def _linear_names(module: nn.Module) -> list[str]:
    return sorted({path.rpartition(".")[2] for path, layer in module.named_modules() if isinstance(layer, nn.Linear)})
