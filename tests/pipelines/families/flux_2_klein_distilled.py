"""FLUX.2 Klein, distilled: a scale of guidance is ignored, as the pipeline ignores it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from parity import Case

from families.flux_2_klein import CONSTANTS, make
from families.flux_2_klein import FAMILY as BASE
from rewardtune.plugins import Guidance

FAMILY = replace(
    BASE,
    title="FLUX.2 Klein, distilled",
    make=partial(make, is_distilled=True),
    cases=[Case("ignored", Guidance("detached-negative", 4.0), {})],
    perturbations=[*CONSTANTS, ("pipeline", "is_distilled", False)],
)
