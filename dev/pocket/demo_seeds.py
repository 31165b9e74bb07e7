"""The demo at several seeds beside arms that take the same time: dev/results/demo.{json,md}.

Arms: the reward is the SFT student of the same labels, which saw noise as the RISD student did, or clean pictures only;
what is maximised is not the score's expectation but a statistic that minds the whole distribution; SFT goes on. Needs
the captioned training pictures (`dev/pocket/make_scenes.py build/pocket/scenes`) and the SFT students (`make pocket`).
Finished runs are kept in build/demo and not repeated. About half an hour a seed on two cores.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewardtune.compare.statistics import net_win_rate, verdicts
from rewardtune.training.track import read_metrics

BUILD, RESULTS = Path("build/demo"), Path("dev/results")
STATISTIC = "rewards.0.statistic="
STUDENT = "rewards.0.options.checkpoint=build/pocket/runs/"
ARMS: dict[str, tuple[str, ...]] = {
    "zreward": ("pocket/zreward",),
    "sft-student": ("pocket/zreward", STUDENT + "student-sft/export"),
    "sft-student-clean": ("pocket/zreward", STUDENT + "student-sft-clean/export"),
    "minus-deviation": ("pocket/zreward", STATISTIC + "{kind: mean-minus-deviation, weight: 1.0}"),
    "lower-tail": ("pocket/zreward", STATISTIC + "{kind: lower-tail-mean, share: 0.25}"),
    "continued-sft": ("pocket/continue-sft",),
}
"""Arm -> its recipe and what differs from it."""


def rewardtune(*command: str) -> None:
    print("$ rewardtune", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "rewardtune", *command], check=True)


def training_seconds(run: Path) -> float:
    """Time of all optimiser steps, without start and export."""
    return float(sum(line["seconds"] for line in read_metrics(run / "metrics.jsonl")))


def means(document: dict[str, Any], side: str) -> dict[str, float]:
    """What the judge's parts and the trained reward say of a side's images."""
    judge = document["rewards"][side]["pocket-oracle"]["parts"]
    parts = {name: judge[name]["mean"] for name in ("facts", "all_facts", "cleanliness")}
    return {**parts, "trained_reward": document["rewards"][side]["zreward"]["mean"]}


def arm_row(document: dict[str, Any], side: str, run: Path, seed: int) -> dict[str, Any]:
    """One arm against the start: verdicts, parts of the judge, what the trained reward says, diversity."""
    pair = next(p for p in document["pairs"] if (p["a"], p["b"]) == (side, "base"))
    return {
        "arm": side.rpartition("-")[0], "seed": seed, "training_seconds": round(training_seconds(run)),
        "wins": pair["wins"], "ties": pair["ties"], "losses": pair["losses"],
        "net": pair["net"], "net_ci95": pair["net_ci95"],
        "facts_net": pair["parts"]["facts"]["net"], "facts_net_ci95": pair["parts"]["facts"]["net_ci95"],
        **means(document, side),
        "diversity_ratio": document["diversity_details"][side]["ratio"],
    }  # fmt: skip


def beside(document: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """The demo's own arm against each other one, on the same prompts and noise."""
    own, found = f"zreward-{seed}", []
    for pair in document["pairs"]:
        sides = [pair["a"], pair["b"]]
        if own in sides and "base" not in sides:
            sign = 1 if pair["a"] == own else -1
            arm = sides[sides[0] == own].rpartition("-")[0]
            found.append({"arm": arm, "seed": seed, "net": sign * pair["net"],
                          "net_ci95": sorted(sign * end for end in pair["net_ci95"])})  # fmt: skip
    return found


@functools.cache
def judged(seed: int) -> dict[str, dict[tuple[str, str], float]]:
    """Side -> (prompt, noise) -> what the judge says of that image."""
    values: dict[str, dict[tuple[str, str], float]] = {}
    with (BUILD / f"compare-{seed}/samples.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            drawn = row["prompt_index"], row["seed_index"]
            values.setdefault(row["side"], {})[drawn] = float(row["pocket-oracle"])
    return values


def together(arm: str, seeds: Sequence[int], tie_band: float) -> dict[str, Any]:
    """The demo's own arm against another one, all training seeds' images as one sample, resampled by prompt."""
    outcome, prompts = [], []
    for seed in seeds:
        own, other = judged(seed)[f"zreward-{seed}"], judged(seed)[f"{arm}-{seed}"]
        outcome.append(verdicts(np.array([own[k] for k in own]), np.array([other[k] for k in own]), band=tie_band))
        prompts += [int(prompt) for prompt, _ in own]
    found = net_win_rate(np.concatenate(outcome), np.array(prompts))
    return {"arm": arm, "seed": "all", "net": found.net, "net_ci95": list(found.ci95)}


def contests(rows: list[dict[str, Any]]) -> str:
    """Markdown of `beside` and `together`."""
    lines = ["| zreward against | seed | net (95 % interval) |", "| --- | --- | --- |"]
    for row in rows:
        low, high = row["net_ci95"]
        lines.append(f"| {row['arm']} | {row['seed']} | {row['net']:+z.3f} [{low:+z.3f}, {high:+z.3f}] |")
    return "\n".join(lines)


def against(arm: str, rows: list[dict[str, Any]]) -> str:
    """A sentence on the demo's arm beside another one, seed by seed; none where that arm was not run."""
    nets = {row["seed"]: row for row in rows if row["arm"] == arm}
    if "all" not in nets:
        return ""
    low, high = nets["all"]["net_ci95"]
    each = ", ".join(f"{row['net']:+z.3f}" for seed, row in nets.items() if seed != "all")
    return (
        f" Against `{arm}`, which saw the same noisy views: {nets['all']['net']:+z.3f} [{low:+z.3f}, {high:+z.3f}], by "
        f"seed {each}."
    )


def table(start: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Markdown; the start's own figures in the first row."""
    lines = [
        "| arm | seed | won / tied / lost | net (95 % interval) | net on facts alone | facts right | whole "
        "prompts right | cleanliness | reward | diversity of the start's |",
        "|" + " --- |" * 10,
        f"| SFT start | | | | | {start['facts']:.1%} | {start['all_facts']:.1%} | {start['cleanliness']:.3f} | "
        f"{start['trained_reward']:.2f} | |",
    ]
    for row in rows:
        net, facts = (
            f"{row[k]:+z.3f} [{row[f'{k}_ci95'][0]:+z.3f}, {row[f'{k}_ci95'][1]:+z.3f}]" for k in ("net", "facts_net")
        )
        lines.append(
            f"| {row['arm']} | {row['seed']} | {row['wins']} / {row['ties']} / "
            f"{row['losses']} | {net} | {facts} | {row['facts']:.1%} | {row['all_facts']:.1%} | "
            f"{row['cleanliness']:.3f} | {row['trained_reward']:.2f} | {row['diversity_ratio']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for seed in args.seeds:
        runs = {f"{arm}-{seed}": BUILD / f"{arm}-{seed}" for arm in args.arms}
        for arm, run in zip(args.arms, runs.values(), strict=True):
            recipe = ARMS[arm]
            if not (run / "export").is_dir():
                rewardtune("train", *recipe, f"train.seed={seed}", "--out", str(run))
                print(f"{arm}: {training_seconds(run):.0f} s of training", flush=True)
        report = BUILD / f"compare-{seed}"
        if not (report / "compare.json").is_file():
            rewardtune("compare", "base", *map(str, runs.values()), "--out", str(report))
        document = json.loads((report / "compare.json").read_text())
        rows += [arm_row(document, side, run, seed) for side, run in runs.items()]
        others += beside(document, seed)
    band = document["judge"]["tie_band"]
    others += [together(arm, args.seeds, band) for arm in args.arms if arm != "zreward"]
    for found in (rows, others):
        found.sort(key=lambda row: (list(ARMS).index(row["arm"]), str(row["seed"])))
    start = means(document, "base")  # the same images at every training seed
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"prompts": document["prompts"], "seeds_a_prompt": document["seeds"], "start": start, "arms": rows,
              "contests": others}  # fmt: skip
    (RESULTS / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "demo.md").write_text(
        "# The demo at several seeds\n\n"
        f"`python dev/pocket/demo_seeds.py`: {document['prompts']} held-out prompts, {document['seeds']} images each, "
        "judge `pocket-oracle`, every arm against the SFT start; intervals are bootstraps over prompts. All arms "
        "train the same adapters for about the same time (`training_seconds` in the JSON; a run on one core takes half "
        "as long again as on two). `reward` is what the shipped `pocket:zreward` says of their images. Contests of two "
        "arms are over the same prompts and noise; `all` takes the seeds' images as one sample, resampled by prompt. "
        "That interval does not resample training seeds: look at the seeds one by one for how much a training's luck "
        f"weighs.{against('sft-student', others)}\n\n" + table(start, rows) + "\n\n" + contests(others) + "\n"
    )
    print((RESULTS / "demo.md").read_text())


if __name__ == "__main__":
    main()
