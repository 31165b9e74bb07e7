"""Any other text-to-image pipeline of diffusers: its own `__call__`, run as a whole, with gradient where it is wanted.

Chosen with `pipeline.family: generic`. It serves what only rolls out: DRaFT, AlignProp, samples, `compare`. It knows
nothing of the pipeline but the names that all of them share, and refuses what it cannot do, rather than to train on
nothing.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from rewardtune.diffusion import pipeline_source
from rewardtune.diffusion.schedulers import fresh
from rewardtune.diffusion.watched_call import WatchedCall, replaced, seeded
from rewardtune.errors import RecipeError
from rewardtune.plugins import Guidance, Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type", "return_dict")
_VIDEO = ("num_frames", "video", "video_length", "num_videos_per_prompt", "frames")
_START = ("strength", "mask_image", "control_image", "control_guidance_start", "controlnet_conditioning_scale")
_PICTURES = ("image", "images", "input_images", "reference_image")
_EMBEDDED = ("distilled_guidance_scale", "guidance_scale")
_USUAL = ("to_q", "to_k", "to_v", "to_out.0")
_ATTENTION = re.compile(r"Att(ention|n)(?!.*Pool)")
_OURS = {*_NEEDED, *_EMBEDDED, "true_cfg_scale", "negative_prompt", "num_images_per_prompt", "latents"}


class Generic:
    """See `plugins.WholeRollout`."""

    family = "generic"
    comfyui = None

    class Config(Options):
        """Options of the family."""

        call: dict[str, Any] = Field(default_factory=dict)
        """More keyword arguments of the pipeline's call, such as max_sequence_length."""
        size: tuple[int, int] | None = None
        """Height and width that a recipe gets when it names none; the pipeline's own when left out."""
        one_by_one: bool = False
        """Whether each prompt has a call of its own, for pipelines that take one prompt or mix those of a list."""
        signed: bool = False
        """Whether the call gives values from -1 to 1 for output_type="pt", and converts them for pictures only."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """nothing: any text-to-image pipeline, where pipeline.family names it."""
        return False

    @classmethod
    def refuses(cls, model_index: Mapping[str, Any]) -> str | None:
        """See `plugins.LoadedPipeline`: what `__init__` will refuse of diffusers' own classes."""
        name, known = model_index.get("_class_name"), pipeline_source.classes()
        if not isinstance(name, str) or not known:
            return None  # somebody's own class, or no source to read
        if name not in known:
            return f"is not among the pipelines of diffusers {version('diffusers')}, which is installed"
        return _no_text_to_image(
            pipeline_source.parameters(name, "__call__"),
            pipeline_source.parameters(name, "__init__"),
            listed=name in pipeline_source.text_to_image(),
        )

    @classmethod
    def load(cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str) -> Generic:
        from diffusers import DiffusionPipeline

        try:
            _check_packages(DiffusionPipeline.load_config(path, revision=revision).get("_class_name"))
            pipe = DiffusionPipeline.from_pretrained(path, revision=revision, dtype=dtype, use_safetensors=True)
        except ImportError as error:
            raise RecipeError(f"pipeline.family generic: {path} needs a package: {str(error).strip()}") from error
        return cls(pipe.to(device), config)

    def __init__(self, pipe: Any, config: Config | None = None) -> None:
        self.pipe = pipe
        self.options = config or self.Config()
        # the outermost decorator is no_grad, and others may lie below it
        self._function = inspect.unwrap(type(pipe).__call__)
        self._parameters = inspect.signature(self._function).parameters
        self.denoiser = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
        self._check_kind()
        for name in self.options.call:
            if name in _OURS or name not in self._parameters:
                raise RecipeError(
                    f"pipeline.options.call: {name!r} is "
                    + ("set by the recipe itself" if name in _OURS else f"no argument of {type(pipe).__name__}")
                    + f". There are: {', '.join(n for n in self._parameters if n not in _OURS and n != 'self')}."
                )
        # they blacken or mark images, outside of any graph
        self._without = [name for name in ("safety_checker", "watermark") if getattr(pipe, name, None) is not None]
        for name in self._without:
            setattr(pipe, name, None)
        self.scheduler = fresh(pipe.scheduler)
        self.image_size = self.options.size or self._own_size()
        processor = getattr(pipe, "image_processor", None)
        factor = processor.config.get("vae_scale_factor") if processor is not None else None
        self.size_multiple = factor or getattr(pipe, "vae_scale_factor", 1)
        module = getattr(pipe, self.denoiser)
        self.trainable = {self.denoiser: module}
        self.lora_targets = {self.denoiser: _attention_layers(module)}

    def call(self, guidance: Guidance) -> dict[str, Any]:
        if guidance.mode == "detached-negative":
            raise self._refusal(
                "runs as a whole, so no branch of its guidance can be without gradient; write rollout.guidance: full, "
                "or off"
            )
        guided, negative = guidance.mode == "full", guidance.negative_prompt
        said: dict[str, Any] = {}
        if "true_cfg_scale" in self._parameters:
            said["true_cfg_scale"] = guidance.scale if guided else 1.0
        elif "guidance_scale" not in self._parameters:
            self._check_scale_of_parts(guidance)
        elif not self._embeds():
            said["guidance_scale"] = guidance.scale if guided else self._unguided()
        # what a distilled denoiser takes as an input has the call's own default when it is left out
        input_name = next((name for name in _EMBEDDED if name in self._parameters and name not in said), None)
        if guidance.embedded is not None and input_name is not None and self._embeds():
            said[input_name] = guidance.embedded
        # those of `true_cfg_scale` guide only where there is a negative prompt, be it an empty one
        if guided and (negative or "true_cfg_scale" in said):
            if "negative_prompt" not in self._parameters:
                raise self._refusal("takes no negative prompt; leave rollout.negative_prompt out")
            said["negative_prompt"] = negative
        return {**said, **self.options.call}

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
        import torch

        chosen = cache(gradient_steps)  # which may draw, once for all rows
        rows = range(len(prompts))
        images = [
            self._call(
                {
                    **self.call(guidance), "prompt": [str(prompts[i]) for i in call], "height": size[0],
                    "width": size[1], "num_inference_steps": num_steps, "output_type": "pt", "return_dict": False,
                    "generator": generators[call[0]] if self.options.one_by_one else [generators[i] for i in call],
                },
                chosen, guided=guidance.mode != "off", recompute=recompute,
            )
            for call in ([[i] for i in rows] if self.options.one_by_one else [rows])
        ]  # fmt: skip
        return torch.cat(images).float()

    def _call(
        self, arguments: dict[str, Any], gradient_steps: Callable[[int], range], *, guided: bool, recompute: bool
    ) -> Tensor:
        """Images of one call of the pipeline."""
        import torch

        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(arguments["prompt"])
        denoiser = self.trainable[self.denoiser]
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in denoiser.parameters())
        # a scheduler of its own: what one keeps from an earlier call must not reach this one
        with ExitStack() as stack:
            stack.enter_context(replaced(self.pipe, "scheduler", fresh(self.scheduler)))
            for name, part in () if guided else self._guiders().items():
                stack.enter_context(replaced(self.pipe, name, part.new(enabled=False)))
            self.pipe._num_timesteps = None  # an earlier call's
            steps = WatchedCall(self.pipe, gradient_steps, recompute=recompute, refusal=self._refusal)
            with steps.watched(denoiser) if trained else nullcontext():
                images = self._run(arguments)
            if trained:
                steps.check(images)
        return images

    def _run(self, arguments: Mapping[str, Any]) -> Tensor:
        import torch

        given = arguments["generator"]
        seed = (given[0] if isinstance(given, list) else given).initial_seed()
        try:
            with seeded(seed, self.pipe._execution_device):
                images = self._function(self.pipe, **arguments)[0]
        except (RecipeError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and ("requires grad" in str(error) or "nference tensor" in str(error)):
                raise self._refusal(f"leaves the graph on its way to the image: {error}") from error
            if "DefaultCPUAllocator" in str(error):  # main memory is exhausted
                raise
            raise self._refusal(self._told(error, len(arguments["prompt"]))) from error
        return self._checked(images, (len(arguments["prompt"]), 3, arguments["height"], arguments["width"]))

    def _check_kind(self) -> None:
        """Raise RecipeError unless this is a pipeline from text to one image, with one denoiser."""
        from diffusers import DiffusionPipeline
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

        inner = [name for name, part in vars(self.pipe).items() if isinstance(part, DiffusionPipeline)]
        if inner:
            raise self._refusal(
                f"draws through pipelines of its own ({', '.join(inner)}), whose steps are out of reach"
            )
        parts = [name for name in (self.denoiser, "scheduler") if getattr(self.pipe, name, None) is not None]
        listed = type(self.pipe) in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
        if why := _no_text_to_image(self._parameters, parts, listed=listed):
            raise self._refusal(why)
        for name, parameter in self._parameters.items():
            needed = parameter.default is parameter.empty and parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            )
            if needed and name not in ("self", *_OURS, *self.options.call):
                raise self._refusal(f"cannot be called without {name}; give it in pipeline.options.call, if you can")

    def _checked(self, images: Any, shape: tuple[int, ...]) -> Tensor:
        """The call's images. Raises RecipeError for what is no batch of images of this shape with values in [0, 1]."""
        import torch

        if not isinstance(images, torch.Tensor):
            raise self._refusal(f"gives {type(images).__name__} for output_type='pt', not a tensor")
        found: Tensor = (images / 2 + 0.5).clamp(0, 1) if self.options.signed else images
        if found.shape == (shape[0], 4, *shape[2:]):
            # with transparency: laid over white, as diffusers does where a text encoder is shown such a picture
            found = 1 - found[:, 3:] * (1 - found[:, :3])
        if found.shape != shape:
            raise self._refusal(
                f"gives images of shape {tuple(found.shape)} where {shape} were asked for; write a size that it does "
                "not round (rollout.height and width)"
            )
        low, high = (float(bound) for bound in found.detach().aminmax())
        if low < 0 or high > 1:
            raise self._refusal(
                f"gives values from {low:.2g} to {high:.2g} for output_type='pt', not from 0 to 1; if -1 to 1 is "
                "what it means, write pipeline.options.signed: true"
            )
        return found

    def _told(self, error: Exception, prompts: int) -> str:
        """What a call says as it breaks off, and what may help."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"({Path(where.filename).name}, line {where.lineno}) with {type(error).__name__}"
        what = "refuses its call" if isinstance(error, ValueError) else f"breaks off in its call {place}"
        parts = [f"{what}: {str(error).rstrip('.')}"]
        if self._without:
            parts.append(f"It runs here without its {' and '.join(self._without)}, through which no gradient comes")
        parts.append("Arguments that a recipe has no key for go into pipeline.options.call")
        if prompts > 1 and not isinstance(error, ValueError):
            parts.append("If it takes no lists of prompts, write pipeline.options.one_by_one: true")
        return ". ".join(parts)

    def _unguided(self) -> float:
        """The scale that switches guidance off: 1, or 0 in pipelines that count from there."""
        for scale in (1.0, 0.0):
            # what each call notes first, and its own rule reads
            self.pipe._guidance_scale = scale
            if not getattr(self.pipe, "do_classifier_free_guidance", False):
                return scale
        raise self._refusal("guides at every scale; write rollout.guidance: full")

    def _embeds(self) -> bool:
        """Whether the denoiser is distilled for guidance, and takes it as an input."""
        config: Any = self.trainable[self.denoiser].config
        return bool(config.get("guidance_embeds")) or config.get("time_cond_proj_dim") is not None

    def _guiders(self) -> dict[str, Any]:
        """The parts that guide, in pipelines that leave it to parts of their own."""
        from diffusers import BaseGuidance

        return {name: part for name, part in self.pipe.components.items() if isinstance(part, BaseGuidance)}

    def _check_scale_of_parts(self, guidance: Guidance) -> None:
        """Raise RecipeError for a scale other than that of the parts that guide, for a call that takes none."""
        scales = {name: part.guidance_scale for name, part in self._guiders().items() if part._enabled}
        if guidance.mode == "full" and guidance.scale not in (set(scales.values()) or {1.0}):
            told = " and ".join(f"its part {name} by {scale:g}" for name, scale in scales.items())
            raise self._refusal(
                f"takes no guidance_scale: {told} guides it, so give that scale"
                if scales
                else "takes no guidance_scale and no part of it guides; write rollout.guidance: off, or a scale of 1"
            )

    def _own_size(self) -> tuple[int, int]:
        defaults = [self._parameters[name].default for name in ("height", "width")]
        if all(isinstance(side, int) for side in defaults):
            return (defaults[0], defaults[1])
        if isinstance(pixels := self.pipe.config.get("default_sample_size"), int):
            return (pixels, pixels)  # where it is a setting of the pipeline it counts pixels, as an attribute latents
        side = getattr(self.pipe, "default_sample_size", None)
        side = side or getattr(self.pipe, self.denoiser).config.get("sample_size")
        factor = getattr(self.pipe, "vae_scale_factor", 1)
        # what every other pipeline falls back on
        return (side * factor, side * factor) if isinstance(side, int) else (1024, 1024)

    def _refusal(self, what: str) -> RecipeError:
        return RecipeError(f"pipeline.family generic: {type(self.pipe).__name__} {what.rstrip('.')}.")


def _no_text_to_image(call: Collection[str], parts: Collection[str], *, listed: bool) -> str | None:
    """Why a pipeline is not one from text to one image with one denoiser; None for one that is.

    call, parts: the names of what it takes to draw, and of what it is made of. listed: diffusers counts its class among
    those from text to image.
    """
    if found := [name for name in _VIDEO if name in call]:
        return f"makes videos (its call takes {found[0]}), and rewards score single images"
    if found := [name for name in _START if name in call]:
        return f"starts from a picture (its call takes {found[0]}), and recipes have prompts alone"
    # of those that can take pictures beside the prompt diffusers says which need none; that many of the others do not
    # run without shows in no signature, where the pictures have a default all the same
    if (found := [name for name in _PICTURES if name in call]) and not listed:
        return f"takes pictures (its call has {found[0]}) and is not among diffusers' text-to-image pipelines"
    if missing := [name for name in _NEEDED if name not in call]:
        return f"has a call without {', '.join(missing)}"
    if not {"transformer", "unet"} & set(parts) or "scheduler" not in parts:
        return "has no transformer or unet with a scheduler, so its steps cannot be told apart"
    return None


def _attention_layers(denoiser: nn.Module) -> list[str]:
    """Names of the layers that get adapters: diffusers' usual four, or where one is called otherwise, what is linear in
    the parts that are called attentions."""
    from torch import nn

    def named(name: str) -> list[nn.Module]:
        return [part for path, part in denoiser.named_modules() if f".{path}".endswith(f".{name}")]

    if all(named(name) for name in _USUAL):
        return list(_USUAL)
    attentions = [part for part in denoiser.modules() if _ATTENTION.search(type(part).__name__)]
    names = dict.fromkeys(name for part in attentions for name, _ in part.named_modules())
    found = [
        # deeper lies what belongs to blocks that are called after the attentions in them
        name for name in names if name and name.count(".") < 2
        and all(isinstance(part, nn.Linear) for part in named(name))  # a name that is a block's, too, is refused
    ]  # fmt: skip
    return found or list(_USUAL)


def _check_packages(name: Any) -> None:
    """Raise ImportError where diffusers has but a stand-in for this class: a package is missing, which it names."""
    import diffusers

    family: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if hasattr(family, "_backends"):
        family.from_config()
