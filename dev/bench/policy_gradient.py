"""Reward gradients against a policy gradient on the pocket pipeline: images and seconds to the same held-out gain.

    python dev/bench/policy_gradient.py time      # seconds of a step, on an idle machine
    python dev/bench/policy_gradient.py sweep     # seed 0, the same learning rates for both arms, half of the steps
    python dev/bench/policy_gradient.py run       # seeds 1 to 5 at each arm's best rate
    python dev/bench/policy_gradient.py report    # policy_gradient.json beside this file

Arms: the demo's recipe with DRTune, the best of `methods.py`, and Flow-GRPO (arXiv 2505.05470) written for this bench:
same start, adapters, optimiser, prompts, reward and number of sampling steps; the stochastic sampler of its Eq. 9,
groups of eight, advantages standardised in the group, one update a batch (so that the clipped ratio is 1), no KL term.
Its last step is drawn without noise, since four steps would otherwise leave some in the picture. Rates are constant, so
that a curve is the same whatever its budget. The held-out gain is what `pocket-oracle` says of 64 validation prompts
more than of the start. The seed that a rate is picked on is not among those that are measured. Seconds are steps times
the median step of that short run, without looks, so that a busy machine changes no figure. Finished runs are kept in
build/policy-gradient.

Reported: gains at equal images and at equal seconds, and how many times the images and the seconds Flow-GRPO takes to
the same gain. Where it does not get there within its budget, that is a lower bound: more than so many times.
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
PICKED_ON, SEEDS = 0, range(1, 6)
BUDGET = {"drtune": (100, 8), "flow-grpo": (100, 48)}
"""Optimiser steps and images a step: 800 images, and six times as many."""
GRADIENT = {"drtune": {"method": "drtune", "memory": "fast"}}
SWEPT = 0.5
"""Share of the steps that the sweep takes."""
LOOK_EVERY = {"drtune": 10, "flow-grpo": 4}
"""Optimiser steps: 80 images, and 192, so that the arm with the larger budget has looks within the smaller one."""
TIMED, WARM = 6, 2
BOOTSTRAP = 10_000


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
        assert parts.prompt_cache is not None  # what the other arm encodes with
        conditioning = parts.prompt_cache.encode(prompts, first=0, prompt_of=parts._prompt)
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


def train(arm: str, rate: float, seed: int, steps: int | None = None) -> Path:
    """A run of one arm in its folder, with held-out looks on the way. steps: a short run, for the time it takes."""
    folder = BUILD / (f"{arm}-{rate:g}-{seed}" if steps is None else f"timed-{arm}")
    if (folder / "done").exists():
        return folder
    budget, images = BUDGET[arm]
    overrides = {
        "train.steps": steps or round(budget * (SWEPT if seed == PICKED_ON else 1)), "train.batch_size": images,
        "train.seed": seed, "optimizer.lr": rate, "optimizer.schedule": "constant",
        "guard": {"prompts": "pocket:prompts/validation", "num_prompts": 64, "seeds": 1, "action": "warn",
                  "rewards": [{"name": "pocket-oracle"}], "every": LOOK_EVERY[arm], "steps": 4,
                  "guidance_scale": 2.0, "batch_size": 32, "min_diversity": None},
    }  # fmt: skip
    if arm in GRADIENT:
        overrides["gradient"] = GRADIENT[arm]
    if steps is not None:
        overrides["guard"] = None
    recipe = load_recipe("pocket/zreward", format_overrides(overrides)).recipe
    assert isinstance(recipe, DirectRewardRecipe)
    parts = build_task(recipe, device="cpu")
    assert isinstance(parts, DirectReward)
    task: Any = parts if arm == "drtune" else FlowGrpo(parts)
    folder.mkdir(parents=True, exist_ok=True)
    guard = build_guard(recipe, task, folder) if steps is None else None
    loop.train(task, folder=folder, train=recipe.train, optimizer=recipe.optimizer, checkpoint=recipe.checkpoint,
               sample_every=10**9, guard=guard)  # fmt: skip
    (folder / "done").touch()
    return folder


def step_seconds(arm: str) -> float:
    """The median step of a short run."""
    lines = read_metrics(BUILD / f"timed-{arm}" / "metrics.jsonl")
    return statistics.median(float(line["seconds"]) for line in lines[WARM:])


def curve(folder: Path, arm: str) -> list[dict[str, float]]:
    """Images drawn, seconds of training and held-out gain of each look."""
    looks, took = read_looks(folder / "guard"), step_seconds(arm)
    start = statistics.fmean(looks[0].values["pocket-oracle"])
    return [
        {"images": look.step * BUDGET[arm][1], "seconds": look.step * took,
         "gain": statistics.fmean(look.values["pocket-oracle"]) - start}
        for look in looks
    ]  # fmt: skip


def gain_at(points: Sequence[Mapping[str, float]], spent: float, unit: str) -> float:
    """Held-out gain of a curve after so many images or seconds, linear between looks."""
    return float(np.interp(spent, [p[unit] for p in points], [p["gain"] for p in points]))


def cost(points: Sequence[Mapping[str, float]], gain: float, unit: str) -> tuple[float, bool]:
    """(images or seconds at which a curve first reaches `gain`, linear between looks; True), or (its budget, False)."""
    for before, after in pairwise(points):
        if after["gain"] >= gain:
            share = (gain - before["gain"]) / (after["gain"] - before["gain"])
            return before[unit] + max(share, 0.0) * (after[unit] - before[unit]), True
    return points[-1][unit], False


def best_rates() -> dict[str, float]:
    """Each arm's rate with the largest mean gain over the second half of its looks, of the sweep's seed."""

    def late(arm: str, rate: float) -> float:
        points = curve(BUILD / f"{arm}-{rate:g}-{PICKED_ON}", arm)
        return statistics.fmean(p["gain"] for p in points[len(points) // 2 :])

    return {arm: max(RATES, key=lambda rate: late(arm, rate)) for arm in BUDGET}


def swept(gain: float) -> dict[str, Any]:
    """Of each arm and rate on the sweep's seed: images to `gain`, None where it is not reached, and the best gain."""
    out: dict[str, Any] = {}
    for arm in BUDGET:
        for rate in RATES:
            points = curve(BUILD / f"{arm}-{rate:g}-{PICKED_ON}", arm)
            images, there = cost(points, gain, "images")
            best = max(p["gain"] for p in points)
            out.setdefault(arm, {})[f"{rate:g}"] = {"images": images if there else None, "best_gain": best}
    return out


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and its 95 % interval over seeds by the t distribution."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "ci95": [mean - half, mean + half], "per_seed": list(values)}


def equal_spending(curves: Mapping[str, Sequence[Any]], unit: str) -> dict[str, Any]:
    """Gains after the same number of images or seconds: half and all of the smallest budget of any run."""
    most = min(points[-1][unit] for found in curves.values() for points in found)
    out = {}
    for share in (0.5, 1.0):
        gains = {arm: [gain_at(points, share * most, unit) for points in found] for arm, found in curves.items()}
        ahead = [d - p for d, p in zip(gains["drtune"], gains["flow-grpo"], strict=True)]
        out[f"after {share * most:.0f} {unit}"] = {
            **{arm: interval(values) for arm, values in gains.items()}, "drtune minus flow-grpo": interval(ahead)
        }  # fmt: skip
    return out


def times(curves: Mapping[str, Sequence[Any]], gain: float, unit: str) -> dict[str, Any]:
    """How many times drtune's images or seconds flow-grpo takes to `gain`: medians over seeds, a bootstrap over them.

    A run that never gets there stands with its budget where the ratio is bounded from below, and with infinity where it
    is bounded from above; where these differ, what is reported is a lower bound.
    """
    found = {arm: [cost(points, gain, unit) for points in runs] for arm, runs in curves.items()}
    spent = {arm: np.array([c for c, _ in some]) for arm, some in found.items()}
    truly = {arm: np.array([c if there else math.inf for c, there in some]) for arm, some in found.items()}
    rng = np.random.default_rng(0)
    count = len(spent["drtune"])
    draws = {arm: rng.integers(0, count, (BOOTSTRAP, count)) for arm in spent}

    def ratio(above: Any, below: Any, rows: Mapping[str, Any]) -> Any:
        """Of medians; 0 where drtune itself did not get there."""
        return np.median(above[rows["flow-grpo"]], -1) / np.median(below[rows["drtune"]], -1)

    once = {arm: np.arange(count) for arm in spent}
    least, most = (float(ratio(a, b, once)) for a, b in _bounds(spent, truly))
    low, high = (ratio(a, b, draws) for a, b in _bounds(spent, truly))
    ends = [float(np.quantile(low, 0.025, method="nearest")), float(np.quantile(high, 0.975, method="nearest"))]
    return {
        "median": least, "lower_bound": least != most,
        "ci95": [ends[0], ends[1] if math.isfinite(ends[1]) else None],
        "said": f"{'more than ' if least != most else ''}{least:.3g} times the {unit}",
        "reached": {arm: sum(there for _, there in some) for arm, some in found.items()}, "of": count,
    }  # fmt: skip


def _bounds(spent: Mapping[str, Any], truly: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """(numerators, denominators) that bound the ratio from below and from above."""
    return [(spent["flow-grpo"], truly["drtune"]), (truly["flow-grpo"], spent["drtune"])]


def report() -> dict[str, Any]:
    """The document: gains at equal spending, and spending to half and nine tenths of what reward gradients gain."""
    rates = best_rates()
    curves = {arm: [curve(BUILD / f"{arm}-{rate:g}-{s}", arm) for s in SEEDS] for arm, rate in rates.items()}
    final = statistics.fmean(c[-1]["gain"] for c in curves["drtune"])
    return {
        "what": "held-out gain, images and seconds, pocket pipeline: DRTune and Flow-GRPO",
        "seeds": list(SEEDS), "rates": rates, "rates_tried": list(RATES), "rates_picked_on_seed": PICKED_ON,
        "step_seconds": {arm: step_seconds(arm) for arm in BUDGET},
        "final_gain": {arm: interval([c[-1]["gain"] for c in found]) for arm, found in curves.items()},
        "best_gain": {arm: interval([max(p["gain"] for p in c) for c in found]) for arm, found in curves.items()},
        "gain_at_equal_images": equal_spending(curves, "images"),
        "gain_at_equal_seconds": equal_spending(curves, "seconds"),
        "times": {
            f"{unit} to {share:.0%} of drtune's gain": times(curves, share * final, unit)
            for share in (0.5, 0.9) for unit in ("images", "seconds")
        },
        "sweep: images to 50% of drtune's gain": swept(0.5 * final),
        "curves": curves,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "sweep", "run", "report"])
    args = parser.parse_args()
    if args.what == "time":
        for arm in BUDGET:
            train(arm, RATES[0], PICKED_ON, TIMED)
    elif args.what == "sweep":
        for arm in BUDGET:
            for rate in RATES:
                train(arm, rate, PICKED_ON)
    elif args.what == "run":
        for arm, rate in best_rates().items():
            for seed in SEEDS:
                train(arm, rate, seed)
    else:
        document = json.dumps(report(), indent=1, allow_nan=False)
        Path(__file__).with_suffix(".json").write_text(document + "\n")
        print(document)


if __name__ == "__main__":
    main()
