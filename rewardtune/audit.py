"""`rewardtune audit`: each way of taking the reward gradient against the exact one through the full chain.

The exact gradient: DRaFT through all steps, in fp32, over the same prompts and noise. Reported for each method and
precision: cosine and norm ratio to it, seconds per step, peak live bytes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from rewardtune.errors import RecipeError
from rewardtune.gradients import METHODS, load_method
from rewardtune.plugins import WholeRollout
from rewardtune.recipe.gradients import GradientSection, steps_needed
from rewardtune.recipe.mistakes import schema_mistakes
from rewardtune.recipe.sections import DirectRewardRecipe
from rewardtune.recipe.suggest import closest
from rewardtune.scoring.score import parse_spec
from rewardtune.tasks.direct_reward import DirectReward
from rewardtune.training.live_bytes import peak_live_bytes

EXACT = "draft:last_steps=all,memory=flat"


def default_methods(steps: int) -> list[str]:
    """DRaFT at 1, 2, 4, ... steps and through all of them in both memory modes, and every other method as it comes."""
    lengths = [2**k for k in range(8) if 2**k < steps]
    out = [f"draft:last_steps={k}" for k in lengths] + ["draft:last_steps=all,memory=fast", EXACT]
    others = ["refl", "refl:earliest=0", *(name for name in METHODS if name not in ("draft", "refl"))]
    return out + [name for name in others if steps_needed(_section(name))[1] <= steps]


def audit(
    recipe: DirectRewardRecipe,
    *,
    methods: Sequence[str] = (),
    batches: int = 4,
    precisions: Sequence[str] = ("fp32", "bf16"),
    device: str,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The document of `audit --json`. methods: NAME[:option=value,...]; the usual ones when empty. batches: of
    train.batch_size prompts over which gradients are averaged; methods that draw a step at random want more of them.

    Raises RecipeError for a method that does not exist, does not take an option, or needs more steps than there are.
    """
    from rewardtune.build import build_task
    from rewardtune.training.state import trained_parameters

    if recipe.task != "direct_reward":
        raise RecipeError(f"audit is about recipes of the task direct_reward; this one is {recipe.task}.")
    chosen = list(methods) or default_methods(recipe.rollout.steps)
    sections = {spec: _section(spec, recipe.rollout.steps) for spec in dict.fromkeys(chosen)}
    plain: dict[str, Any] = {"velocity": 0.0, "sft": None}
    alone = recipe.model_copy(update={"regularise": recipe.regularise.model_copy(update=plain), "guard": None})
    task = build_task(alone, device=device)
    assert isinstance(task, DirectReward)
    if isinstance(task.pipeline, WholeRollout):
        raise RecipeError(
            f"audit takes single steps, and the family {task.pipeline.family!r} runs its pipeline as a whole."
        )
    parameters = list(trained_parameters(task).values())
    size = recipe.train.batch_size // recipe.train.accumulation
    starts = [range(k * size, (k + 1) * size) for k in range(batches)]

    def gradients(section: GradientSection, precision: str) -> tuple[list[Tensor], list[float]]:
        task.method = load_method(section.method, **section.model_dump(exclude={"method"}))
        found, seconds = [], []
        for step, indices in enumerate(starts):
            began = time.perf_counter()
            found.append(_gradient(task, parameters, step, indices, precision))
            if found[-1].is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return found, seconds

    progress("the exact gradient")
    exact, _ = gradients(_section(EXACT), "fp32")
    if not any(bool(g.any()) for g in exact):
        raise RecipeError("the exact gradient is zero: the rewards do not depend on what is trained.")
    rows = []
    for spec, section in sections.items():
        for precision in precisions:
            progress(f"{spec} in {precision}")
            found, seconds = gradients(section, precision)
            peak = peak_live_bytes(partial(_gradient, task, parameters, 0, starts[0], precision))
            rows.append(
                {"method": spec, "precision": precision, **compare(found, exact)}
                | {"seconds": statistics.median(seconds), "peak_live_bytes": peak}
            )
    return {
        "format": 1,
        "steps": recipe.rollout.steps,
        "batch_size": size,
        "batches": batches,
        "guidance": recipe.rollout.guidance,
        "parameters": sum(p.numel() for p in parameters),
        "device": device,
        "threads": torch.get_num_threads(),
        "exact": EXACT,
        "rows": rows,
    }


def compare(found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """cosine: of the mean gradients. batch_cosine: mean over batches. norm_ratio: of the mean gradients' norms. NaN
    where a gradient is zero or not finite."""
    means = torch.stack(list(found)).mean(0), torch.stack(list(exact)).mean(0)
    norms = [float(m.norm()) for m in means]
    return {
        "cosine": _cosine(*means),
        "batch_cosine": statistics.mean(_cosine(a, b) for a, b in zip(found, exact, strict=True)),
        "norm_ratio": norms[0] / norms[1] if norms[1] else math.nan,
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    scale = float(a.double().norm() * b.double().norm())
    return float(a.double() @ b.double()) / scale if scale > 0 else math.nan


def _gradient(
    task: DirectReward, parameters: Sequence[Tensor], step: int, indices: Sequence[int], precision: str
) -> Tensor:
    """Of one micro-batch, flat."""
    device = parameters[0].device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        with torch.no_grad():
            batch = task.batch(step, indices)
        loss = task.step(batch).loss
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return torch.cat([g.float().flatten() for g in filled])


def _section(spec: str, steps: int | None = None) -> GradientSection:
    name, options = parse_spec(spec)
    given = {"method": name, **options}
    try:
        section: GradientSection = TypeAdapter(GradientSection).validate_python(given)
    except ValidationError as error:
        if name not in METHODS:
            said = f"there is no method '{name}' (there are {', '.join(METHODS)}){closest(name, METHODS)}"
        else:
            classes = get_args(get_args(GradientSection)[0])
            own = next(cls for cls in classes if name in get_args(cls.model_fields["method"].annotation))
            wrong = schema_mistakes(error, own, given, at=("options",))
            said = "; ".join(mistake.message for mistake in wrong)
        raise RecipeError(f"--methods {spec}: {said}{'' if said.endswith('?') else '.'}") from error
    field, least = steps_needed(section)
    if steps is not None and least > steps:
        raise RecipeError(f"--methods {spec}: {field} needs {least} steps, and rollout.steps is {steps}.")
    return section
