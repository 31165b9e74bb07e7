"""Sana 1.5: Sana with norms on queries and keys."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from families.sana import FAMILY as FIRST
from families.sana import make

FAMILY = replace(FIRST, title="Sana 1.5", make=partial(make, qk_norm="rms_norm_across_heads"))
