"""Pictures -> the same pictures, moved pixel by pixel until one reward likes them: the step rule is ours.

Signed steps inside a growing box, as in projected gradient attacks (Madry et al., arXiv 1706.06083): in every step each
pixel moves by one step size towards the sign of its gradient, then back into the box |x - start| <= budget and [0, 1].
The steps are shared out evenly over the budgets, smallest first; the size is REACH times what a budget adds, over its
number of steps. Signs make the walk independent of the reward's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardtune.errors import NonFiniteError, RecipeError
from rewardtune.plugins import Reward
from rewardtune.scoring.checked import gradient_of
from rewardtune.types import Prompt

BUDGETS = (2, 4, 8, 16, 32)
"""Ours: how far a pixel may move, in steps of 1/255. 8 is hard to see, 32 is plain."""
REACH = 2.5
"""Madry et al.'s ratio of all steps together to the budget, so that every corner of the box can be reached."""


@dataclass(frozen=True)
class Step:
    """One step of the walk: the box that it ends in and its size, both of pixels in [0, 1]."""

    budget: float
    size: float
    ends_budget: bool


def plan(steps: int, budgets: Sequence[int] = BUDGETS) -> list[Step]:
    """`steps` steps over the budgets. Raises RecipeError where there are fewer steps than budgets."""
    if steps < len(budgets):
        raise RecipeError(f"--steps {steps}: the walk has {len(budgets)} budgets and needs a step for each.")
    if list(budgets) != sorted(set(budgets)) or budgets[0] < 1 or budgets[-1] > 255:
        raise RecipeError(f"budgets {list(budgets)}: give rising whole numbers from 1 to 255.")
    out = []
    before = 0
    for k, budget in enumerate(budgets):
        count = steps // len(budgets) + (k < steps % len(budgets))
        size = REACH * (budget - before) / count / 255
        out += [Step(budget / 255, size, i == count - 1) for i in range(count)]
        before = budget
    return out


def ascend(
    reward: Reward,
    starts: Tensor,
    prompts: Sequence[Prompt],
    steps: Sequence[Step],
    look: Callable[[int, Tensor], None],
) -> Tensor:
    """Walk (B, 3, H, W) up the reward and return where it ends; `look(i, images)` sees what `i` steps gave, 0 first.

    Raises NonFiniteError where the gradient is not finite, RecipeError where it is zero, NoGraph where there is none.
    """
    name, sign = reward.card.name, 1.0 if reward.card.higher_is_better else -1.0
    images = starts.clone()
    look(0, images)
    for i, step in enumerate(steps):
        leaf = images.detach().requires_grad_(True)
        gradient = gradient_of(name, reward.score(leaf, prompts).value.sum(), leaf)
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(
                f"reward {name!r}: the gradient of step {i + 1} is not finite. Run `rewardtune rewards test {name}`; "
                "with weights in bfloat16 or float16, load them in float32."
            )
        if i == 0 and not bool(gradient.any()):
            raise RecipeError(
                f"reward {name!r} has a gradient of zero on all of these pictures: nothing to climb. Give others with "
                "--images, e.g. some that it does not give its highest or lowest value."
            )
        moved = images + sign * step.size * gradient.sign()
        images = torch.minimum(torch.maximum(moved, starts - step.budget), starts + step.budget).clamp(0, 1).detach()
        look(i + 1, images)
    return images


def rounded(images: Tensor) -> Tensor:
    """As a file of 8 bits holds them."""
    return (images.clamp(0, 1) * 255).round() / 255
