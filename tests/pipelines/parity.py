"""What every family is held to: our step-by-step roll-out against diffusers' own `pipe(...)`, real classes, fp32.

One file of `families/` a family: a small pipeline of the real classes with random weights, the calls that mean the same
to both sides, and diffusers' training formulas written out. `test_parity.py` runs the checks and writes docs/parity.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

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
    """How far along a direction the loss is smooth, less where a network has kinks: finite differences step a hundredth
    of it."""
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


def whole_call(pipe: Any, case: Case, size: tuple[int, int], steps: int = STEPS) -> Tensor:
    """`pipe(...)`'s images with graph, not clamped: the whole of its call, decoder and all, but for the two things that
    cut a graph, `no_grad` around it and the image processor behind it."""
    call = type(pipe).__call__.__wrapped__
    with mock.patch.object(pipe.image_processor, "postprocess", lambda image, *_, **__: image):
        images: Tensor = call(pipe, **arguments(case, size, steps), output_type="pt").images
    return images / 2 + 0.5


def chain(
    adapter: Any, guidance: Guidance, size: tuple[int, int], prompts: Sequence[str] = PROMPTS, steps: int = STEPS
) -> Chain:
    conditioning = adapter.encode(prompts, guidance)
    return Chain(adapter, conditioning, num_steps=steps, guidance=guidance, size=size)


def parameters(adapter: Any) -> list[Tensor]:
    return list(adapter.trainable[adapter.denoiser].parameters())


def gradient(adapter: Any, run: Callable[[], Tensor]) -> Tensor:
    """d mean(images^2) / d denoiser, flat; `run` gives finished latents."""
    return images_gradient(adapter, lambda: adapter.decode(run()))[1]


def images_gradient(adapter: Any, draw: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Images, and d mean(images^2) / d denoiser, flat; `draw` gives images that are not clamped."""
    weights = parameters(adapter)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        images = draw()
        parts = torch.autograd.grad(images.pow(2).mean(), weights, allow_unused=True)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    flat = [(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(parts, weights, strict=True)]
    return images.detach(), torch.cat(flat)


@contextmanager
def double() -> Iterator[None]:
    """Whoever casts to fp32 gets float64: our adapters, diffusers' layers and its schedulers all do, and one such place
    left over would drown a finite difference in its rounding."""
    to = torch.Tensor.to

    def widened(tensor: Tensor, *values: Any, **named: Any) -> Tensor:
        wide = [torch.float64 if v is torch.float32 else v for v in values]
        return to(tensor, *wide, **{k: torch.float64 if v is torch.float32 else v for k, v in named.items()})

    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), mock.patch.object(torch.Tensor, "to", widened):
        yield


@dataclass(frozen=True)
class Change:
    """A mistake put into an adapter, as its author could have made it."""

    label: str
    make: Callable[[Any], Any]
    """adapter -> what takes the place of its method `method`."""
    method: str
    noticed: Sequence[str]
    """The checks that must fail: those whose values the method goes into."""


def _predict(change: Callable[[Callable[..., Tensor], Tensor, Tensor, Any, Guidance], Tensor]) -> Callable[[Any], Any]:
    return lambda adapter: lambda *inputs, own=adapter.predict: change(own, *inputs)


def _noise_levels(adapter: Any) -> Any:
    own = adapter.timesteps

    def changed(num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
        scheduler, timesteps = own(num_steps, size)
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = scheduler.sigmas * 0.999
        else:
            scheduler.alphas_cumprod = scheduler.alphas_cumprod**0.999
        return scheduler, timesteps

    return changed


def _stronger(guidance: Guidance) -> Guidance:
    embedded = guidance.embedded and guidance.embedded * 1.001
    return replace(guidance, scale=guidance.scale * 1.001, embedded=embedded)


def changes(adapter: Any, guidance: Guidance) -> list[Change]:
    """What every family's checks must notice. Downwards, so that no time leaves its range."""
    everywhere, sampling = ("image", "gradient", "SFT loss"), ("image", "gradient")
    found = [
        Change("time x 0.999", _predict(lambda own, x, t, c, g: own(x, t * 0.999, c, g)), "predict", everywhere),
        Change("the prediction's sign", _predict(lambda own, *inputs: -own(*inputs)), "predict", everywhere),
        Change("the denoiser's input x 0.999", _predict(lambda own, x, *r: own(x * 0.999, *r)), "predict", everywhere),
        Change(
            "columns mirrored before packing and after unpacking",
            _predict(lambda own, x, *rest: own(x.flip(-1), *rest).flip(-1)), "predict", everywhere,
        ),
        Change(
            "prompts in another order", lambda a: lambda prompts, g, own=a.encode: own(prompts[::-1], g), "encode",
            everywhere,
        ),
        Change("the starting noise x 0.999", lambda a: lambda *i, own=a.noise: own(*i) * 0.999, "noise", sampling),
        Change("the scheduler's noise levels x 0.999", _noise_levels, "timesteps", sampling),
        Change("the decoder's input x 0.999", lambda a: lambda x, own=a.decode: own(x * 0.999), "decode", sampling),
        Change(
            "the encoder's latents x 0.999", lambda a: lambda x, own=a.encode_images: own(x) * 0.999, "encode_images",
            ("SFT loss",),
        ),
    ]  # fmt: skip
    if adapter.call(guidance) != adapter.call(_stronger(guidance)):  # else the family takes no notice of it
        stronger = _predict(lambda own, x, t, c, g: own(x, t, c, _stronger(g)))
        found.append(Change("guidance x 1.001", stronger, "predict", sampling))
    return found
