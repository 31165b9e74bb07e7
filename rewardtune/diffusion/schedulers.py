"""diffusers' schedulers: another one like the checkpoint's, and those that a reward gradient may run through step by
step, whose steps draw no noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewardtune.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from rewardtune.plugins import Pipeline

DETERMINISTIC = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Not KDPM2DiscreteScheduler: every other prediction of it only says where the next one is made, so that a method
without gradient through the denoiser's input trains nothing at these steps."""


def fresh(scheduler: Any) -> Any:
    """Another scheduler of the same class and settings, which has taken no step."""
    # a value that the checkpoint left out counts as unset, and from_config gives it the class's own default again, even
    # where the pipeline's constructor set another (steps_offset in the Stable Diffusion family)
    settings = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    return type(scheduler).from_config(settings)


def check_deterministic(scheduler: Any) -> None:
    """Raises RecipeError for a scheduler that draws noise in its steps, and for one that is not known not to.

    A step is run again where memory is saved, and every step of it must be the same function of its input.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    noisy = str(config.get("algorithm_type", "")).startswith("sde") or config.get("stochastic_sampling")
    if name in DETERMINISTIC and not noisy:
        return
    why = "as it is configured draws noise in its steps" if noisy else "is not known to be free of noise in its steps"
    raise RecipeError(
        f"pipeline.model: the checkpoint's scheduler, {name}, {why}, so a reward gradient cannot be taken through it. "
        f"These work: {', '.join(DETERMINISTIC)}. Save the pipeline with one of them "
        "(pipe.scheduler = ...from_config(pipe.scheduler.config); pipe.save_pretrained(folder))."
    )


def schedule(pipeline: Pipeline, num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
    """A fresh scheduler and its timesteps. Raises RecipeError for one that the family's own call cannot set up."""
    try:
        return pipeline.timesteps(num_steps, size)
    except (TypeError, ValueError) as error:
        name = type(pipeline.scheduler).__name__
        raise RecipeError(
            f"pipeline.model: the checkpoint's scheduler, {name}, cannot be set up for {num_steps} steps as "
            f"{type(pipeline.pipe).__name__} does it: {str(error).rstrip('.')}. Save the pipeline with the scheduler "
            f"that the family {pipeline.family!r} is published with, or, where it is the steps, write another number."
        ) from error
