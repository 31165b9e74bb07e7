"""Stable Diffusion 2.1: DDIM, v-prediction."""

from __future__ import annotations

from dataclasses import replace

import tiny

from families.stable_diffusion import FAMILY as FIRST


def make():
    from diffusers import DDIMScheduler

    return tiny.stable_diffusion(
        DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
            clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        )
    )  # fmt: skip


FAMILY = replace(
    FIRST,
    title="Stable Diffusion 2.1",
    make=make,
    perturbations=[*FIRST.perturbations, ("scheduler", "prediction_type", "epsilon")],
)
