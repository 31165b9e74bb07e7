"""Stable Diffusion XL as retrained with v-prediction and zero terminal SNR (NoobAI's model card names the scheduler).

Beside it the settings in which other checkpoints of the family differ from the first: an empty text instead of zeros,
and an autoencoder with a mean and a deviation of each channel, as Playground 2.5 brings.
"""

from __future__ import annotations

from dataclasses import replace

import tiny

from families.stable_diffusion_xl import FAMILY as FIRST


def make():
    from diffusers import EulerDiscreteScheduler

    return tiny.stable_diffusion_xl(
        EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
            interpolation_type="linear", steps_offset=1, timestep_spacing="leading",
            prediction_type="v_prediction", rescale_betas_zero_snr=True,
        ),
        force_zeros=False,
        vae={"latents_mean": (-1.6, 1.1, 0.3, -2.0), "latents_std": (8.4, 5.9, 5.3, 5.3)},
    )  # fmt: skip


FAMILY = replace(
    FIRST,
    title="Stable Diffusion XL, v-prediction",
    make=make,
    perturbations=[
        ("vae", "scaling_factor", 0.61),
        ("vae", "latents_mean", (-1.6, 1.1, 0.3, -2.1)),
        ("vae", "latents_std", (8.4, 5.9, 5.3, 5.5)),
        ("scheduler", "steps_offset", 0),
        ("scheduler", "prediction_type", "epsilon"),
        ("scheduler", "rescale_betas_zero_snr", False),
        ("pipeline", "force_zeros_for_empty_prompt", True),
    ],
)
