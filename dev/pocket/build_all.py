"""Rebuild the pocket world and every shipped weight from nothing: `make pocket`. Hours on two cores.

Each stage is skipped where its result is there already; delete build/pocket to start over. The order is part of the
method: world, judge and annotators' panel first, then what is judged.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

BUILD = Path("build/pocket")
WEIGHTS = Path("rewardtune/pocket/weights")
STAGES = [5250, 6750, 8250]
"""Optimiser steps of the SFT run whose samples the annotators see, beside those of the finished pipeline."""


def run(result: Path, *command: str) -> None:
    """Run a stage unless its result exists."""
    if result.exists():
        print(f"{result} is there", flush=True)
        return
    print("$", " ".join(command), flush=True)
    # one thread a process: two beside other work are many times slower than one
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")})


def main() -> None:
    python, train = sys.executable, [sys.executable, "-m", "rewardtune", "train"]
    script = Path("dev/pocket")
    scenes, vae, untrained = BUILD / "scenes", BUILD / "vae", BUILD / "untrained"
    run(scenes / "manifest.jsonl", python, str(script / "make_scenes.py"), str(scenes))
    run(vae / "config.json", python, str(script / "train_vae.py"), "--out", str(vae))
    oracle = WEIGHTS / "oracle"
    run(oracle / "model.safetensors", python, str(script / "train_oracle.py"), "--out", str(oracle), "--vae", str(vae))
    run(
        oracle / "likeness.safetensors",
        python, str(script / "train_likeness.py"), "--out", str(oracle), "--vae", str(vae),
        "--drawn", str(BUILD / "likeness-drawn.pt"),
    )  # fmt: skip
    run(oracle / "metrics.json", python, str(script / "measure_oracle.py"), "--out", str(oracle), "--vae", str(vae))
    run(
        untrained / "model_index.json",
        python, str(script / "init_pipeline.py"), "--vae", str(vae), "--out", str(untrained),
    )  # fmt: skip
    base = BUILD / "runs/base-sft"
    run(base / "export/model_index.json", *train, "pocket/base-sft", "--out", str(base))
    run(
        WEIGHTS / "pipeline/model_index.json",
        python, str(script / "ship_pipeline.py"), str(base / "export"), str(WEIGHTS / "pipeline"),
    )  # fmt: skip
    samples = BUILD / "samples"
    run(
        samples / "samples.jsonl",
        python, str(script / "sample_stages.py"),
        "--stages", *(str(base / f"checkpoints/step-{step:06d}") for step in STAGES), "--out", str(samples),
    )  # fmt: skip
    scorer_base = BUILD / "scorer-base"
    run(scorer_base / "config.json", python, str(script / "pretrain_scorer.py"), "--out", str(scorer_base))
    # The bases of the Z-Reward table; their world comes before any method, too.
    run(BUILD / "judgements/test.jsonl", python, str(script / "make_judgements.py"), str(BUILD / "judgements"))
    reasoning = {"teacher": "1300", "student": "600"}
    for size, steps in reasoning.items():
        base = BUILD / f"{size}-base"
        run(
            base / "config.json",
            python, str(script / "pretrain_reasoning.py"), "--size", size, "--steps", steps, "--out", str(base),
        )  # fmt: skip
    run(
        WEIGHTS / "student-base/metrics.json",
        python, str(script / "ship_reasoning.py"), *(str(BUILD / f"{size}-base") for size in reasoning),
    )  # fmt: skip
    run(
        BUILD / "annotations/train.jsonl",
        python, str(script / "annotate.py"), str(BUILD / "annotations"), "--samples", str(samples), "--vae", str(vae),
    )  # fmt: skip
    # The scorer's recipe starts from the shipped base, so that is in its place first.
    shutil.copytree(scorer_base, WEIGHTS / "scorer-base", dirs_exist_ok=True)
    scorer = BUILD / "runs/scorer-sft"
    run(scorer / "export/rubric.json", *train, "pocket/scorer-sft", "--out", str(scorer))
    # A second round: pipelines tuned against the first scorer show what it overrates.
    tuned = [BUILD / f"runs/tuned-{rate}" for rate in ("2e-3", "5e-3")]
    for folder in tuned:
        rate = folder.name.removeprefix("tuned-")
        options = [
            f"rewards.0.options.checkpoint={scorer / 'export'}",
            f"optimizer.lr={rate}",
            "gradient={method: draft, last_steps: all, memory: fast}",
            "augment.noise=0.04",
            "guard=null",
        ]
        run(folder / "export/README.md", *train, "pocket/zreward", "--out", str(folder), *options)
    more, rated = BUILD / "samples-tuned", BUILD / "annotations-tuned"
    run(
        more / "samples.jsonl",
        python, str(script / "sample_stages.py"), "--adapters", *(str(folder / "export") for folder in tuned),
        "--seed", "5", "--out", str(more),
    )  # fmt: skip
    run(
        rated / "train.jsonl",
        python, str(script / "annotate.py"), str(rated), "--samples", str(more), "--vae", str(vae),
        "--train", "1500", "--seed", "22",
    )  # fmt: skip
    refreshed = BUILD / "runs/scorer-refresh"
    run(refreshed / "export/rubric.json", *train, "pocket/scorer-refresh", "--out", str(refreshed))
    # The demo's reward: what the table's teacher, which had 300 labelled groups, says of other pictures. Beside
    # it, for comparison, students of the same base that learn those labels by SFT, with and without noisy views.
    teacher, student = BUILD / "runs/teacher-gdso", BUILD / "runs/zreward-student"
    run(teacher / "export/rubric.json", *train, "pocket/teacher-gdso", "--out", str(teacher))
    run(student / "export/rubric.json", *train, "pocket/zreward-student", "--out", str(student))
    for name, noise in {"student-sft": 0.1, "student-sft-clean": 0.0}.items():
        sft = BUILD / "runs" / name
        options = ["scorer.model=pocket:student-base", f"objective.noise={noise}"]
        run(sft / "export/rubric.json", *train, "pocket/teacher-sft", *options, "--out", str(sft))
    shipped = {
        "zreward": (student, BUILD / "judgements/development.jsonl",
                    "`pocket/teacher-gdso`, then `pocket/zreward-student`; `make pocket` runs both."),
        "held-out-scorer": (refreshed, rated / "heldout.jsonl",
                            "`pocket/scorer-sft`, then `pocket/scorer-refresh`; `make pocket` runs both."),
    }  # fmt: skip
    for name, (trained, data, how) in shipped.items():
        subprocess.run(
            [python, str(script / "ship_scorer.py"), str(trained / "export"), str(WEIGHTS / name), "--data", str(data),
             "--how", how], check=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
