"""The wheel holds everything, and works outside of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"rewards": "rewardtune/rewards", "pipelines": "rewardtune/pipelines", "recipes": "rewardtune/recipes"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what a checkout holds, so that no build folder of this one takes part."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if name.split("/")[0] in ("rewardtune", "rewards", "pipelines", "recipes") or "/" not in name:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                target.write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        str(folder / "dist"),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stdout + built.stderr
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked, as an installer would."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def installed(site: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run with the unpacked wheel and the environment's other packages; -P keeps the current folder out of the way."""
    probe = (
        "import runpy, sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        "sys.argv = ['rewardtune', *sys.argv[1:]]\n"
        "runpy.run_module('rewardtune', run_name='__main__')\n"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", probe, *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_wheel_holds_every_file_of_every_package(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for folder in ("rewardtune", *ELSEWHERE):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                expected.add((Path(ELSEWHERE.get(folder, folder)) / file.relative_to(ROOT / folder)).as_posix())
    assert {"rewardtune/recipes/pocket/zreward.yaml", "rewardtune/rewards/zreward.py"} <= expected
    assert any(name.startswith("rewardtune/pocket/weights/") for name in expected)
    assert any(name.startswith("rewardtune/pocket/data/prompts/") for name in expected)
    bases = {name for name in expected if name.startswith("rewardtune/pocket/weights/") and "-base/" in name}
    assert bases and not bases & inside  # a checkout has them
    missing = expected - bases - inside
    assert not missing, f"add to [tool.setuptools.package-data]: {sorted(missing)[:20]}"


def test_the_wheel_leaves_nothing_bare_in_site_packages(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rewardtune"}


def test_the_weights_stay_small(wheel):
    with zipfile.ZipFile(wheel) as archive:
        weights = [entry for entry in archive.infolist() if entry.filename.startswith("rewardtune/pocket/weights/")]
        assert sum(entry.file_size for entry in weights) <= 40e6
        kinds = {Path(entry.filename).suffix for entry in weights}
    assert not kinds & {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy"}


def test_the_licence_and_notice_travel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert any(name.endswith("/licenses/NOTICE") for name in names)


def test_it_runs_outside_the_checkout(site, tmp_path):
    listed = installed(site, tmp_path, "recipes", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert f'"path": "{site}' in listed.stdout
    assert '"name": "pocket/zreward"' in listed.stdout
    rewards = installed(site, tmp_path, "rewards", "list")
    assert rewards.returncode == 0, rewards.stderr
    assert "zreward" in rewards.stdout
    valid = installed(site, tmp_path, "validate", "pocket/zreward", "train.steps=2")
    assert valid.returncode == 0, valid.stderr
    new = installed(site, tmp_path, "rewards", "new", "our-own-look")
    assert new.returncode == 0, new.stderr
    tested = installed(site, tmp_path, "rewards", "test", "our-own-look", "--plugin", "our_own_look.py")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_console_script_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"rewardtune": "rewardtune.cli.app:main"}


def test_constraints_meet_the_floors_and_name_the_tested_torch():
    from packaging.requirements import Requirement

    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version, f"constraints.txt: {line!r} pins no exact version"
            assert "+" not in version, f"constraints.txt: {line!r} names a local build that others cannot install"
            pinned[name.lower().replace("_", "-")] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [
        *project["dependencies"],
        *extras["pocket"],
        *extras["parquet"],
        *extras["tensorboard"],
        *extras["ocr"],
    ]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), line
        assert all(spec.operator == ">=" for spec in requirement.specifier), f"{line}: floors only"
    assert "torchvision" not in pinned
