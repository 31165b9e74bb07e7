"""FLUX.1-schnell: a fixed schedule without shift, no embedded guidance."""

from __future__ import annotations

from dataclasses import replace

from parity import Case

from families.flux import FAMILY as DEV
from families.flux import build
from rewardtune.plugins import Guidance


def make():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15, num_train_timesteps=1000,
        shift=1.0, use_dynamic_shifting=False,
    )  # fmt: skip
    return build(scheduler, guidance_embeds=False)


FAMILY = replace(
    DEV,
    title="FLUX.1-schnell",
    make=make,
    cases=[
        Case("off", Guidance("off"), {"true_cfg_scale": 1.0}),
        Case("negative", Guidance("full", 3.0, "red"), {"true_cfg_scale": 3.0, "negative_prompt": "red"}),
        Case("guided", Guidance("full", 2.0), {"true_cfg_scale": 2.0, "negative_prompt": ""}),
    ],
    perturbations=[
        ("vae", "scaling_factor", 0.61),
        ("vae", "shift_factor", 0.12),
        ("scheduler", "shift", 1.5),
        ("scheduler", "use_dynamic_shifting", True),
    ],
)
