"""`train.compile`: the compiled denoiser gives eager's numbers, with adapters and steps that are recomputed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rewardtune import registry
from rewardtune.build import build_task
from rewardtune.recipe.sections import DirectRewardRecipe

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


def test_the_compiled_denoiser_gives_eagers_numbers(tmp_path: Path) -> None:
    tiny.z_image().save_pretrained(tmp_path)
    (tmp_path / "prompts.txt").write_text("a dog\nred cat\n")
    if "redness" not in registry.rewards.names():
        registry.load_plugin(str(Path(__file__).parents[1] / "unit/redness.py"))
    found = {}
    for compiled in (False, True):
        recipe = DirectRewardRecipe.model_validate({
            "task": "direct_reward", "pipeline": {"model": str(tmp_path)}, "lora": {"rank": 2},
            "data": {"prompts": str(tmp_path / "prompts.txt")}, "rollout": {"steps": 2, "guidance_scale": 2.0},
            "gradient": {"method": "draft", "last_steps": "all", "memory": "flat"}, "rewards": [{"name": "redness"}],
            "train": {"steps": 1, "batch_size": 2, "compile": compiled, "device": "cpu"},
        })  # fmt: skip
        task: Any = build_task(recipe, device="cpu")
        weights = [p for p in task.trainable["transformer"].parameters() if p.requires_grad]
        loss = task.step(task.batch(0, range(2))).loss
        parts = torch.autograd.grad(loss, weights)
        found[compiled] = float(loss), torch.cat([part.flatten() for part in parts])
    assert any("torch._dynamo" in name for name in sys.modules)
    (plain, gradient), (other, compiled_gradient) = found[False], found[True]
    assert other == pytest.approx(plain, abs=1e-5)
    cosine = torch.nn.functional.cosine_similarity(gradient, compiled_gradient, dim=0)
    assert gradient.any() and float(cosine) > 0.9999
