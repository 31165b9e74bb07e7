"""Does the guard catch a run that goes wrong? Three seeds, with and without it: dev/results/guard.{json,md}.

The run is made to go wrong: ten times the demo's learning rate, the exact gradient through all steps, and a scorer with
a planted blind spot (`blind_spot.py`). The guard sees validation prompts by `--held-out`, a scorer that the run is not
trained on; both exports are then judged by `pocket-oracle` on held-out prompts, which neither has seen. Finished parts
are kept in build/guard-proof and not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BUILD, RESULTS = Path("build/guard-proof"), Path("dev/results")
PLUGIN = str(Path(__file__).with_name("blind_spot.py"))
TOO_STRONG = ("gradient={method: draft, last_steps: all, memory: fast}", "optimizer.lr=1e-2", "train.steps=120")
ARMS = {"unguarded": "warn", "guarded": "roll_back"}
"""Arm -> what its guard does; both are looked at, so that the curves are there."""


def rewardtune(*command: str) -> None:
    print("$ rewardtune", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "rewardtune", *command], check=True)


def guard_of(action: str, held_out: str) -> str:
    return (
        f"guard={{prompts: pocket:prompts/validation, num_prompts: 64, seeds: 1, every: 10, action: {action}, "
        f"rewards: [{{name: zreward, options: {{checkpoint: {held_out!r}}}}}], steps: 4, guidance_scale: 2.0, "
        "batch_size: 32}"
    )


def row(document: dict[str, Any], arm: str, seed: int, run: Path) -> dict[str, Any]:
    side = run.name
    pair = next(p for p in document["pairs"] if (p["a"], p["b"]) == (side, "base"))
    guard = document["guards"][side]
    return {
        "arm": arm, "seed": seed, "exported_step": guard["exported_step"], "last_step": guard["looks"][-1]["step"],
        "reasons": guard["reasons"], "net": pair["net"], "net_ci95": pair["net_ci95"],
        "facts_net": pair["parts"]["facts"]["net"], "diversity_ratio": document["diversity_details"][side]["ratio"],
        "curve": guard["looks"],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| arm | seed | exported step | last step | net against the start | net on facts | diversity | why |",
             "|" + " --- |" * 8]  # fmt: skip
    for r in rows:
        low, high = r["net_ci95"]
        lines.append(
            f"| {r['arm']} | {r['seed']} | {r['exported_step']} | {r['last_step']} | {r['net']:+z.3f} "
            f"[{low:+z.3f}, {high:+z.3f}] | {r['facts_net']:+z.3f} | {r['diversity_ratio']:.0%} | "
            f"{'; '.join(r['reasons']) or 'it did not'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", required=True, help="a scorer's export")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        runs = {arm: BUILD / f"{arm}-{seed}" for arm in ARMS}
        for arm, run in runs.items():
            if not (run / "finished.json").exists():
                rewardtune("train", "pocket/zreward", *TOO_STRONG, "rewards=[{name: blind-spot}]", f"train.seed={seed}",
                           "compare.rewards=[]", guard_of(ARMS[arm], args.held_out), "--plugin", PLUGIN,
                           "--out", str(run))  # fmt: skip
        report = BUILD / f"compare-{seed}"
        if not (report / "compare.json").is_file():
            rewardtune("compare", "base", *map(str, runs.values()), "--plugin", PLUGIN, "--out", str(report))
        document = json.loads((report / "compare.json").read_text())
        rows += [row(document, arm, seed, run) for arm, run in runs.items()]
    rows.sort(key=lambda r: (list(ARMS).index(r["arm"]), r["seed"]))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "guard.json").write_text(json.dumps({"held_out": args.held_out, "runs": rows}, indent=1) + "\n")
    (RESULTS / "guard.md").write_text(
        "# A run that goes wrong, with and without its guard\n\n"
        "`python dev/pocket/guard_proof.py`: the demo's recipe at ten times its learning rate, with the exact gradient "
        "through all steps, trained on a scorer with a planted blind spot; judged by `pocket-oracle` on held-out "
        "prompts against the SFT start.\n\n"
        + table(rows) + "\n"
    )  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
