"""Stable Diffusion 3.5 medium: a second attention in some blocks, normalised queries and keys."""

from __future__ import annotations

from dataclasses import replace

import tiny

from families.stable_diffusion_3 import FAMILY as FIRST


def make():
    return tiny.stable_diffusion_3(transformer={"dual_attention_layers": (0,), "qk_norm": "rms_norm"})


FAMILY = replace(FIRST, title="Stable Diffusion 3.5", make=make)
