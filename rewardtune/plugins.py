"""The contracts of the two kinds of plug-in: rewards and pipelines. Plug-ins import the engine, never each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from rewardtune.types import Score


class Options(BaseModel):
    """Base of a plug-in's `Config`: what a recipe may write under `options:`. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class RewardCard:
    """What is known of a reward without loading it. Plain data: reading it imports no torch."""

    name: str
    summary: str
    differentiable: bool
    needs_prompt: bool
    range: tuple[float, float] | None
    """Smallest and largest value, None when unbounded."""
    scale: float = 1.0
    """Values are divided by this before several rewards are mixed."""
    higher_is_better: bool = True
    native_resolution: int | None = None
    licence_code: str = "not stated"
    licence_weights: str = "none"
    requires: tuple[str, ...] = ()
    """Modules that must be importable, e.g. ("transformers",)."""
    extra: str | None = None
    """The pip extra that brings `requires`."""
    held_out: bool = False
    """True for judges that no shipped recipe trains on."""
    dimensions: tuple[str, ...] = ()
    models: Mapping[str, str] = ()  # type: ignore[assignment]
    """Model -> revision. A model is a hub id, `pocket:<name>`, `<file> (<package>)` where an installed package has it,
    `github.com/...` where it is fetched from an address, or, with revision `local`, what an option names."""
    metadata: tuple[str, ...] = ()
    """Keys that each prompt's metadata must have, e.g. ("text",)."""
    commercial_use: bool = True
    """False where the licence of the code or of the weights forbids it."""
    pillow_difference: float | None = 0.05
    """Largest difference, over `scale`, that the checks allow between the value of a picture and that of the same one
    rounded to bytes and resized to `native_resolution` by Pillow; None where it is only reported, as for a reward that
    counts. The default is ours."""
    gpu_memory_gib: float | None = None
    """Of the weights in the default dtype, None where they are next to nothing."""
    reference: str = ""
    """Whose numbers these are: paper, and repository with commit."""
    known_when_loaded: bool = False
    """True where the card of the class stands for any reward: what it says holds only once one is loaded."""


@runtime_checkable
class Reward(Protocol):
    """A reward that is loaded. Built by a plug-in's `load(config, device)`.

    A reward plug-in is a class with three class-level members: `card: RewardCard`, `Config: type[Options]` and
    `load(cls, config, *, device) -> Reward` (classmethod). Its module keeps torch, transformers and diffusers out of
    module level.
    """

    card: RewardCard

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """Score images.

        images: (B, 3, H, W) float in [0, 1], on the reward's device, with graph where the caller wants a gradient;
        a differentiable reward returns `value` with graph, any other under no_grad. prompts: B strings
        (`types.Prompt` where metadata is known). Each value depends on its own image and prompt only.
        """
        ...


GuidanceMode = Literal["full", "detached-negative", "off"]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance during a roll-out.

    mode `full`: gradient through both branches; `detached-negative`: the negative branch runs without gradient;
    `off`: one branch, `scale` unused. `scale` means what the family's own pipeline means by the scale of its
    classifier-free guidance (`guidance_scale`, or `true_cfg_scale` where that one is embedded). `embedded`: the
    guidance that a distilled denoiser takes as an input; the family's own default when None, unused elsewhere.
    """

    mode: GuidanceMode = "full"
    scale: float = 0.0
    negative_prompt: str = ""
    embedded: float | None = None


class LoadedPipeline(Protocol):
    """What a checkpoint's pipeline gives, however it samples: as a `Pipeline`, or as a `WholeRollout`.

    A pipeline plug-in is a class with `family: str`, `matches(model_index: Mapping) -> bool` (classmethod; reads the
    dict of `model_index.json`), `Config: type[Options]` and `load(cls, path, config, *, revision, dtype, device)`,
    which makes one of the two. No LoRA, EMA or accelerate code lives here.

    Two more class methods tell before a weight is loaded what would be refused afterwards, and may be left out where
    only the loaded pipeline can tell. Neither imports torch.
    `size_multiple_of(configs) -> int`: `size_multiple` by the `config.json` of each part, under its name in
    `model_index.json`; a KeyError counts as not known.
    `refuses(model_index) -> str | None`: why a checkpoint cannot be run that `pipeline.family` names the family for, to
    follow the name of its class: "makes videos, and rewards score single images".
    """

    family: str
    pipe: Any
    """The diffusers pipeline itself; its modules are the ones trained."""
    scheduler: Any
    """The checkpoint's own scheduler."""
    denoiser: str
    """Which of `trainable` predicts: transformer, or unet."""
    comfyui: Literal["diffusers", "kohya"] | Mapping[str, Sequence[str]] | None
    """Whose names of adapters ComfyUI accepts for the family; None where it is not known to accept any. A mapping for
    its own layers' names: each of those -> the denoiser's layers whose rows it has, in order, with # for the number of
    the block."""
    image_size: tuple[int, int]
    """Height and width that a recipe gets when it names none."""
    size_multiple: int
    """What height and width must be multiples of."""
    trainable: Mapping[str, nn.Module]
    """Name in `model_index.json` -> module that may be trained, e.g. transformer, text_encoder."""
    lora_targets: Mapping[str, Sequence[str]]
    """For each trainable module: names of the linear layers that LoRA adapts by default."""

    def call(self, guidance: Guidance) -> dict[str, Any]:
        """The keyword arguments with which `pipe(...)` samples alike: guidance, and the family's options."""
        ...


class Pipeline(LoadedPipeline, Protocol):
    """A diffusers text-to-image pipeline, taken apart so that single steps can carry gradient."""

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Any:
        """Prompts -> conditioning, opaque to the engine. Carries gradient where a text encoder is trained."""
        ...

    def join(self, parts: Sequence[Any]) -> Any:
        """Conditionings of single prompts -> that of a batch of them, as `encode` pads it; beside it they may differ by
        the rounding of another batch size alone. `diffusion/conditioning.py` has `stacked` for the plain case.

        A conditioning is made of tensors, in data classes, mappings and lists. A family that leaves `join` out has its
        prompts encoded for every batch anew.
        """
        ...

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        """One generator an image -> standard normal latents (B, ...), equal to what `pipe(generator=[...])` draws
        before its scheduler scales them."""
        ...

    def timesteps(self, num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
        """A fresh scheduler of the checkpoint's class, set up as `pipe(...)` does, and its T timesteps."""
        ...

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Any, guidance: Guidance) -> Tensor:
        """The denoiser's output after guidance, in the sign and parameterisation that `scheduler.step` takes.

        `latents`: as the denoiser takes them, so after `scheduler.scale_model_input`. `timestep`: scalar, or (B,) for
        training at mixed noise levels.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images (B, 3, H, W), differentiable, *not* clamped: [0, 1] plus the decoder's overshoot."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> latents (posterior mode), no gradient: the inverse of `decode`."""
        ...


@runtime_checkable
class WholeRollout(LoadedPipeline, Protocol):
    """A diffusers text-to-image pipeline that can only be run as a whole: enough for methods that choose steps, not for
    those that need one prediction, an encoder of images or conditioning by themselves."""

    def rollout(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_steps: int,
        guidance: Guidance,
        size: tuple[int, int],
        gradient_steps: Callable[[int], range],
        recompute: bool,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], equal to `pipe(prompts, generator=generators)`, with graph where enabled.

        gradient_steps: the number of denoising steps -> those that carry gradient, the last few of them; called at most
        once a roll-out, for it may draw. recompute: run those again on the way back, instead of keeping their graph.
        """
        ...


AnyPipeline = Pipeline | WholeRollout
