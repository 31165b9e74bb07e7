from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rewardtune.errors import DiskError
from rewardtune.training import checkpoint

STATE = {"a": 1, "lr": 0.1 + 0.2, "nothing": None}


def save(folder: Path, step: int, *, keep: int = 9, size: int = 10) -> Path:
    parts = {"parameters": {"w": torch.full((size,), float(step))}, "optimizer": {"state.0.step": torch.tensor(step)}}
    return checkpoint.save(folder, step=step, parts=parts, state=STATE, keep=keep)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    tensors = {
        "bf16": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(7.0),
        "ints": torch.arange(5, dtype=torch.uint8),
        "view": whole[1:3],
        "shared": whole,
        "transposed": whole.t(),
        "empty": torch.zeros(0),
        "special": torch.tensor([math.inf, -0.0, 1e-45]),
    }
    path = checkpoint.save(tmp_path, step=3, parts={"p": tensors, "none": {}}, state=STATE, keep=1)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.path == path and found.step == 3
    assert {key: found.state[key] for key in STATE} == STATE
    loaded = found.tensors("p")
    assert loaded.keys() == tensors.keys() and found.tensors("none") == {}
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_the_newest_ones_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15, 1_000_000):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000015", "step-1000000"]
    save(tmp_path, 1_000_001, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1000001"]


def test_a_checkpoint_is_there_at_every_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)
    looked = []
    for name in ("rename", "mkdir"):
        real = getattr(Path, name)

        def look(self: Path, *args: object, real: object = real, **kwargs: object) -> object:
            looked.append(checkpoint.newest(tmp_path, clean=False))
            result = real(self, *args, **kwargs)  # type: ignore[operator]
            looked.append(checkpoint.newest(tmp_path, clean=False))
            return result

        monkeypatch.setattr(Path, name, look)
    save(tmp_path, 2, keep=1)
    assert len(looked) >= 6
    assert [found.step for found in looked if found] == sorted(found.step for found in looked if found)
    assert None not in looked


FILES = ("parameters.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_damage_is_found_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / file
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        # In the manifest, hit the digest of a file: a bit of white space there changes nothing.
        data[data.index(b'sha256"') + 20 if file == "manifest.json" else len(data) // 2] ^= 1
    victim.write_bytes(
        {"flip": bytes(data), "truncate": bytes(data[: len(data) // 2]), "empty": b"", "delete": b""}[damage]
    )
    if damage == "delete":
        victim.unlink()
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    said = capsys.readouterr().err
    assert "step-000002 is damaged" in said
    assert file in said or file == "manifest.json"
    assert (tmp_path / "damaged-step-000002").is_dir()
    # The damaged one is out of the way of the next save and of pruning.
    save(tmp_path, 2, keep=1)
    again = checkpoint.newest(tmp_path)
    assert again is not None and again.step == 2


def test_nothing_valid_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "no folder") is None
    (save(tmp_path, 1) / "manifest.json").write_text("[]")
    assert checkpoint.newest(tmp_path) is None


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / ".tmp-step-000002"
    leftover.mkdir()
    (leftover / "parameters.safetensors").write_bytes(b"half")
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 1, size=100_000, keep=1)
    with no_file_larger_than(100_000), pytest.raises(DiskError, match="step 2"):
        save(tmp_path, 2, size=100_000, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    found = checkpoint.newest(tmp_path)
    assert found is not None and torch.equal(found.tensors("parameters")["w"], torch.ones(100_000))


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    checkpoint.write_json(path, {"a": 1})
    with no_file_larger_than(50_000), pytest.raises(OSError):
        checkpoint.write_json(path, {"a": "x" * 100_000})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}
