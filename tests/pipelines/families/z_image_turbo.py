"""Z-Image-Turbo: shift 3, distilled, so without guidance."""

from __future__ import annotations

from dataclasses import replace

import tiny
from parity import Case

from families.z_image import FAMILY as BASE
from rewardtune.plugins import Guidance

FAMILY = replace(
    BASE,
    title="Z-Image-Turbo",
    make=tiny.z_image,
    cases=[Case("off", Guidance("off"), {"guidance_scale": 0.0})],
)
