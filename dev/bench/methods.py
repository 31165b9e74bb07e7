"""The ways to take the reward gradient, at equal seconds on the pocket pipeline, five seeds: methods.{json,md,png}.

    python dev/bench/methods.py          # the timing needs an idle machine, the rest does not; resumes
    python dev/bench/methods.py --seconds 120 --methods draft-all alignprop drtune flowbp-sparse draft-2
                                         # a second budget: methods-120.{json,md,png}

Each method is first timed for a few steps and then given the optimiser steps that fit into `--seconds` of training.
Everything else is the demo's recipe: adapters, views, rates (Muon, whose updates have the same size whatever the
gradient's norm, so that one rate serves all), rewards, prompts; no guard. Judged by `pocket-oracle` against the SFT
start, on validation prompts, because the demo's method may be chosen from it. Needs matplotlib (`pip install -e
'.[table]'`) for the picture. Finished parts are kept in build/methods.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rewardtune.training.track import read_metrics

BUILD = Path("build/methods")
METHODS = {
    "refl": ("gradient={method: refl, earliest: 0.5}",),
    "refl-any": ("gradient={method: refl, earliest: 0.0}",),
    "draft-1": ("gradient={method: draft, last_steps: 1, memory: fast}",),
    "draft-2": ("gradient={method: draft, last_steps: 2, memory: fast}",),
    "draft-all": ("gradient={method: draft, last_steps: all, memory: fast}",),
    "draft-lv": ("gradient={method: draft_lv, memory: fast}",),
    "alignprop": ("gradient={method: alignprop, memory: fast}",),
    "drtune": ("gradient={method: drtune, memory: fast}",),
    "direct-align": ("gradient={method: direct_align}",),
    "srpo": (
        "gradient={method: direct_align}",
        "rewards.0.relative={positive: Realistic photo, negative: CG render, k: 1.0}",
    ),
    "flowbp-sparse": ("gradient={method: flowbp_sparse, active_steps: 3, memory: fast}",),
}
"""Name -> changes to the recipe, whose roll-outs have four steps.

SRPO's phrases are its paper's, k is ours: the pocket scorer has never read of photos, and with k = 0 next to nothing
would be left. It puts the two 0.03 apart in alignment and 0.002 in realism, where pictures differ by 0.3 and 0.6.
"""
TIMED, WARM = 8, 3
SEEDS = 5


def rewardtune(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "rewardtune", *command], check=True)


def train(method: str, seed: int, steps: int, out: Path) -> Path:
    """A finished run of so many steps."""
    if not (out / "finished.json").exists():
        rewardtune("train", "pocket/zreward", *METHODS[method], f"train.steps={steps}", f"train.seed={seed}",
                   "samples.every=100000", "guard=null", "--out", str(out))  # fmt: skip
    return out


def seconds(run: Path) -> list[float]:
    return [float(line["seconds"]) for line in read_metrics(run / "metrics.jsonl")]


def step_seconds() -> dict[str, float]:
    """The median step of a short run of each method."""
    file = BUILD / "step-seconds.json"
    if not file.exists():
        found = {m: statistics.median(seconds(train(m, 0, TIMED, BUILD / f"timed-{m}"))[WARM:]) for m in METHODS}
        file.write_text(json.dumps(found))
    return dict(json.loads(file.read_text()))


def rows_of(
    document: dict[str, Any], runs: Mapping[str, Path], seed: int, took: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row a method: what the judge says of it against the start. took: seconds of a step, alone on the machine."""
    out = []
    for method, run in runs.items():
        side = run.name
        pair = next(p for p in document["pairs"] if (p["a"], p["b"]) == (side, "base"))
        steps = len(seconds(run))
        judge = document["rewards"][side]["pocket-oracle"]
        out.append({
            "method": method, "seed": seed, "steps": steps, "seconds": steps * took[method], "net": pair["net"],
            "net_ci95": pair["net_ci95"], "facts_net": pair["parts"]["facts"]["net"], "verdict_gain": judge["delta"],
            "trained_gain": document["rewards"][side]["zreward"]["delta"],
            "diversity_ratio": document["diversity_details"][side]["ratio"],
        })  # fmt: skip
    return out


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Methods by their mean verdict, with a t interval over seeds."""
    from scipy.stats import t

    out = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line: dict[str, Any] = {"method": method, "seeds": len(own), "steps": own[0]["steps"]}
        for key in ("seconds", "net", "facts_net", "verdict_gain", "trained_gain", "diversity_ratio"):
            values = np.array([row[key] for row in own])
            half = float(t.ppf(0.975, len(own) - 1) * values.std(ddof=1) / len(own) ** 0.5) if len(own) > 1 else None
            line[key] = {"mean": float(values.mean()), "half_width": half}
        out.append(line)
    return sorted(out, key=lambda line: -line["verdict_gain"]["mean"])


def table(lines: list[dict[str, Any]]) -> str:
    def cell(entry: dict[str, Any], form: str) -> str:
        half = "" if entry["half_width"] is None else f" ± {format(entry['half_width'], form.lstrip('+'))}"
        return format(entry["mean"], form) + half

    out = ["| method | steps | seconds | verdict over the start | net | net on facts | trained reward | diversity |",
           "|" + " --- |" * 8]  # fmt: skip
    for line in lines:
        out.append(
            f"| {line['method']} | {line['steps']} | {line['seconds']['mean']:.0f} | "
            f"{cell(line['verdict_gain'], '+.3f')} | {cell(line['net'], '+.2f')} | {cell(line['facts_net'], '+.2f')} | "
            f"{cell(line['trained_gain'], '+.2f')} | {line['diversity_ratio']['mean']:.0%} |"
        )
    return "\n".join(out)


def draw(lines: list[dict[str, Any]], file: Path, before: dict[str, Any] | None) -> None:
    """Held-out gain against trained gain, a point a method; and a ring where it was at the budget `before`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    at = {line["method"]: (line["trained_gain"]["mean"], line["verdict_gain"]["mean"]) for line in lines}
    old = {line["method"]: line for line in before["methods"]} if before else {}
    for line in lines:
        x, y = line["trained_gain"], line["verdict_gain"]
        drawn = axes.errorbar(x["mean"], y["mean"], xerr=x["half_width"], yerr=y["half_width"], fmt="o", capsize=2,
                              label=line["method"])  # fmt: skip
        if line["method"] in old:
            was = [old[line["method"]][key]["mean"] for key in ("trained_gain", "verdict_gain")]
            axes.plot([was[0], x["mean"]], [was[1], y["mean"]], color=drawn[0].get_color(), linewidth=0.8, zorder=0)
            axes.plot(*was, "o", color=drawn[0].get_color(), markerfacecolor="white", zorder=0)
        if not old:
            # its name stands to the left where another point is close on the right
            left = any(0 < a - x["mean"] < 0.02 and abs(b - y["mean"]) < 0.004 for a, b in at.values())
            axes.annotate(line["method"], at[line["method"]], textcoords="offset points", fontsize=8,
                          xytext=(-5 if left else 5, 5), ha="right" if left else "left")  # fmt: skip
    if old:
        axes.legend(loc="lower right", fontsize=8)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("gain of the trained reward")
    axes.set_ylabel("gain of the held-out judge's verdict")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="training time of each run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    took = step_seconds()
    steps = {method: max(1, round(args.seconds / took[method])) for method in args.methods}
    # a second budget stands beside the first, in files of its own
    mark = "" if args.seconds == 60 else f"-{args.seconds}"
    build = Path(f"{BUILD}{mark}")
    build.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        runs = {m: train(m, seed, steps[m], build / f"{m}-{seed}") for m in args.methods}
        report = build / f"compare-{seed}"
        if not (report / "compare.json").exists():
            rewardtune("compare", "base", *map(str, runs.values()), "--prompts", "pocket:prompts/validation",
                       "--num-prompts", "128", "--seeds", "1", "--out", str(report))  # fmt: skip
        rows += rows_of(json.loads((report / "compare.json").read_text()), runs, seed, took)
    lines = summary(rows)
    here = Path(__file__).with_stem(Path(__file__).stem + mark)
    document = {"what": "methods at equal seconds of training, pocket pipeline, judged by pocket-oracle",
                "seconds": args.seconds, "seeds": args.seeds, "methods": lines, "rows": rows}  # fmt: skip
    here.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    here.with_suffix(".md").write_text(table(lines) + "\n")
    first = Path(__file__).with_suffix(".json")
    draw(lines, here.with_suffix(".png"), json.loads(first.read_text()) if mark and first.exists() else None)
    print(table(lines))


if __name__ == "__main__":
    main()
