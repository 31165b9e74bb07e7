"""Checkpoints that are either whole or not there: temporary folder, fsync, sha256 manifest, rename, prune.

`loop.py` decides what goes in; this file knows tensors and JSON only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewardtune.errors import DiskError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step-\d{6,}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file has the sha256 of its manifest."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors saved as `part`, on the CPU."""
        return load_file(self.path / f"{part}.safetensors")


def save(
    folder: Path, *, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `folder/step-<step>` and then drop all but the newest `keep`.

    Raises DiskError when something cannot be written; older checkpoints are then as before and nothing is left over.
    """
    target = folder / f"step-{step:06d}"
    temporary = folder / f".tmp-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for part, tensors in parts.items():
            save_file(_separate(tensors), temporary / f"{part}.safetensors")
        _write_json(temporary / STATE, {"step": step, **state})
        _write_json(temporary / MANIFEST, {"format": FORMAT, "step": step, "files": _digests(temporary)})
        open_to_readers(temporary)
        _sync(temporary)
        if target.exists():
            # Only a run that starts over from an older checkpoint comes here; a rename cannot replace a full folder.
            old = folder / f".tmp-old-{target.name}"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskError(
            f"checkpoint of step {step} could not be written to {folder} ({error}). "
            "Older checkpoints are untouched; free some disk space or name another folder with --out."
        ) from error
    _prune(folder, newest=target, keep=keep)
    return target


def open_to_readers(folder: Path) -> None:
    """Give every file what the umask allows: safetensors writes for its owner alone, and results are made to be shared.

    Raises OSError.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def newest(folder: Path, *, clean: bool = True) -> Checkpoint | None:
    """The newest valid checkpoint in `folder`, None when there is none.

    A newer one that is damaged is named on standard error with the reason. With `clean`, damaged ones are renamed to
    `damaged-*` and leftovers of interrupted writes are removed.
    """
    if not folder.is_dir():
        return None
    if clean:
        for leftover in folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    for path in _folders(folder):
        try:
            return read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"checkpoint {path} is damaged ({error}); trying an older one.", file=sys.stderr)
            if clean:
                aside = folder / f"damaged-{path.name}"
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    return None


def read(path: Path) -> Checkpoint:
    """Open one checkpoint. Raises ValueError or OSError naming the file that is missing or not as written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read") from error
    for name, known in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if _sha256(file) != known["sha256"]:
            raise ValueError(f"{name} is not as it was written")
    state = json.loads((path / STATE).read_bytes())
    return Checkpoint(path=path, step=int(state["step"]), state=state)


def size(parts: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(t.numel() * t.element_size() for tensors in parts.values() for t in tensors.values())


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        _write(temporary, text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _prune(folder: Path, *, newest: Path, keep: int) -> None:
    """Remove all but `keep`; a folder that cannot be removed costs space and nothing else."""
    others = [path for path in _folders(folder) if path != newest]
    for path in others[max(keep - 1, 0) :]:
        # Renamed first: a folder half removed must not look like a checkpoint.
        doomed = folder / f".tmp-old-{path.name}"
        try:
            path.rename(doomed)
        except OSError:
            continue
        shutil.rmtree(doomed, ignore_errors=True)
    for path in folder.glob(".tmp-old-*"):
        shutil.rmtree(path, ignore_errors=True)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone(memory_format=torch.contiguous_format)
            storage = plain.untyped_storage()
        seen.add(storage.data_ptr())
        result[name] = plain
    return result


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Flush every file to disk and hash what can be read back."""
    result = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        result[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    return result


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
