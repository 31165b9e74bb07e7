"""A scorer made ready for training: loaded, thawed or given adapters. Every task that trains one builds it here."""

from __future__ import annotations

from typing import Any

import torch

from rewardtune.diffusion import lora
from rewardtune.errors import RecipeError
from rewardtune.recipe.sections import ScorerSection, TrainSection
from rewardtune.scorer.model import Scorer, load_scorer
from rewardtune.training import runtime

# every linear layer of the language model, of either kind of attention; the vision tower stays as it is
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv",
                "in_proj_z", "out_proj")  # fmt: skip


def trainable_scorer(section: ScorerSection, *, train: TrainSection, device: str) -> Scorer:
    """The scorer of a recipe with trainable parameters: adapters where `lora` is given, else the whole model."""
    scorer = load_scorer(
        section.model, revision=section.revision, rubric=section.rubric, min_pixels=section.min_pixels,
        max_pixels=section.max_pixels, dtype=getattr(torch, section.dtype), device=loading_place(train, device),
        to_train=True,
    )  # fmt: skip
    model: Any = scorer.model
    if section.lora is not None:
        if "modules" in section.lora.model_fields_set:
            raise RecipeError("scorer.lora.modules: a scorer is one module; leave `modules` out and name `targets`.")
        present = {path.rpartition(".")[2] for path, _ in model.named_modules() if "visual" not in path}
        targets = section.lora.targets or [t for t in LORA_TARGETS if t in present]
        rank = section.lora.rank
        lora.attach(
            {"scorer": model}, rank=rank, alpha=section.lora.alpha or rank, targets={"scorer": targets},
            seed=train.seed,
        )  # fmt: skip
    else:
        model.requires_grad_(True)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        # transformers checkpoints in training mode only
        model.train()
    return scorer


def loading_place(train: TrainSection, device: str) -> str:
    """Where weights are made: in main memory where they are split, since FSDP takes one block at a time from there to
    the device, which may not hold the whole."""
    return "cpu" if train.shard and runtime.process()[1] > 1 else device
