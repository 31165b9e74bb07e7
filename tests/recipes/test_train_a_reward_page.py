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
from PIL import Image

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


def test_the_commands_within_its_text_work(tmp_path: Path):
    inside = re.findall(r"`((?:rewardtune|python|vllm) [^`]*)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    inside = [" ".join(line.split()) for line in inside]
    # `evaluate` is run with all that it needs above, the table takes hours and has a test of its own, vLLM wants a GPU
    elsewhere = {"rewardtune evaluate", "python dev/pocket/zreward_table.py run", "vllm serve",
                 "vllm serve runs/teacher/export --served-model-name teacher"}  # fmt: skip
    assert set(inside) - elsewhere == {"rewardtune recipes list", "rewardtune data import"}

    def run(line: str) -> str:
        words = [sys.executable, "-m", *shlex.split(line)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
        return done.stdout

    # "shows both kinds"
    listed = run("rewardtune recipes list")
    assert all(name in listed for name in ("pocket/teacher-gdso", "pocket/student-risd", "zreward/teacher-27b-gdso",
                                           "zreward/student-9b-risd"))  # fmt: skip
    # a public set comes in, and what the page does next with records takes it
    rows = []
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 90, 30)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "prompt_id": f"p{i // 2}", "prompt": "a fox", "rank": 1 + i % 2,
                     "overall_rating": 7 - i, "image_text_alignment_rating": 6 - i, "fidelity_rating": 4})  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(rows))
    run("rewardtune data import imagerewarddb train.json --out imported")
    (evaluate,) = [line for line in COMMANDS if line.startswith("rewardtune evaluate --scorer pocket:teacher-base")]
    found = json.loads(run(re.sub(r"--data \S+", "--data imported/records.jsonl", evaluate) + " --json"))
    assert found["images"] == 4 and found["dimensions"]["alignment"]["pairs"] == 2


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
