"""`rewards new`: what it writes works as it stands, and it writes over nothing."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewardtune.cli.app import app
from rewardtune.cli.new import REWARD, TEST


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command in this process and an empty folder; returns exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            app(list(words))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.mark.parametrize("name", ["our-own-look", "none", "reward", "best-reward", "options"])
def test_its_own_test_passes_as_written(run, tmp_path, name):
    code, out, _ = run("rewards", "new", name, "--out", "deep/folder", "--json")
    module = name.replace("-", "_")
    assert code == 0
    assert json.loads(out) == {
        "name": name, "reward": f"deep/folder/{module}.py", "test": f"deep/folder/test_{module}.py",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_{module}.py"]
    done = subprocess.run(command, cwd=tmp_path / "deep/folder", capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_its_test_fails_where_the_reward_breaks_the_contract(run, tmp_path):
    run("rewards", "new", "broken-look")
    file = tmp_path / "broken_look.py"
    whole = file.read_text()
    file.write_text(whole.replace("(images - wanted)", "(images.detach() - wanted)"))
    assert file.read_text() != whole
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_broken_look.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "gradient reaches every image" in done.stdout, done.stdout


def test_it_can_be_listed_and_shown(run):
    code, out, _ = run("rewards", "new", "listed-look")
    assert code == 0 and out.splitlines()[-1] == "now: rewardtune rewards test listed-look --plugin listed_look.py"
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    show = [sys.executable, "-m", "rewardtune", "rewards", "show", "listed-look", "--plugin", "listed_look.py"]
    done = subprocess.run([*show, "--json"], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout)
    assert card["differentiable"] and card["needs_prompt"] and card["range"] == [0.0, 1.0]
    assert card["options"]["properties"]["grey"]["maximum"] == 1.0


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "test_my_look.py").write_text("mine\n")
    code, _, err = run("rewards", "new", "my-look")
    assert code == 2 and "test_my_look.py: already there, and nothing is overwritten" in err
    assert not (tmp_path / "my_look.py").exists() and (tmp_path / "test_my_look.py").read_text() == "mine\n"
    assert run("rewards", "new", "my-look", "--out", "other")[0] == 0
    before = (tmp_path / "other/my_look.py").read_bytes()
    code, _, err = run("rewards", "new", "my-look", "--out", "other")
    assert code == 2 and "other/my_look.py and other/test_my_look.py: already there" in err
    assert (tmp_path / "other/my_look.py").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My-Look", "words of small letters"),
        ("my_look", "words of small letters"),
        ("my--look", "words of small letters"),
        ("2look", "words of small letters"),
        ("../look", "words of small letters"),
        ("zreward", "'zreward' is there already (built-in)"),
        ("torch", "Python has a module torch"),
        ("json", "Python has a module json"),
    ],
)
def test_a_name_that_would_not_do(run, tmp_path, name, said):
    code, _, err = run("rewards", "new", name)
    assert code == 2 and said in err
    assert list(tmp_path.iterdir()) == []


def test_every_field_to_change_is_marked_and_no_heavy_import_stands_at_module_level():
    for template in (REWARD, TEST):
        ast.parse(template.replace("@NAME@", "a-b").replace("@MODULE@", "a_b").replace("@TITLE@", "ABReward"))
        assert template.count("CHANGE:") >= 4
    tree = ast.parse(REWARD.replace("@TITLE@", "T").replace("@NAME@", "t"))
    imported = {a.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module).split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "re", "collections", "typing", "pydantic", "rewardtune"}
    assert max(map(len, (REWARD + TEST).splitlines())) <= 120


def test_it_imports_no_torch(tmp_path):
    program = (
        "import sys\nfrom rewardtune.cli.app import app\n"
        "try:\n    app(['rewards', 'new', 'quick-look'])\nexcept SystemExit as left:\n    assert not left.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (Path(tmp_path) / "quick_look.py").is_file()
