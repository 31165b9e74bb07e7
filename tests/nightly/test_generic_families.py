"""`family: generic` beside the own call of each pipeline of diffusers that could be made small: images and gradients.

Real classes with small random weights, in fp32. Two packages that diffusers wants are stood in for where they are
missing: ftfy, with which PRX cleans prompts, and sentencepiece, without which Kolors' classes are not imported.
Processors of text and pictures are tokenizers of words here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.prx import pipeline_prx, pipeline_prx_pixel
from generic_families import FULL, LAST_STEP, REFUSED, WORK, Family
from parity import PROMPTS, STEPS, generators, gradient
from rewardtune.pipelines.generic import Generic
from test_generic import Raw, arguments, difference, roll_out
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from rewardtune.diffusion.rollout import sample
from rewardtune.diffusion.watched_call import replaced
from rewardtune.errors import RecipeError
from rewardtune.plugins import Guidance

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
PAGE = Path(__file__).parents[2] / "docs/pipelines.md"
MEMORIES = ("fast", "flat")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for pipeline in (pipeline_prx, pipeline_prx_pixel):
        if not hasattr(pipeline, "ftfy"):
            monkeypatch.setattr(pipeline, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    if find_spec("sentencepiece") is None:
        module: Any = ModuleType("sentencepiece")
        module.__spec__, module.SentencePieceProcessor = ModuleSpec("sentencepiece", None), object
        monkeypatch.setitem(sys.modules, "sentencepiece", module)


def reference(call: Callable[..., Any], family: Family, adapter: Generic, guidance: Guidance) -> Tensor:
    """Images of the pipeline's own call, in the colours in which it shows them."""
    given = arguments(adapter, guidance, family.size)
    rows = [slice(i, i + 1) for i in range(len(PROMPTS))] if family.one_by_one else [slice(None)]
    images = []
    for row in rows:
        own = {name: given[name][row] for name in ("prompt", "negative_prompt", "generator") if name in given}
        with nullcontext() if guidance.mode == "full" else unguided(adapter.pipe):
            images.append(call(adapter.pipe, **{**given, **own}, return_dict=False)[0])
    found = torch.cat(images)
    if family.signed:
        found = (found / 2 + 0.5).clamp(0, 1)
    colours, opaque = found[:, :3], found[:, 3:]  # the latter of none where nothing is transparent
    return 1 - opaque * (1 - colours) if opaque.numel() else colours


@contextmanager
def unguided(pipe: Any) -> Iterator[None]:
    """Inside, the parts that guide are off, in pipelines that leave it to parts of their own."""
    parts = [part for part in pipe.components.values() if isinstance(part, diffusers.BaseGuidance)]
    for part in parts:
        part.disable()
    yield
    for part in parts:
        part.enable()


def plain(pipe: Any) -> Callable[..., Any]:
    """The pipeline's call, without the `no_grad` around it."""
    return inspect.unwrap(type(pipe).__call__)


@contextmanager
def cut_before_the_last_step(pipe: Any) -> Iterator[None]:
    """Inside, what goes into a call's last step has no graph: the scheduler gives it detached."""
    step, taken = pipe.scheduler.step, count(1)

    @wraps(step)  # pipelines ask for its signature
    def cut(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        if next(taken) % STEPS != STEPS - 1:
            return found
        if isinstance(found, tuple):
            return (found[0].detach(), *found[1:])
        found.prev_sample = found.prev_sample.detach()
        return found

    with replaced(pipe.scheduler, "step", cut):
        yield


def draw(family: Family, adapter: Generic, guidance: Guidance, memory: str, last_steps: Any = "all") -> Tensor:
    return gradient(Raw(adapter), lambda: roll_out(adapter, guidance, last_steps, memory, family.size))


@pytest.mark.parametrize("name", [*WORK, *LAST_STEP])
def test_images_equal_the_pipelines(name: str) -> None:
    family = {**WORK, **LAST_STEP}[name]
    adapter = family.adapter()
    for guidance in family.guidances:
        found = sample(adapter, PROMPTS, generators(), num_steps=STEPS, guidance=guidance, size=family.size)
        with torch.no_grad():
            wanted = reference(type(adapter.pipe).__call__, family, adapter, guidance)
        assert found.shape == (len(PROMPTS), 3, *family.size) and found.std() > 1e-3
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", WORK)
def test_full_chain_gradient_equals_autograd_through_the_call(name: str) -> None:
    family = WORK[name]
    adapter = family.adapter()
    call = plain(adapter.pipe)
    for guidance in family.without_negative:
        wanted = gradient(Raw(adapter), lambda g=guidance: reference(call, family, adapter, g))
        for memory in family.memories:
            assert difference(draw(family, adapter, guidance, memory), wanted) <= 1e-5


@pytest.mark.parametrize("name", WORK)
def test_gradient_of_the_last_step_is_that_of_a_call_cut_before_it(name: str) -> None:
    """But for what else comes from earlier steps (Qwen-Image 2.1's cache of the text's keys, the momentum of a guiding
    part): there it has no gradient here, and has one in a call whose latents alone are cut."""
    family = WORK[name]
    adapter = family.adapter()
    call = plain(adapter.pipe)
    for guidance in family.without_negative:
        with cut_before_the_last_step(adapter.pipe):
            wanted = gradient(Raw(adapter), lambda g=guidance: reference(call, family, adapter, g))
        for memory in MEMORIES:
            found = difference(draw(family, adapter, guidance, memory, 1), wanted)
            assert found > 1e-3 if family.keeps else found <= 1e-5
        assert difference(draw(family, adapter, guidance, "fast"), wanted) > 1e-3


@pytest.mark.parametrize("name", LAST_STEP)
def test_where_calls_work_in_place_only_the_last_step_has_a_gradient(name: str) -> None:
    """The way back through all of them breaks off, as it does for plain autograd. Nothing in the call shows it before:
    so it is torch that tells."""
    family = LAST_STEP[name]
    adapter = family.adapter()
    call = plain(adapter.pipe)
    for guidance in family.without_negative:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(Raw(adapter), lambda g=guidance: reference(call, family, adapter, g))
        for memory in MEMORIES:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                draw(family, adapter, guidance, memory)
        found = draw(family, adapter, guidance, "flat", 1)
        assert difference(found, draw(family, adapter, guidance, "fast", 1)) <= 1e-5


def test_a_denoiser_that_is_switched_during_the_call_is_not_run_again() -> None:
    """GLIGEN's boxes count in the first steps only: torch notices that another function is run on the way back."""
    family = WORK["GLIGEN"]
    with pytest.raises(CheckpointError, match="different number of tensors"):
        draw(family, family.adapter(), FULL, "flat")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused(name: str) -> None:
    family, guidance, why = REFUSED[name]
    with pytest.raises(RecipeError, match=why):
        draw(family, family.adapter(), guidance, "fast")


def test_the_page_lists_them() -> None:
    page = " ".join(PAGE.read_text().split())
    assert not [name for name in (*WORK, *LAST_STEP, *REFUSED) if name.partition(",")[0] not in page]
