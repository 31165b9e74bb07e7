"""Which of diffusers' schedulers a reward gradient may run through: those whose steps draw no noise."""

from __future__ import annotations

from typing import Any

from rewardtune.errors import RecipeError

DETERMINISTIC = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


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
