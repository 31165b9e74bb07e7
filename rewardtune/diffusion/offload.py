"""Frozen parts wait in main memory: text encoders and the autoencoder are on the device only while they work.

accelerate's hooks bring a module in when it is called, diffusers' autoencoders call them for `decode` and `encode` too;
before the denoiser runs, whatever came goes back. The denoiser never moves, so a step costs no transfer. Buffers stay
on the device: they are small, and some are read where their module is not called, as FLUX.2's statistics of latents.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from rewardtune.plugins import AnyPipeline

HOME = "cpu"


class _Visit(ModelHook):  # type: ignore[misc]
    """Brings its module to the device before it is used. Not accelerate's `CpuOffload`: diffusers takes that one for a
    pipeline that it offloads itself, and would move the denoiser too when adapters are loaded."""

    def __init__(self, device: str) -> None:
        # the name under which diffusers' pipelines look for the device that they run on
        self.execution_device = torch.device(device)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        _move(module, self.execution_device)
        return args, kwargs


def apply(pipeline: AnyPipeline, *, device: str, stay: Collection[str]) -> None:
    """Put the modules named in `stay` on `device`, and all others of the pipeline in main memory, to come when called.

    stay: the denoiser, and whatever is trained.
    """
    visitors: list[nn.Module] = []
    for name, module in _modules(pipeline).items():
        if name in stay:
            module.to(device)
            continue
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        _move(module, HOME)
        add_hook_to_module(module, _Visit(device))
        visitors.append(module)

    def send_away(*_: Any) -> None:
        for module in visitors:
            _move(module, HOME)

    _modules(pipeline)[pipeline.denoiser].register_forward_pre_hook(send_away)


def applied(pipeline: AnyPipeline) -> str | None:
    """The device of a pipeline whose parts wait in main memory; None for one that is on its device as a whole."""
    hooks = [getattr(module, "_hf_hook", None) for module in _modules(pipeline).values()]
    return next((str(hook.execution_device) for hook in hooks if isinstance(hook, _Visit)), None)


@contextmanager
def aside(pipeline: AnyPipeline) -> Iterator[None]:
    """Inside, the whole pipeline is in main memory; afterwards each part is where it was."""
    tensors = [t for module in _modules(pipeline).values() for t in (*module.parameters(), *module.buffers())]
    places = [tensor.device for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(HOME)
    try:
        yield
    finally:
        for tensor, place in zip(tensors, places, strict=True):
            tensor.data = tensor.data.to(place)


def _move(module: nn.Module, place: str | torch.device) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(place)


def _modules(pipeline: AnyPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.pipe.components.items() if isinstance(part, nn.Module)}
