"""Copy a trained scorer's export into the package and put what `rewardtune evaluate` measures into its card.

Run by `make pocket` after the last round of `reward_sft`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

FIGURES = {
    "hpa": "HPA",
    "margin_hpa": "margin HPA",
    "near_hpa": "near HPA",
    "plcc": "PLCC",
    "srcc": "SRCC",
    "ece": "ECE",
}


def table(report: dict[str, Any]) -> str:
    """Overall and by dimension, each figure with its 95 % interval."""

    def row(name: str, said: dict[str, Any]) -> str:
        cells = (f"{said[k]:.3f} [{said['ci95'][k][0]:.3f}, {said['ci95'][k][1]:.3f}]" for k in FIGURES)
        return f"| {name} | {' | '.join(cells)} |"

    head = f"| | {' | '.join(FIGURES.values())} |\n|{' --- |' * (len(FIGURES) + 1)}"
    return "\n".join([head, row("all", report), *(row(k, v) for k, v in report["dimensions"].items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="held-out preference records")
    parser.add_argument("--how", required=True, help="how it was trained, a sentence for the card")
    args = parser.parse_args()
    command = [sys.executable, "-m", "rewardtune", "evaluate", "--scorer", str(args.export), "--data", str(args.data)]
    report = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(args.target, ignore_errors=True)
    shutil.copytree(args.export, args.target)
    card = args.target / "README.md"
    head, mark, facts = card.read_text().rpartition("| | |\n| --- | --- |\n")
    assert mark, f"{card} is not the card of an export"
    card.write_text(
        f"{head}Measured with `rewardtune evaluate` on {report['groups']} held-out groups of four (simulated "
        f"annotators), 95 % intervals:\n\n{table(report)}\n\nHow: {args.how}\n\n{mark}{facts}"
    )


if __name__ == "__main__":
    main()
