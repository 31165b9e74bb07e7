"""`pipeline.options` of a family change the image, and `pipe(...)` takes them under the names that `call` gives."""

from __future__ import annotations

import parity
import pytest
import torch
from parity import ours, reference

OPTIONS = [
    ("sana", {"complex_human_instruction": []}),
    ("sana", {"complex_human_instruction": ["a red", "dog:"]}),
    ("sana", {"max_sequence_length": 20}),
    ("lumina_2", {"system_prompt": "a red dog"}),
    ("lumina_2", {"cfg_normalization": False}),
    ("lumina_2", {"max_sequence_length": 40}),
]
FAMILIES = parity.families()


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_an_option_means_what_the_pipelines_own_argument_means(name, options):
    family = FAMILIES[name]
    case, size = family.cases[-1], family.sizes[0]
    pipe = family.make()
    adapter = family.adapter(pipe, family.adapter.Config(**options))
    call = adapter.call(case.guidance)
    assert {k: call[k] for k in options} == options
    found = ours(adapter, case, size)
    assert torch.equal(found, reference(pipe, parity.Case("options", case.guidance, call), size))
    (option,) = options
    if option != "max_sequence_length":  # the padding is masked
        assert (found - ours(family.adapter(pipe), case, size)).abs().max() > 1e-4
