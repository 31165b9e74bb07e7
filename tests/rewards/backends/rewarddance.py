"""`rewarddance`: a scorer that compares, small, and a reference picture for each prompt."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from backend import Backend
from reference_numbers import uniform
from tiny_scorer import write_comparer

from rewardtune.data.images import to_pil
from rewardtune.types import Prompt


@cache
def prompts() -> tuple[Prompt, ...]:
    folder = Path(tempfile.mkdtemp())
    made = []
    for i, text in enumerate(("a red dog", "two cats on a mat", "a cat", "a blue house")):
        file = folder / f"{i}.png"
        to_pil(uniform(f"reference {i}", (1, 3, 32, 32)))[0].save(file)
        made.append(Prompt(text, {"reference": str(file)}))
    return tuple(made)


BACKEND = Backend(
    "rewarddance",
    lambda folder: {"checkpoint": str(write_comparer(folder, layers=["linear_attention", "full_attention"]))},
    prompts=prompts,
)
