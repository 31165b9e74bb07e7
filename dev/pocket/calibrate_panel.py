"""Fit what the panel's eye measures to known flaws, so that seen and known pictures are rated on one scale.

Run once after `scenes.py`, `faults.py` or `eye.py` changed; writes rewardtune/pocket/data/panel.json, with the
agreement on renders that were not fitted.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize, nnls
from scipy.stats import spearmanr

from rewardtune.pocket import eye, panel
from rewardtune.pocket.faults import FAULTS, misread
from rewardtune.pocket.scenes import BACKGROUNDS, Scene, render, sample_scene

OUT = Path(__file__).parents[2] / "rewardtune" / "pocket" / "data" / "panel.json"


@dataclass(frozen=True)
class Case:
    """A render of which everything is known, and what the eye saw of it."""

    asked: Scene
    drawn: Scene
    faults: tuple[panel.Fault, ...]
    view: eye.View
    truth: panel.Opinion
    wreck: bool = False


def make_case(rng: random.Random) -> Case:
    """A train scene, misread half of the time, with up to three faults; one in six is a wreck.

    Wrecks are what a pipeline draws early in its training: blobs, bent and melted beyond recognition.
    """
    asked = sample_scene(rng, "train")
    drawn = misread(asked, rng) if rng.random() < 0.5 else asked
    plan = [(n, rng.random()) for n in rng.sample(sorted(FAULTS), rng.choices([0, 1, 2, 3], [1, 5, 3, 1])[0])]
    wreck = rng.random() < 1 / 6
    if wreck:
        drawn = sample_scene(rng, "train") if rng.random() < 0.5 else asked
        names = ["wobble", *rng.choices(["wobble", "smear", "ghosting"], k=2), *rng.choices(["blur", "grain"], k=1)]
        plan = [(n, rng.uniform(0.6, 1.0) if n not in ("blur", "grain") else rng.uniform(0.0, 0.4)) for n in names]
    picture, faults = render(drawn), []
    for name, severity in plan:
        picture, fault = panel.apply_fault(picture, name, severity, rng)
        faults.append(fault)
    view = eye.look(picture, asked.facts())
    return Case(asked, drawn, tuple(faults), view, panel.judge_recipe(asked, drawn, faults), wreck)


def fit_logistic(inputs: list[tuple[float, ...]], labels: list[bool]) -> list[float]:
    """Bias and weights of a logistic regression, weights kept at least 0, with a mild pull to 0."""
    x, y = np.array(inputs), np.array(labels, dtype=float)

    def loss(w: np.ndarray) -> float:
        z = w[0] + x @ w[1:]
        return float(np.mean(np.logaddexp(0, z) - y * z) + 1e-4 * np.sum(w[1:] ** 2))

    best = minimize(loss, np.zeros(x.shape[1] + 1), bounds=[(None, None)] + [(0, None)] * x.shape[1])
    return [round(float(v), 4) for v in best.x]


def fit_facts(cases: list[Case]) -> dict[str, list[float]]:
    """Logistic weights for "this sight is that object", "it has that tint", "the background has that colour"."""
    objects: tuple[list, list] = ([], [])
    colours: tuple[list, list] = ([], [])
    grounds: tuple[list, list] = ([], [])
    for case in cases:
        for s in case.view.found:
            true = [b for b in case.drawn.boxes if case.drawn.groups[b.group].concept == s.concept
                    and np.hypot(b.x - s.x, b.y - s.y) < 0.35 * b.side]  # fmt: skip
            objects[0].append((s.score, s.score - s.rival))
            objects[1].append(bool(true) and panel.clarity(case.faults) > 0.5)
            if true:
                tint = case.drawn.groups[true[0].group].tint
                for name in s.tints:
                    colours[0].append(panel.tint_margins(s, name))
                    colours[1].append(name == tint)
        if not any(f.name in ("pale", "cast", "blotches") for f in case.faults):
            gaps = {n: float(np.linalg.norm(np.array(case.view.background) - c)) for n, c in BACKGROUNDS.items()}
            for name, gap in gaps.items():
                grounds[0].append(((min(g for n, g in gaps.items() if n != name) - gap) / 100.0,))
                grounds[1].append(name == case.drawn.background)
    return {"object": fit_logistic(*objects), "colour": fit_logistic(*colours), "background": fit_logistic(*grounds)}


def fit_quality(cases: list[Case]) -> dict[str, dict[str, object]]:
    """Weights, none negative, from the hinges of the eye's measures to each dimension's loss of points.

    Wrecks count twice: one scale must serve them and pictures with small flaws, of which there are more.
    """
    inputs = np.array([panel.hinges(case.view.measures) for case in cases])
    weight = np.sqrt([2.0 if case.wreck else 1.0 for case in cases])
    design = np.c_[inputs, np.ones(len(inputs))] * weight[:, None]
    out: dict[str, dict[str, object]] = {}
    for name in panel.DIMENSIONS[1:]:
        weights, _ = nnls(design, weight * np.array([5.0 - case.truth.values[name] for case in cases]))
        rounded = [round(float(w), 4) for w in weights]
        out[name] = {"weights": rounded[:-1], "offset": rounded[-1]}
    return out


def agreement(cases: list[Case]) -> dict[str, dict[str, float]]:
    """Rank correlation and mean absolute difference of seen and known values, per dimension."""
    seen = [panel.judge_view(case.view, case.asked.facts()).values for case in cases]
    out = {}
    for name in panel.DIMENSIONS:
        a, b = (np.array([v[name] for v in values]) for values in (seen, [c.truth.values for c in cases]))
        out[name] = {"spearman": round(float(spearmanr(a, b)[0]), 3), "difference": round(float(abs(a - b).mean()), 3)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(f"calibrate/{args.seed}")
    cases = [make_case(rng) for _ in range(args.count)]
    held = args.count // 4
    fitted = {"facts": fit_facts(cases[held:]), "quality": fit_quality(cases[held:])}
    args.out.write_text(json.dumps(fitted, indent=1) + "\n", encoding="utf-8")
    panel.calibration.cache_clear()
    fitted["held_out"] = {"pictures": held, "agreement": agreement(cases[:held])}
    args.out.write_text(json.dumps(fitted, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(fitted["held_out"], indent=1))


if __name__ == "__main__":
    main()
