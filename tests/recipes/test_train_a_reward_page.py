"""The commands of docs/train-a-reward.md, in their order, on fewer steps."""

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
PAGE = (ROOT / "docs/train-a-reward.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.timeout(900)
def test_every_command_works_when_pasted(tmp_path: Path):
    (tmp_path / "dev").symlink_to(ROOT / "dev")
    settings = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    fewer = {"--labelled": "6", "--unlabelled": "3", "--development": "3", "--test": "1"}
    assert len(COMMANDS) == 7
    for line in COMMANDS:
        words = shlex.split(line)
        words = [fewer.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        if words[:2] == ["rewardtune", "train"]:
            words += ["train.steps=2", "train.batch_size=2"]
            words += ["objective.group_size=2"] if "gdso" in words[2] else ["teacher.batch_size=12"]
        done = subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    # each stage started from the one before
    teacher, student = (json.loads((tmp_path / f"runs/{name}/export/rewardtune.json").read_text())
                        for name in ("teacher", "student"))  # fmt: skip
    assert teacher["base"] == "pocket:teacher-base" and student["base"] == "pocket:student-base"
    book = json.loads((tmp_path / "runs/teacher/judgements/book.json").read_text())
    assert book["teacher"] == "runs/teacher/export" and book["items"] == 12


def test_its_yaml_is_a_recipes():
    import yaml

    from rewardtune.recipe.rewards import RewardSection
    from rewardtune.recipe.sections import DanceSection, GdsoSection, ScorerSection, TeacherSection

    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    dance, rollouts, teacher, rewards = blocks
    DanceSection.model_validate(dance["objective"])
    ScorerSection.model_validate(rollouts["scorer"])
    GdsoSection.model_validate(rollouts["objective"])
    TeacherSection.model_validate(teacher["teacher"])
    RewardSection.model_validate(rewards["rewards"][0])
