"""Writing what a command leaves behind: whole files or none, and text that is safe where it is shown."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardtune.errors import DiskError

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Written:
    """What a command has left behind. document: what its JSON file holds. page: the page for people."""

    folder: Path
    document: dict[str, Any]
    page: Path


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and its folders; an interrupted or failed write leaves the old file. Raises DiskError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DiskError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space, or name another folder with "
            "--out; images that are already there are used again."
        ) from error


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(text: str) -> str:
    """Text for a terminal or a page: without control characters (C0, C1) and marks that turn the direction of writing.

    Line breaks and tabs become spaces.
    """
    return _CONTROLS.sub("", text.replace("\n", " ").replace("\t", " ").replace("\r", " "))


def csv_cell(text: str) -> str:
    """Text for a CSV cell: what a spreadsheet would run as a formula gets an apostrophe in front."""
    text = plain(text)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
