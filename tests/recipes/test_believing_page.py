"""The commands and the Python of docs/believing-a-reward.md, in their order, on fewer labels and steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/believing-a-reward.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.timeout(900)
def test_every_command_works_when_pasted(tmp_path: Path):
    (tmp_path / "dev").symlink_to(ROOT / "dev")
    settings = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(words: list[str]) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        return done.stdout

    assert len(COMMANDS) == 3
    said = []
    for line in COMMANDS:
        words = shlex.split(line)
        words = ["12" if before == "--heldout" else word for before, word in zip(["", *words], words, strict=False)]
        said.append(run([*words, "--steps", "5", "--pictures", "1"] if words[2] == "probe" else words))
    calibration = json.loads((tmp_path / "calibration/calibration.json").read_text())
    assert calibration["verdict"]["headline"] == "Train on zreward. Keep pocket-oracle as judge."
    assert calibration["verdict"]["headline"] in said[1] and said[1].endswith("calibration/calibration.html\n")
    probe = json.loads((tmp_path / "probe/probe.json").read_text())
    assert probe["verdict"]["headline"] in said[2] and list(probe["judges"]) == ["pocket-oracle"]
    assert "Train on zreward" in run([sys.executable, "-c", PYTHON])


def test_the_rules_it_tells_are_those_of_the_code():
    from rewardtune.calibration.labels import FEWEST
    from rewardtune.calibration.verdict import CLOSE, FEW_PROMPTS
    from rewardtune.probe.ascent import BUDGETS, REACH
    from rewardtune.probe.run import PICTURES, STEPS
    from rewardtune.probe.verdict import RISE_OF_RANGE, RISE_OF_SCALE

    text = " ".join(PAGE.split())
    assert (FEWEST, FEW_PROMPTS) == (5, 50) and "Five prompts" in text and "50 the least" in text
    assert f"at most {100 * CLOSE:.0f} points less accurate" in text
    assert f"--budgets {','.join(map(str, BUDGETS))}" in text and f"is {REACH} times what" in text
    assert f"(`--steps`, {STEPS})" in text and f"`--pictures` ({PICTURES})" in text
    assert f"by {100 * RISE_OF_RANGE:.0f} % of its range, or by {RISE_OF_SCALE:.0f} of its card's scale" in text
