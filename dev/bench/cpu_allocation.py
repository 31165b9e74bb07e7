"""What keeping freed memory saves on a CPU: steps of the demo's training, with and without `runtime`'s setting.

Each run is a process of its own; the two arms alternate. Writes cpu_allocation.json beside this script.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from rewardtune.training.track import read_metrics

ARMS = {"kept": "", "returned": "import rewardtune.training.runtime as r; r._keep_freed_memory = lambda: None; "}


def seconds(arm: str, steps: int) -> list[float]:
    """Seconds of each step after the first three."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            f"{ARMS[arm]}import rewardtune as rt; "
            f"rt.train('pocket/zreward', out={folder + '/run'!r}, overrides={{'train.steps': {steps}}})"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
        return [line["seconds"] for line in read_metrics(Path(folder) / "run" / "metrics.jsonl")][3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(args.runs):
        for arm in ARMS:
            found[arm] += seconds(arm, args.steps)
    report = {
        "seconds a step": {
            arm: {"min": round(min(f), 3), "median": round(statistics.median(f), 3), "count": len(f)}
            for arm, f in found.items()
        },
        "ratio of medians": round(statistics.median(found["kept"]) / statistics.median(found["returned"]), 3),
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": version("torch")},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
