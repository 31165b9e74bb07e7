"""What every section of a recipe has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors and docstrings are the reference page."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
