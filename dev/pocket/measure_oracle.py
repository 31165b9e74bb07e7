"""Measure the held-out judge where the truth is known: clean renders, autoencoder reconstructions, faults, misreadings.

Run after train_oracle.py; writes metrics.json beside the weights. The faults are those of the simulated panel, which
the judge has not been trained on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle_agreement import IMAGES, LABELS, agreement, judged
from PIL import Image
from rewardtune.rewards.pocket_oracle import KINDS, PocketOracle
from scipy.stats import binomtest
from torch import Tensor

from rewardtune.pocket.faults import FAULTS, misread
from rewardtune.pocket.oracle import load
from rewardtune.pocket.scenes import Scene, place, render, sample_scene
from rewardtune.types import Prompt

SEVERITIES = (0.25, 0.5, 0.75, 1.0)


def scenes(count: int, stream: str) -> list[Scene]:
    """Placed scenes of the held-out split."""
    rng = random.Random(f"oracle-measure:{stream}")
    return [sample_scene(rng, "heldout") for _ in range(count)]


def tensor(pictures: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


def judge(oracle: PocketOracle, images: Tensor, of: Sequence[Scene]) -> dict[str, Tensor]:
    """Value and parts of pictures judged against the captions of `of`, (N,) each."""
    prompts = [Prompt(scene.caption, {"facts": scene.facts()}) for scene in of]
    scores = [oracle.score(images[i : i + 50], prompts[i : i + 50]) for i in range(0, len(prompts), 50)]
    names = scores[0].parts
    return {"value": torch.cat([s.value for s in scores])} | {
        name: torch.cat([s.parts[name] for s in scores]) for name in names
    }


def shares(said: dict[str, Tensor], of: Sequence[Scene]) -> dict[str, Any]:
    """Share of facts right (pooled over facts), of pictures with all facts right, per kind, and mean cleanliness."""
    counts = torch.tensor([len(scene.facts()) for scene in of])
    right = round(float((said["facts"] * counts).sum()))
    interval = binomtest(right, int(counts.sum())).proportion_ci(0.95, method="wilson")
    return {
        "pictures": len(of), "facts": int(counts.sum()), "facts_right": round(right / int(counts.sum()), 4),
        "ci95": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "all_facts": round(float(said["all_facts"].mean()), 4),
        "cleanliness": round(float(said["cleanliness"].mean()), 4), "value": round(float(said["value"].mean()), 4),
        "kinds": {kind: round(float(said[f"facts/{kind}"].nanmean()), 4) for kind in KINDS},
    }  # fmt: skip


def drops(before: Tensor, after: Tensor) -> dict[str, float]:
    return {"mean_drop": round(float((before - after).mean()), 4),
            "share_lowered": round(float((after < before).float().mean()), 4)}  # fmt: skip


def faults(oracle: PocketOracle, count: int) -> dict[str, Any]:
    """Fall of the verdict, and of its two halves, for each drawing fault and severity."""
    of = scenes(count, "faults")
    pictures = [render(scene) for scene in of]
    before = judge(oracle, tensor(pictures), of)
    out: dict[str, Any] = {}
    for name, (fault, _) in FAULTS.items():
        for severity in SEVERITIES:
            rng = random.Random(f"{name}:{severity}")
            after = judge(oracle, tensor([fault(p, severity, rng) for p in pictures]), of)
            figures = drops(before["value"], after["value"])
            for part in ("facts", "cleanliness"):
                figures[part] = round(float(after[part].mean()), 4)
            out.setdefault(name, {})[str(severity)] = figures
    rng = random.Random("misread")
    after = judge(oracle, tensor([render(misread(scene, rng)) for scene in of]), of)
    out["misread"] = drops(before["value"], after["value"]) | {
        "facts": round(float(after["facts"].mean()), 4), "cleanliness": round(float(after["cleanliness"].mean()), 4),
        "share_noticed": round(1 - float(after["all_facts"].mean()), 4),
    }  # fmt: skip
    return out


def redrawn(oracle: PocketOracle, again: Callable[[Image.Image, random.Random], Image.Image], count: int) -> float:
    """Standard deviation of cleanliness within sixteen redrawings of a scene (new places, same fault), averaged."""
    rng = random.Random("redrawn")
    of = [place(scene, rng) for scene in scenes(count, "redrawn") for _ in range(16)]
    said = judge(oracle, tensor([again(render(scene), rng) for scene in of]), of)
    return round(float(said["cleanliness"].view(count, 16).var(1).mean().sqrt()), 4)


def card(report: dict[str, Any], training: dict[str, Any]) -> str:
    """The README that goes with the weights."""
    objects, clean, like = training["objects"], training["cleanliness"], training["likeness"]
    minutes = (objects["seconds"] + clean["seconds"] + like["seconds"]) / 60

    def row(name: str, said: dict[str, Any]) -> str:
        right, whole = 100 * said["facts_right"], 100 * said["all_facts"]
        return f"| {name} | {right:.1f} % | {whole:.1f} % | {said['cleanliness']:.3f} |"

    parameters = objects["parameters"] + clean["parameters"] + like["parameters"]
    rows = []
    for name, by_severity in report["faults"].items():
        if name in FAULTS:
            rows.append(
                f"| {name} | " + " | ".join(f"{by_severity[str(s)]['mean_drop']:.3f}" for s in SEVERITIES) + " |"
            )
    faults_table = "\n".join(rows)
    overall, labellers = report["person"]["overall"], report["person"]["labellers"]
    low, high = (100 * edge for edge in overall["ci95"])
    by_kind = "; ".join(f"{k}: {100 * v['agreement']:.0f} %" for k, v in report["person"]["samples"].items())
    return f"""---
license: apache-2.0
tags: [rewardtune]
---

# Pocket oracle: the held-out judge of the pocket world

Convolutional networks of {parameters / 1e6:.1f} M parameters (float16). One tower reads objects, tints, sizes, places
and background back out of a 64 x 64 picture; a second one, which also sees the first one's features, says how far the
picture is from a clean render of what it shows. A third network lays each object over the artwork of what the caption
asks for, kept as features, and says whether people would name it so. The judge shares with the scorer nothing but the
artwork: other training pictures, other architecture, other code. No shipped recipe trains on it.

How: `python dev/pocket/train_oracle.py`, {objects["steps"]:,} and {clean["steps"]:,} steps of {objects["batch"]}
pictures, then `python dev/pocket/train_likeness.py`, {like["steps"][0]:,} steps on drawings and {like["steps"][1]:,} on
what was said of {like["objects"]:,} objects in {like["pictures"]:,} other samples (`dev/pocket/oracle_lessons.jsonl`,
training prompts, two looks at each); seed {objects["seed"]}, {minutes:.0f} minutes on a busy core.

| pictures (held-out split, {report["clean"]["pictures"]:,}) | facts right | whole prompts right | cleanliness |
| --- | --- | --- | --- |
{row("clean renders", report["clean"])}
{row("the same through the autoencoder", report["autoencoder"])}

On {overall["facts"]:,} facts of samples of the pipeline, blurry and empty ones included, it agrees with what most of
{labellers["labellers"]} labellers say in {100 * overall["agreement"]:.1f} % [{low:.1f}, {high:.1f}]; the labellers
agree with each other in {100 * labellers["agreement"]:.0f} %. By kind of sample: {by_kind}.
The labellers were AI models that looked at sheets with the artwork asked for beside each picture, without the judge
(`dev/pocket/oracle_labels.jsonl`; `dev/pocket/oracle_agreement.py`).

Mean drop of the verdict (0 to 1) under drawing faults that it was not trained on, by severity:

| fault | {" | ".join(str(s) for s in SEVERITIES)} |
| --- | {" | ".join("---" for _ in SEVERITIES)} |
{faults_table}

Pictures of the same scenes drawn again differ in cleanliness by a standard deviation of
{report["cleanliness_spread"]["none"]:.3f}, with blur {report["cleanliness_spread"]["blur"]:.3f}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the weights")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1000)
    args = parser.parse_args()
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    oracle = PocketOracle(load(args.out), device="cpu")
    of = scenes(args.pictures, "clean")
    clean = tensor([render(scene) for scene in of])
    report: dict[str, Any] = {"clean": shares(judge(oracle, clean, of), of)}
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    with torch.no_grad():
        coded = [vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample / 2 + 0.5 for x in clean.split(50)]
    report["autoencoder"] = shares(judge(oracle, torch.cat(coded).clamp(0, 1), of), of)
    report["faults"] = faults(oracle, min(200, args.pictures))
    blur, smear = FAULTS["blur"][0], FAULTS["smear"][0]
    rows, _, said = judged(LABELS, IMAGES, oracle)
    report["person"] = agreement(rows, said)
    report["cleanliness_spread"] = {
        "none": redrawn(oracle, lambda p, rng: p, 20),
        "blur": redrawn(oracle, lambda p, rng: blur(p, 0.4, rng), 20),
        "smear": redrawn(oracle, lambda p, rng: smear(p, 0.4, rng), 20),
    }
    (args.out / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "README.md").write_text(card(report, json.loads((args.out / "training.json").read_text())))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
