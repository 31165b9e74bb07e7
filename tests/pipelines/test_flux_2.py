"""What the pipelines of FLUX.2 cannot do is said, not left out silently."""

from __future__ import annotations

import pytest
from families import flux_2_klein
from rewardtune.pipelines.flux_2 import Flux2

from rewardtune.errors import RecipeError
from rewardtune.plugins import Guidance


def test_a_negative_prompt_is_refused():
    adapter = Flux2(flux_2_klein.make())
    with pytest.raises(RecipeError, match="negative_prompt"):
        adapter.encode(["dog"], Guidance("full", 4.0, "red"))
