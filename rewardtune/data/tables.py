"""Tables of public sets, read a few rows at a time under the names of their layout: Parquet, JSON lines, JSON arrays.

Below `importers.py`. `rows.py` reads rewardtune's own formats, whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rewardtune.data.layouts import Layout, Order
from rewardtune.data.rows import MAX_LINE, Mistakes, Row, short
from rewardtune.errors import DataError, MissingExtra, RecipeError
from rewardtune.recipe.suggest import closest

ROWS_AT_ONCE = 32
"""Ours: rows that are Python objects together, beside the page of a Parquet file that they come from."""
CHUNK = 1 << 20
"""Ours: bytes read at once."""


@dataclass(frozen=True)
class Table:
    """One file whose columns are known. names: column of the layout -> the file's name for it.

    order: the first of the layout's orders that the file has. absent: optional columns that it lacks.
    """

    path: Path
    names: Mapping[str, str]
    order: Order | None
    absent: tuple[str, ...]

    def rows(self, mistakes: Mistakes, limit: int | None = None) -> Iterator[tuple[int, Row]]:
        """Number (from 1) and row, under the layout's names and without nulls. Mistakes in JSON are noted."""
        for number, row in islice(_rows(self.path, mistakes, list(self.names.values())), limit):
            values = {column: row.get(name) for column, name in self.names.items()}
            yield number, {column: value for column, value in values.items() if value is not None}


def open_table(path: Path, layout: Layout, renamed: Mapping[str, str]) -> Table:
    """Find the layout's columns in a file. `renamed`: the file's name -> the layout's.

    Raises RecipeError for a rename to a column that the layout does not have, DataError for a file that cannot be read
    and for columns that it lacks, all of them together, each with the closest name that is there.
    """
    known = [column for column in layout.columns() if column not in layout.unread and column not in layout.known_names]
    for name, column in renamed.items():
        if column not in known:
            raise RecipeError(f"--map {name}={column}: layout {layout.name} has no column {column!r}"
                              f"{closest(column, known)}. It has: {', '.join(known)}.")  # fmt: skip
    there = _columns(path)
    if strangers := [name for name in renamed if name not in there]:
        raise DataError(f"{path}: --map names the column {strangers[0]!r}, which the file does not have"
                        f"{closest(strangers[0], there)}. It has: {', '.join(there)}.")  # fmt: skip
    names = {column: column for column in known if column in there}
    for name, column in layout.known_names.items():
        if name in there and column not in names:
            names[column] = name
    names |= {column: name for name, column in renamed.items()}
    order = next((order for order in layout.orders if all(column in names for column in order.columns)), None)
    wanted = [layout.prompt, *([layout.group] if layout.group else []), *layout.pictures]
    wanted += [column for scale in layout.scores.values() for column in scale.columns]
    missing = [column for column in wanted if column not in names]
    if layout.orders and order is None:
        missing += [column for column in layout.orders[0].columns if column not in names]
    if missing:
        free = [name for name in there if name not in names.values()]
        raise DataError(f"{path}: {len(missing)} of the columns of layout {layout.name} are missing.\n"
                        + "\n".join(_missing(column, layout, free) for column in missing)
                        + f"\nThe file has: {', '.join(there) or 'no columns'}.")  # fmt: skip
    # an order that is not read must not be asked for
    unused = {column for other in layout.orders if other is not order for column in other.columns}
    read = {column: name for column, name in names.items() if column not in unused}
    absent = (layout.labelled,) if layout.labelled and layout.labelled not in names else ()
    return Table(path, read, order, absent)


def _missing(column: str, layout: Layout, free: list[str]) -> str:
    """One line for a column that is not there."""
    import difflib

    others = [order.columns[0] for order in layout.orders[1:] if column in layout.orders[0].columns]
    also = f" (or `{'`, `'.join(others)}`)" if others else ""
    near = difflib.get_close_matches(column, free, n=1, cutoff=0.0)
    hint = f"closest is `{near[0]}`: if that is it, add --map {near[0]}={column}" if near else "name it with --map"
    return f"`{column}`{also}, {layout.columns()[column]}: {hint}"


def _columns(path: Path) -> list[str]:
    if not path.is_file():
        if path.is_dir():
            raise DataError(f"{path}: this is a folder; name the tables in it, .parquet, .json or .jsonl.")
        raise DataError(f"{path}: {'not a regular file' if path.exists() else 'there is no such file'}.")
    if path.suffix.lower() == ".parquet":
        with _parquet(path) as file:
            return list(file.schema_arrow.names)
    mistakes = Mistakes(path)
    first = next(_rows(path, mistakes, []), None)
    mistakes.stop()
    if first is None:
        raise DataError(f"{path}: there are no rows in it.")
    return list(first[1])


def _rows(path: Path, mistakes: Mistakes, columns: list[str]) -> Iterator[tuple[int, Row]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, columns)
    if suffix in (".json", ".jsonl"):
        return _json_rows(path, mistakes)
    raise DataError(f"{path}: expected a .parquet, .json or .jsonl table, found {suffix!r}.")


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[int, Row]]:
    import pyarrow

    number = 0
    with _parquet(path) as file:
        # group by group: reading all at once holds on to the groups before
        groups = range(file.num_row_groups)
        batches = (b for i in groups for b in file.iter_batches(ROWS_AT_ONCE, row_groups=[i], columns=columns))
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path}: not readable after row {number} ({error}). Download it again.") from None
            if batch is None:
                return
            for row in rows:
                number += 1
                yield number, row


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(f"{path}: reading Parquet needs pyarrow: pip install 'rewardtune[parquet]'") from None
    try:
        # with a buffer of its own, a row group is read page by page; otherwise whole
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Download it again.") from None


def _json_rows(path: Path, mistakes: Mistakes) -> Iterator[tuple[int, Row]]:
    """Objects one after another, in an array or a line each; sets publish either under either suffix."""
    decoder = json.JSONDecoder()
    number, text, at, ended = 0, "", 0, False
    with path.open(encoding="utf-8-sig") as file:
        while True:
            at = _between(text, at)
            trouble: object = None
            if at < len(text):
                try:
                    value, at = decoder.raw_decode(text, at)
                except (ValueError, RecursionError) as error:
                    trouble = error
                else:
                    number += 1
                    if isinstance(value, dict):
                        yield number, value
                    else:
                        mistakes.add(number, f"expected a JSON object such as {{...}}, found {short(value)}.")
                    continue
            # what is left may be the beginning of an object
            if trouble and (ended or len(text) - at > MAX_LINE):
                mistakes.add(number + 1, f"not a JSON object ({trouble}).")
                return
            if ended:
                return
            try:
                chunk = file.read(CHUNK)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 ({error}). Download it again.") from None
            ended = not chunk
            text, at = text[at:] + chunk, 0


def _between(text: str, at: int) -> int:
    """Where the next object begins: array brackets, commas and white space are skipped."""
    while at < len(text) and text[at] in " \t\r\n,[]":
        at += 1
    return at
