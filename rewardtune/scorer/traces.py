"""A teacher's distributions on disk: drawn once, taken up again after an interruption, checked before they are used.

Written and read through `scorer/teacher.py`. A folder holds `book.json` (what was asked), one journal a process, whose
lines carry checksums, and at the end `distributions.safetensors` with the checksum of the journals.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rewardtune.data.rows import counted
from rewardtune.data.skipped import Skipped
from rewardtune.errors import DataError, RecipeError
from rewardtune.progress import Progress
from rewardtune.types import Prompt

Item = tuple[Path, Prompt]
DROPPED = 0.05
"""Largest share of rows that may stay without a distribution (ours)."""


@dataclass(frozen=True)
class Row:
    """What the teacher said of one item. traces: [dimension][trace] as text; ended: likewise, whether it closed them
    itself; tokens: how many; distributions: likewise, over the levels, or None where nothing could be read; reasons:
    likewise, why not, empty where it could; no lists at all where every one could, and in older journals."""

    traces: list[list[str]]
    ended: list[list[bool]]
    tokens: list[list[int]]
    distributions: list[list[list[float] | None]]
    reasons: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Judged:
    """Judgements that a student learns from. distributions: (B, D, R, K), NaN for what could not be read. figures: of
    the traces, where they were drawn for this batch; see `Reasoner.figures`."""

    distributions: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)


Teacher = Callable[[Sequence[int], Sequence[Item]], Iterable[tuple[int, Row]]]
"""Judges items, given with their places in the list (which key the randomness); places and rows in any order, each as
soon as it is there."""


def fill(
    folder: Path, items: Sequence[Item], teacher: Teacher, *, asked: dict[str, Any], batch_size: int, rank: int = 0,
    world: int = 1,
) -> None:  # fmt: skip
    """Draw what the folder lacks of this process's share of the items.

    A row is handed to the system as soon as the teacher gives it, so a process that is killed loses what is being
    judged and nothing else: of a served teacher the rows whose answers are not all there, of one in this process, which
    writes the traces of `batch_size` items together, these. A machine that fails loses one batch at most. Raises
    RecipeError when the folder was filled for another question, and says what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_book(folder, {**asked, "items": len(items), "pictures": _digest(items)}, write=rank == 0)
    done = _journals(folder)
    mine = [i for i in range(rank, len(items), world) if i not in done]
    progress = Progress("teacher's judgements", len(mine)) if rank == 0 else None
    with _repaired(folder / f"journal-{rank}.jsonl").open("a", encoding="utf-8") as journal:
        for start in range(0, len(mine), batch_size):
            part = mine[start : start + batch_size]
            for place, row in teacher(part, [items[i] for i in part]):
                journal.write(_line(place, row))
                journal.flush()
                if progress is not None:
                    progress.advance(1)
            os.fsync(journal.fileno())


def distributions(folder: Path, count: int) -> Tensor:
    """(items, D, R, K) float32, NaN for what could not be read; packed on the first call.

    Raises DataError when rows are missing or damaged, or too many could not be read.
    """
    journals = sorted(folder.glob("journal-*.jsonl"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in journals)).hexdigest()
    packed = folder / "distributions.safetensors"
    found = _packed(packed, digest)
    if found is None:
        rows = _journals(folder)
        missing = sorted(set(range(count)) - rows.keys())
        if missing:
            raise DataError(
                f"{folder} lacks the teacher's judgement of {len(missing):,} of {count:,} items, the first is item "
                f"{missing[0]}. Run the recipe again to draw them."
            )
        said = (values for row in rows.values() for dimension in row.distributions for values in dimension)
        nothing = [torch.nan] * next((len(values) for values in said if values), 1)
        found = torch.tensor([
            [[values or nothing for values in dimension] for dimension in rows[i].distributions] for i in range(count)
        ])  # fmt: skip
        temporary = packed.with_suffix(".tmp")
        save_file({"distributions": found}, temporary, metadata={"journals": digest})
        temporary.replace(packed)
    lost = float(found.isnan().any(-1).float().mean())
    if lost > DROPPED:
        raise DataError(
            f"{folder}: {lost:.0%} of the teacher's judgements could not be read, more than {DROPPED:.0%}. Look at the "
            "journal's `traces`: is the rubric's closing text what this teacher writes?"
        )
    return found


def figures(rows: Iterable[Row]) -> dict[str, float]:
    """Numbers to log about traces that were read, as `Reasoner.figures` gives them; none where there are none."""
    read = [one for row in rows for one in _read(row)]
    if not read:
        return {}
    return {
        "trace_tokens": sum(tokens for _, _, tokens in read) / len(read),
        "trace_ended": sum(ended for _, ended, _ in read) / len(read),
        "trace_empty": sum(not text for text, _, _ in read) / len(read),
    }


def report(folder: Path, items: Sequence[Item], dimensions: Sequence[str]) -> str:
    """What people should know of a filled folder: how many traces are empty or were cut off, which are judgements like
    any other (`reasoning.py`), and which judgements could not be read and are left out."""
    read: list[tuple[str, bool, int]] = []
    lost, total = Skipped(), 0
    for i, row in sorted(_journals(folder).items()):
        read += _read(row)
        for d, shares in enumerate(row.distributions):
            total += len(shares)
            for t, values in enumerate(shares):
                if values is None:
                    why = row.reasons[d][t] if row.reasons else ""
                    name = f"item {i} ({items[i][0].name}) in {dimensions[d]}"
                    lost.add(f"because {why}" if why else "without a reason", name)
    lines = []
    if read:
        empty, cut = sum(not text for text, _, _ in read), sum(not ended for _, ended, _ in read)
        mean = sum(tokens for _, _, tokens in read) / len(read)
        lines.append(f"{counted(len(read), 'trace')} of {mean:.1f} tokens on average; {empty:,} are empty and {cut:,} "
                     "were cut off at the limit: these, too, were closed and read.")  # fmt: skip
    if lost:
        lines.append(f"{lost.total:,} of {total:,} judgements could not be read and are left out;")
        lines += lost.lines()
    return "\n".join(f"{folder}: {line}" for line in lines)


# ------------------------------------------------------------------------------------------------------------- inside


def _read(row: Row) -> list[tuple[str, bool, int]]:
    """Text, whether the model ended it, and tokens of each trace behind which a distribution was read."""
    read: list[tuple[str, bool, int]] = []
    for texts, ended, tokens, shares in zip(row.traces, row.ended, row.tokens, row.distributions, strict=True):
        # a row that was read in one pass has no traces
        each = zip(texts, ended, tokens, shares, strict=False)
        read += [(text, end, count) for text, end, count, values in each if values is not None]
    return read


def _line(index: int, row: Row) -> str:
    text = json.dumps({"item": index, **asdict(row)}, ensure_ascii=False, allow_nan=False)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _parse(line: bytes) -> tuple[int, Row] | None:
    """Index and row, or None for a line that is torn or altered."""
    if not line.endswith(b"\n") or line[8:9] != b" " or f"{zlib.crc32(line[9:-1]):08x}".encode() != line[:8]:
        return None
    values = json.loads(line[9:])
    return values.pop("item"), Row(**values)


def _journals(folder: Path) -> dict[int, Row]:
    lines: Iterable[bytes] = (
        line for path in sorted(folder.glob("journal-*.jsonl")) for line in path.read_bytes().splitlines(keepends=True)
    )
    return dict(parsed for line in lines if (parsed := _parse(line)) is not None)


def _repaired(path: Path) -> Path:
    """A journal that ends inside a line, as a killed process leaves it, loses that line's beginning."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
    return path


def _packed(path: Path, digest: str) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("journals") == digest:
                found: Tensor = file.get_tensor("distributions")
                return found
    except (OSError, SafetensorError):
        return None
    return None


def _digest(items: Sequence[Item]) -> str:
    total = hashlib.sha256()
    for path, prompt in items:
        total.update(hashlib.sha256(path.read_bytes()).digest() + str(prompt).encode() + b"\0")
    return total.hexdigest()


def _check_book(folder: Path, asked: dict[str, Any], *, write: bool) -> None:
    path = folder / "book.json"
    if path.exists():
        known = json.loads(path.read_text())
        names = (asked.keys() | known.keys()) - {"teacher"}  # a folder that was moved is the same one: `weights` tell
        if "pixels" not in known:
            names -= {"pixels"}  # a book from before they could be set
        odd = sorted(name for name in names if asked.get(name) != known.get(name))
        if odd:
            raise RecipeError(
                f"{folder} holds judgements that were drawn for another question; {', '.join(odd)} differ (there "
                f"{known.get(odd[0])!r}, here {asked.get(odd[0])!r}). Name another teacher.cache, or delete the folder."
            )
    elif write:
        path.write_text(json.dumps(asked, indent=1, ensure_ascii=False) + "\n")
