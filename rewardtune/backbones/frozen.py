"""A network that judges and is not trained: frozen, without dropout, and recomputed on the way back where asked."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def freeze(model: nn.Module, *, gradient_checkpointing: bool = False) -> None:
    """No gradient for weights, eval mode; with checkpointing, blocks keep their inputs only and run again backward.

    transformers recomputes in training mode only, which a frozen judge never is in (measured: in eval mode the switch
    saves nothing). A block's own flag is therefore set to training, that of everything inside it stays eval, so no
    dropout comes back. A later `model.eval()` would undo it.
    """
    model.requires_grad_(False).eval()
    if not gradient_checkpointing:
        return
    for module in model.modules():
        # BLIP's text encoder does not allow it, and is a small part of what BLIP keeps
        if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    assert blocks, f"{type(model).__name__} has no blocks that can be recomputed"
    for block in blocks:
        block.training = True
