"""What every section of a recipe has in common."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _is_device(name: str) -> str:
    if re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) is None:
        raise ValueError(f"{name!r} is no device; write cpu, cuda, cuda:1 or mps")
    return name


Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Device = Annotated[str, AfterValidator(_is_device)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors and docstrings are the reference page."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
