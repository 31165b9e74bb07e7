"""What every family is held to: our step-by-step roll-out against diffusers' own `pipe(...)`, real classes, fp32.

One file of `families/` a family: a small pipeline of the real classes with random weights, the calls that mean the same
to both sides, and diffusers' training formulas written out. `test_parity.py` runs the checks and writes docs/parity.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardtune.diffusion.rollout import Chain, sample
from rewardtune.plugins import Guidance

PROMPTS = ["dog", "two birds on the left of a red cat and one very long prompt"]
STEPS = 4


@dataclass(frozen=True)
class Case:
    """Settings that both sides understand."""

    label: str
    guidance: Guidance
    call: Mapping[str, Any]
    """Keyword arguments of `pipe(...)`, `negative_prompt` as one string."""


@dataclass(frozen=True)
class Family:
    """A family under test. The first case without guidance and the last, guided one serve the gradient checks."""

    title: str
    """As in docs/parity.md, with what tells its checkpoints apart."""
    adapter: type
    make: Callable[[], Any]
    """A small pipeline with the scheduler class and settings of the published checkpoint."""
    cases: Sequence[Case]
    perturbations: Sequence[tuple[str, str, Any]]
    """(component, config key or path of a buffer, other value): constants that the adapter must read; each is changed
    in turn, a buffer in all its entries. The component `pipeline` is the pipeline itself."""
    training: Callable[[Any, Tensor, Tensor, Tensor, Sequence[str]], tuple[Tensor, Tensor]] | None
    """(pipe, clean, noise, u, prompts) -> prediction and target of diffusers' training script, written out."""
    latents: Callable[[Any, Tensor], Tensor] | None
    """(pipe, images in [0, 1]) -> the latents that diffusers' training script trains on, posterior mode."""
    unpack: Callable[[Any, Tensor, tuple[int, int]], Tensor] | None = None
    """(pipe, result of `pipe(..., output_type="latent")`, size) -> the adapter's latents; None where they are equal."""
    sizes: Sequence[tuple[int, int]] = ((16, 16), (16, 24))
    bound: float = 0.0
    """Largest difference of an image; above 0 only with a reason in `why`."""
    why: str = ""
    difference: float = 2e-2
    """The step of the finite differences: short where a network has kinks."""
    lora_modules: Sequence[str] = field(default_factory=tuple)
    """Modules whose adapters are exported and loaded again; the denoiser when empty."""


def families() -> dict[str, Family]:
    """Name of the file (a family and, where it has several published kinds, the kind) -> Family."""
    folder = Path(__file__).parent / "families"
    names = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    return {name: import_module(f"families.{name}").FAMILY for name in names}


def generators(count: int = len(PROMPTS)) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7 + i) for i in range(count)]


def reference(pipe: Any, case: Case, size: tuple[int, int], **more: Any) -> Any:
    """`pipe(...)`'s images, (B, 3, H, W)."""
    return pipe(**arguments(case, size), output_type="pt", **more).images


def arguments(case: Case, size: tuple[int, int], steps: int = STEPS) -> dict[str, Any]:
    call = dict(case.call)
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * len(PROMPTS)
    return {
        "prompt": list(PROMPTS), "height": size[0], "width": size[1], "num_inference_steps": steps,
        "generator": generators(), **call,
    }  # fmt: skip


def ours(adapter: Any, case: Case, size: tuple[int, int]) -> Tensor:
    return sample(adapter, PROMPTS, generators(), num_steps=STEPS, guidance=case.guidance, size=size)


def chain(adapter: Any, guidance: Guidance, size: tuple[int, int], prompts: Sequence[str] = PROMPTS) -> Chain:
    conditioning = adapter.encode(prompts, guidance)
    return Chain(adapter, conditioning, num_steps=STEPS, guidance=guidance, size=size)


def parameters(adapter: Any) -> list[Tensor]:
    return list(adapter.trainable[adapter.denoiser].parameters())


def gradient(adapter: Any, run: Callable[[], Tensor]) -> Tensor:
    """d mean(images^2) / d denoiser, flat; `run` gives finished latents."""
    weights = parameters(adapter)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        value = adapter.decode(run()).pow(2).mean()
        parts = torch.autograd.grad(value, weights, allow_unused=True)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(parts, weights, strict=True)])
