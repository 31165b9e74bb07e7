"""Frozen layers under gradient: keep for the way back only what the gradient of their input needs.

Autograd keeps a convolution's input although only a trained weight would ask for it, and the tensor between a group
norm and a SiLU. UNets and decoders of autoencoders are made of these. Nothing here changes a value: convolutions and
their gradients run the same kernels, and what is computed again comes out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

SMALL = 2**18
"""Bytes of an input below which nothing is gained (ours): the bookkeeping takes as long as the layer."""


def keep_less(module: nn.Module, *, recompute: bool) -> None:
    """Let the layers inside keep less while they are frozen; one whose weights are trained works as before.

    recompute: also take group norms in front of a SiLU, and GEGLU units, again on the way back, which costs a few per
    cent of time. Under autocast a weight is cast again on the way back, so that no copy of it is kept.
    """
    for parent in list(module.modules()):
        children = dict(parent.named_children())
        activated = recompute and any(isinstance(layer, nn.SiLU) and not layer.inplace for layer in children.values())
        for name, layer in children.items():
            if "forward" in vars(layer) or hasattr(layer, "_hf_hook"):  # done already; or its weights come and go
                continue
            if _is(layer, nn.Conv2d):
                # a shortcut reads what the norm beside it keeps in any case
                if layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and name != "conv_shortcut":
                    _replace(layer, _convolve)
            elif activated and _is(layer, nn.GroupNorm):
                _replace(layer, _normalise)
            elif activated and _is(layer, nn.SiLU):
                _replace(layer, _activate)
            elif recompute and type(layer) is GEGLU:
                _replace(layer, _gate)


def _is(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is of this kind and computes as it does: a subclass may pad or cast (Qwen-Image 2.1's)."""
    return isinstance(layer, kind) and type(layer).forward is kind.forward


def _replace(layer: nn.Module, forward: Callable[..., Tensor]) -> None:
    layer.forward = partial(forward, layer, layer.forward)


def _applies(layer: nn.Conv2d | nn.GroupNorm | nn.Linear, inputs: Tensor) -> bool:
    """Under gradient, frozen, and large enough."""
    return (
        inputs.requires_grad
        and inputs.nbytes >= SMALL
        and torch.is_grad_enabled()
        and not (layer.weight is not None and layer.weight.requires_grad)
        and not (layer.bias is not None and layer.bias.requires_grad)
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast that holds here; None without one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocast_as(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """On the way back, which runs outside autocast as a rule: the autocast that held on the way there."""
    if autocast_dtype(device) == dtype:
        return nullcontext()  # entering autocast takes as long as a small layer
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _convolve(layer: nn.Conv2d, plain: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    if not _applies(layer, inputs):
        return plain(inputs)
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
    found: Tensor = _Convolution.apply(inputs, layer.weight, layer.bias, settings)  # type: ignore[no-untyped-call]
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        # frozen, so nothing needs to watch over it, and the hooks of checkpointing need not see it
        ctx.weight, ctx.settings = weight, settings
        ctx.shape, ctx.dtype = (inputs.shape, inputs.stride()), inputs.dtype
        return torch.conv2d(inputs, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, None, None, None]:
        stride, padding, dilation, groups = ctx.settings
        # of the input nothing but its shape is read; its strides choose the kernel
        unread = upstream[0].new_empty_strided(*ctx.shape)
        found = torch.ops.aten.convolution_backward(
            upstream[0], unread, ctx.weight.to(unread.dtype), None, stride, padding, dilation, False, [0],
            groups, [True, False, False],
        )  # fmt: skip
        return found[0].to(ctx.dtype), None, None, None


def _normalise(layer: nn.GroupNorm, plain: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    found = plain(inputs)
    if _applies(layer, inputs):
        found._again = (plain, inputs.detach())  # type: ignore[attr-defined]  # read by a SiLU behind it
    return found


def _activate(layer: nn.SiLU, plain: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    again = getattr(inputs, "_again", None)
    if again is None or not torch.is_grad_enabled():
        return plain(inputs)
    found: Tensor = _SiluOfNorm.apply(inputs, *again)  # type: ignore[no-untyped-call]
    return found


class _SiluOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, normed: Tensor, norm: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        ctx.norm, ctx.autocast = norm, autocast_dtype(inputs.device)
        ctx.save_for_backward(inputs)
        return F.silu(normed)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        with autocast_as(inputs.device, ctx.autocast):
            normed = ctx.norm(inputs)
        found: Tensor = torch.ops.aten.silu_backward(upstream[0], normed)
        return found, None, None


def _gate(layer: GEGLU, plain: Callable[..., Tensor], inputs: Tensor, *rest: Any, **more: Any) -> Tensor:
    if type(layer.proj) is not nn.Linear or not _applies(layer.proj, inputs):
        return plain(inputs, *rest, **more)
    found: Tensor = _Geglu.apply(inputs, layer.proj.weight, layer.proj.bias)  # type: ignore[no-untyped-call]
    return found


class _Geglu(torch.autograd.Function):
    """diffusers' `GEGLU.forward`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.bias, ctx.autocast = weight, bias, autocast_dtype(inputs.device)
        hidden, gate = F.linear(inputs, weight, bias).chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        with autocast_as(inputs.device, ctx.autocast):
            both = F.linear(inputs, ctx.weight, ctx.bias)
            hidden, gate = both.chunk(2, dim=-1)
            to_hidden, to_gate = (found := torch.empty_like(both)).chunk(2, dim=-1)
            torch.mul(upstream[0], F.gelu(gate), out=to_hidden)
            torch.mul(upstream[0], hidden, out=to_gate)
            to_gate.copy_(torch.ops.aten.gelu_backward(to_gate, gate))
            return (found @ ctx.weight).to(inputs.dtype), None, None
