"""Rows of text, JSON-lines and Parquet files with their line numbers, and the checks that every format shares.

Below `records.py`, which knows what the columns mean. Mistakes are collected, so that a person mends a file in one go.
"""

from __future__ import annotations

import json
import math
import os
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewardtune.errors import DataError, MissingExtra

LOWEST, HIGHEST = 1.0, 5.0
"""Range of a score."""
MAX_TEXT = 10_000
"""Ours: characters of a prompt, caption or critique; text encoders read a few hundred words at most."""
MAX_LINE = 4 << 20
"""Ours: bytes of one line."""
SHOWN = 20
"""Ours: mistakes listed before the rest is only counted."""

Row = dict[str, Any]


def counted(number: int, noun: str) -> str:
    """`1 picture`, `2,000 pictures`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Mistakes:
    """Collects what is wrong with one file, so that a person can mend all of it in one go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []
        self.count = 0

    def add(self, line: int, text: str) -> None:
        self.count += 1
        if len(self.found) < SHOWN:
            self.found.append(f"{self.path}:{line}: {text}")

    def stop(self) -> None:
        """Raise if there was any mistake."""
        if not self.count:
            return
        rest = self.count - len(self.found)
        head = "1 mistake" if self.count == 1 else f"{self.count:,} mistakes"
        more = f"\n... and {rest:,} more" if rest else ""
        raise DataError(f"{self.path}: {head}.\n" + "\n".join(self.found) + more)


class ImageFolder:
    """Resolves the paths of a manifest; nothing outside its folder, no devices, no URLs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder.resolve()
        self.parents: dict[Path, Path] = {}

    def find(self, name: Any, column: str, line: int, mistakes: Mistakes) -> Path | None:
        """The real path of an existing file, or None after noting why not."""
        reason = self._refusal(name)
        if reason is None:
            return self._real(name)
        mistakes.add(line, f"`{column}`: {reason}")
        return None

    def _real(self, name: str) -> Path:
        """`Path.resolve`, asking the system about each folder only once."""
        path = self.root / name
        if path.name in ("", ".."):
            return path.resolve()
        if path.parent not in self.parents:
            self.parents[path.parent] = path.parent.resolve()
        path = self.parents[path.parent] / path.name
        return path.resolve() if path.is_symlink() else path

    def _refusal(self, name: Any) -> str | None:
        if not isinstance(name, str) or not name:
            return f"expected the path of a picture, found {short(name)}."
        if _bad_character(name) is not None or "\n" in name or "\t" in name:
            return f"the path {short(name)} holds control characters."
        if "://" in name or name.startswith("data:"):
            return f"{short(name)} is a URL; nothing is fetched. Download it and give a path beside this file."
        try:
            resolved = self._real(name)
            if not resolved.is_relative_to(self.root):
                return f"{short(name)} leaves the folder {self.folder.absolute()}; put the picture under it."
            mode = os.stat(resolved).st_mode
        except FileNotFoundError:
            return f"there is no file {short(name)} under {self.folder.absolute()}."
        except (OSError, ValueError, RuntimeError) as error:
            return f"{short(name)} cannot be opened ({error})."
        if not stat.S_ISREG(mode):
            return f"{short(name)} is not a regular file (a folder, device or pipe)."
        return None


def text_lines(path: Path, mistakes: Mistakes) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file with their numbers, without line ends; mistakes in encoding are noted, not raised."""
    with path.open("rb") as file:
        line = 0
        while data := file.readline(MAX_LINE + 1):
            line += 1
            if len(data) > MAX_LINE:
                mistakes.add(line, f"the line is longer than {MAX_LINE >> 20} MiB; the rest of the file was not read.")
                return
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                mistakes.add(line, f"not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8.")
                continue
            yield line, text.removesuffix("\n").removesuffix("\r")


def read_rows(path: Path, mistakes: Mistakes) -> Iterator[tuple[int, Row]]:
    """Rows of a .jsonl or .parquet file with their line (or row) numbers; null columns are left out."""
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".parquet"):
        if suffix == ".txt":
            raise DataError(
                f"{path}: a .txt file holds prompts alone; give rows with other columns as .jsonl or .parquet."
            )
        found = f"the name ends in {suffix}" if suffix else "the name has no ending"
        raise DataError(f"{path}: expected a .jsonl or .parquet file (or .txt for prompts), and {found}.")
    ids: dict[str, int] = {}
    for line, row in _parquet_rows(path) if suffix == ".parquet" else _json_rows(path, mistakes):
        row = {name: value for name, value in row.items() if value is not None}
        if "id" in row:
            first = ids.setdefault(str(row["id"]), line)
            if first != line:
                mistakes.add(line, f"`id` {short(row['id'])} is that of line {first} already; each must be its own.")
                continue
        yield line, row


def _json_rows(path: Path, mistakes: Mistakes) -> Iterator[tuple[int, Row]]:
    for line, text in text_lines(path, mistakes):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            mistakes.add(line, f"not a JSON object on one line ({error or 'nested too deeply'}).")
            continue
        if not isinstance(row, dict):
            mistakes.add(line, f"expected a JSON object such as {{...}}, found {short(row)}.")
            continue
        yield line, row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(f"{path}: reading Parquet needs pyarrow: pip install 'rewardtune[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from None


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(f"{path}: writing Parquet needs pyarrow: pip install 'rewardtune[parquet]'") from None
    names = sorted({name for row in rows for name in row})
    # metadata has no common shape, so it travels as JSON text; pyarrow takes its columns from the first row alone
    filled = [{n: json.dumps(row[n]) if n == "metadata" and n in row else row.get(n) for n in names} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(filled), path)


def _bad_character(text: str) -> str | None:
    """Why a text cannot be a prompt: C0 and C1 codes drive terminals, lone surrogates cannot be written."""
    for character in text:
        if character in "\t\n":
            continue
        category = unicodedata.category(character)
        if category == "Cc":
            return f"the control character U+{ord(character):04X}"
        if category == "Cs":
            return f"half a character (U+{ord(character):04X})"
    return None


def check_text(text: Any, column: str, line: int, mistakes: Mistakes) -> bool:
    if not isinstance(text, str):
        found = "nothing" if text is None else short(text)
        mistakes.add(line, f"`{column}`: expected a text, found {found}.")
    elif not text.strip():
        mistakes.add(line, f"`{column}` is empty.")
    elif len(text) > MAX_TEXT:
        mistakes.add(line, f"`{column}` has {len(text):,} characters; at most {MAX_TEXT:,} are taken.")
    elif bad := _bad_character(text):
        mistakes.add(line, f"`{column}` holds {bad}. Take it out.")
    else:
        return True
    return False


def check_scores(scores: Any, column: str, line: int, mistakes: Mistakes) -> dict[str, float] | None:
    """Dimension -> score; a null is a dimension that was not rated."""
    if not isinstance(scores, Mapping) or not scores:
        mistakes.add(line, f"`{column}`: expected dimensions and scores such as {{\"realism\": 3.5}}, "
                           f"found {short(scores)}.")  # fmt: skip
        return None
    good: dict[str, float] = {}
    before = mistakes.count
    for name, value in scores.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            mistakes.add(line, f"`{column}.{name}`: expected a number, found {short(value)}.")
        elif not math.isfinite(value):
            mistakes.add(line, f"`{column}.{name}` is {value}; leave a dimension null where there is no score.")
        elif not LOWEST <= value <= HIGHEST:
            mistakes.add(line, f"`{column}.{name}` is {value:g}; scores go from {LOWEST:g} to {HIGHEST:g}.")
        else:
            good[str(name)] = float(value)
    return good if mistakes.count == before else None


def short(value: Any) -> str:
    """A value for a message: one line, no control characters, never long."""
    text = ascii(value) if isinstance(value, str) else ascii(repr(value))[1:-1]
    return text if len(text) <= 60 else text[:57] + "..."
