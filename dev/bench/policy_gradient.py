"""Reward gradients against a policy gradient on the pocket pipeline: images and seconds to the same held-out gain.

    python dev/bench/policy_gradient.py sweep     # one seed, the same learning rates for both arms
    python dev/bench/policy_gradient.py run       # five seeds at each arm's best rate
    python dev/bench/policy_gradient.py report    # policy_gradient.json beside this file

Arms: the demo's recipe (DRaFT through all steps), and Flow-GRPO (arXiv 2505.05470) written for this bench: same start,
adapters, optimiser, prompts, reward and number of sampling steps; the stochastic sampler of its Eq. 9, groups of eight,
advantages standardised in the group, one update a batch (so that the clipped ratio is 1), no KL term. Its last step is
drawn without noise, since four steps would otherwise leave some in the picture. The held-out gain is what
`pocket-oracle` says of 64 validation prompts more than of the start, looked at ten times in a run. Finished runs are
kept in build/policy-gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewardtune.build import build_guard, build_task
from rewardtune.diffusion.rollout import Chain
from rewardtune.guard.guard import read_looks
from rewardtune.randomness import epoch_index, generator
from rewardtune.recipe.file import format_overrides, load_recipe
from rewardtune.recipe.sections import DirectRewardRecipe
from rewardtune.tasks.direct_reward import DirectReward
from rewardtune.training import loop
from rewardtune.training.track import read_metrics
from rewardtune.types import Prompt, StepOutput

BUILD = Path("build/policy-gradient")
GROUP, NOISE, CLIP, ADVANTAGE_EPSILON = 8, 0.7, 1e-4, 1e-4
"""Images a prompt, the sampler's noise level, range of the ratio: as in the paper's settings; the last one ours."""
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = 5
LOOKS = 10
BUDGET = {"draft": (100, 8), "flow-grpo": (167, 48)}
"""Optimiser steps and images a step: 800 images, and ten times as many."""


@dataclass(frozen=True)
class Sampled:
    """Drawn chains. latents: T + 1 tensors (B, ...). advantages: (B,)."""

    prompts: list[Prompt]
    latents: list[Tensor]
    advantages: Tensor
    metrics: Mapping[str, float]


class FlowGrpo:
    """A task for the ordinary loop, beside the DirectReward task whose parts it uses."""

    def __init__(self, parts: DirectReward) -> None:
        self.parts, self.pipeline, self.rewards = parts, parts.pipeline, parts.rewards
        self.trainable, self.samples, self.export = parts.trainable, parts.samples, parts.export

    def batch(self, step: int, indices: Sequence[int]) -> Sampled:
        parts = self.parts
        rows = [epoch_index(parts.seed, "prompts/order", i // GROUP, len(parts.prompts)) for i in indices]
        prompts = [parts.prompts[row] for row in rows]
        chain = self._chain(prompts)
        keys = [generator(parts.seed, "policy/noise", i) for i in indices]
        x = chain.start(self.pipeline.noise(keys, parts.size))
        latents = [x]
        for i in range(len(chain)):
            mean, deviation = self._transition(chain, i, x)
            if deviation:
                x = mean + deviation * torch.stack([torch.randn(x.shape[1:], generator=key) for key in keys])
            else:
                x = mean
            latents.append(x)
        value, metrics = self.rewards.score(self.pipeline.decode(x).clamp(0, 1), prompts)
        groups = value.view(-1, GROUP)
        spread = groups.std(1, keepdim=True) + ADVANTAGE_EPSILON
        advantages = ((groups - groups.mean(1, keepdim=True)) / spread).flatten()
        return Sampled(prompts, latents, advantages, {**metrics, "objective": value.mean().item()})

    def step(self, batch: Sampled) -> StepOutput:
        chain = self._chain(batch.prompts)
        total = torch.zeros(())
        for i in range(len(chain) - 1):
            mean, deviation = self._transition(chain, i, batch.latents[i])
            off = (batch.latents[i + 1] - mean) / deviation
            log_probability = -0.5 * off.square().flatten(1).mean(1)  # up to a constant; a mean over numbers, as theirs
            ratio = (log_probability - log_probability.detach()).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            total = total - torch.minimum(batch.advantages * ratio, batch.advantages * clipped).mean()
        return StepOutput(loss=total / (len(chain) - 1), metrics=batch.metrics)

    def evaluate(self) -> Mapping[str, float]:
        return {}

    def _chain(self, prompts: Sequence[Prompt]) -> Chain:
        parts = self.parts
        with torch.no_grad():
            conditioning = self.pipeline.encode(prompts, parts.guidance)
        return Chain(self.pipeline, conditioning, num_steps=parts.num_steps, guidance=parts.guidance, size=parts.size)

    def _transition(self, chain: Chain, i: int, x: Tensor) -> tuple[Tensor, float]:
        """Mean and standard deviation of the latents after step i (Eq. 9); none at the last step."""
        sigmas = chain._states[0].sigmas
        now, after = float(sigmas[i]), float(sigmas[i + 1])
        velocity = self.pipeline.predict(x, chain.timesteps[i], chain.conditioning, chain.guidance).float()
        dt = after - now
        if i == len(chain) - 1:
            return x + velocity * dt, 0.0
        level = NOISE * math.sqrt(now / (1 - min(now, float(sigmas[1]))))  # at pure noise, the next level's share
        mean = x * (1 + level**2 / (2 * now) * dt) + velocity * (1 + level**2 * (1 - now) / (2 * now)) * dt
        return mean, level * math.sqrt(-dt)


def train(arm: str, rate: float, seed: int) -> Path:
    """A run of one arm in its folder, with held-out looks on the way."""
    folder = BUILD / f"{arm}-{rate:g}-{seed}"
    if (folder / "done").exists():
        return folder
    steps, images = BUDGET[arm]
    overrides = {
        "train.steps": steps, "train.batch_size": images, "train.seed": seed, "optimizer.lr": rate,
        "guard": {"prompts": "pocket:prompts/validation", "num_prompts": 64, "seeds": 1, "action": "warn",
                  "rewards": [{"name": "pocket-oracle"}], "every": math.ceil(steps / LOOKS), "steps": 4,
                  "guidance_scale": 2.0, "batch_size": 32, "min_diversity": None},
    }  # fmt: skip
    recipe = load_recipe("pocket/zreward", format_overrides(overrides)).recipe
    assert isinstance(recipe, DirectRewardRecipe)
    parts = build_task(recipe, device="cpu")
    assert isinstance(parts, DirectReward)
    task: Any = parts if arm == "draft" else FlowGrpo(parts)
    folder.mkdir(parents=True, exist_ok=True)
    loop.train(task, folder=folder, train=recipe.train, optimizer=recipe.optimizer, checkpoint=recipe.checkpoint,
               sample_every=10**9, guard=build_guard(recipe, task, folder))  # fmt: skip
    (folder / "done").touch()
    return folder


def curve(folder: Path, arm: str) -> list[dict[str, float]]:
    """Images drawn, seconds of training and held-out gain of each look."""
    looks = read_looks(folder / "guard")
    seconds = np.cumsum([line["seconds"] for line in read_metrics(folder / "metrics.jsonl")])
    start = statistics.fmean(looks[0].values["pocket-oracle"])
    return [
        {"images": look.step * BUDGET[arm][1], "seconds": float(seconds[look.step - 1]) if look.step else 0.0,
         "gain": statistics.fmean(look.values["pocket-oracle"]) - start}
        for look in looks
    ]  # fmt: skip


def cost(points: Sequence[Mapping[str, float]], gain: float, unit: str) -> float:
    """Images or seconds at which a curve first reaches `gain`, linear between looks; infinite where it never does."""
    for before, after in pairwise(points):
        if after["gain"] >= gain:
            share = (gain - before["gain"]) / (after["gain"] - before["gain"])
            return before[unit] + max(share, 0.0) * (after[unit] - before[unit])
    return math.inf


def best_rates() -> dict[str, float]:
    """Each arm's rate with the largest mean gain over the second half of its looks, of the sweep's seed."""

    def late(arm: str, rate: float) -> float:
        points = curve(BUILD / f"{arm}-{rate:g}-0", arm)
        return statistics.fmean(p["gain"] for p in points[len(points) // 2 :])

    return {arm: max(RATES, key=lambda rate: late(arm, rate)) for arm in BUDGET}


def report() -> dict[str, Any]:
    """How many times the images and the seconds, at half and at nine tenths of what reward gradients gain at last."""
    rates = best_rates()
    curves = {arm: [curve(BUILD / f"{arm}-{rate:g}-{s}", arm) for s in range(SEEDS)] for arm, rate in rates.items()}
    final = statistics.fmean(c[-1]["gain"] for c in curves["draft"])
    out: dict[str, Any] = {
        "what": "images and seconds to the same held-out gain, pocket pipeline: Flow-GRPO over DRaFT through all steps",
        "seeds": SEEDS, "rates": rates, "rates_tried": list(RATES),
        "final_gain": {arm: [c[-1]["gain"] for c in found] for arm, found in curves.items()},
        "best_gain": {arm: [max(p["gain"] for p in c) for c in found] for arm, found in curves.items()}, "times": {},
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for share in (0.5, 0.9):
        for unit in ("images", "seconds"):
            costs = {arm: np.array([cost(c, share * final, unit) for c in found]) for arm, found in curves.items()}
            drawn = [
                np.median(rng.choice(costs["flow-grpo"], SEEDS)) / np.median(rng.choice(costs["draft"], SEEDS))
                for _ in range(2000)
            ]
            low, high = (float(np.quantile(drawn, q, method="nearest")) for q in (0.025, 0.975))
            out["times"][f"{unit} to {share:.0%} of the gain"] = {
                "median": float(np.median(costs["flow-grpo"]) / np.median(costs["draft"])), "ci95": [low, high],
                "reached": {arm: int(np.isfinite(c).sum()) for arm, c in costs.items()},
            }  # fmt: skip
    out["curves"] = curves
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sweep", "run", "report"])
    parser.add_argument("--arm", choices=list(BUDGET), help="only this one")
    args = parser.parse_args()
    arms = [args.arm] if args.arm else list(BUDGET)
    if args.what == "sweep":
        for arm in arms:
            for rate in RATES:
                train(arm, rate, 0)
    elif args.what == "run":
        rates = best_rates()
        for seed in range(SEEDS):
            for arm in arms:
                train(arm, rates[arm], seed)
    else:
        document = json.dumps(report(), indent=1, default=str).replace("Infinity", "null")
        Path(__file__).with_suffix(".json").write_text(document + "\n")
        print(document)


if __name__ == "__main__":
    main()
