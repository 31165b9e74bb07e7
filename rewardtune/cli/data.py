"""`rewardtune data`: public preference sets become preference records (docs/data.md)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rewardtune.cli.command import Json, command, quiet_stdout, show, show_json, show_table
from rewardtune.errors import RecipeError

data = typer.Typer(help="Public preference sets: how they are laid out, and turning them into preference records.")
EVERY = 10_000
"""Rows between two lines of progress."""


@command(data, "import")
def data_import(
    layout: Annotated[str, typer.Argument(metavar="LAYOUT", help="A name of `data layouts`.")],
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Tables: .parquet, .json or .jsonl.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where records.jsonl and images/ go.")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Read only so many rows, of all tables.")] = None,
    renamed: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="column=field", help="The tables' column is the layout's field. Repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a public set's rows as preference records, with their pictures beside them."""
    from rewardtune.data.importers import import_records
    from rewardtune.data.layouts import find_layout

    with quiet_stdout():
        done = import_records(find_layout(layout), sources, out, renamed=_renames(renamed or []), limit=limit,
                              progress=_progress)  # fmt: skip
    if as_json:
        show_json({
            "records": str(done.records), "rows": done.rows, "groups": done.groups, "images": done.images,
            "pairs": done.pairs, "rated": done.rated, "left_out": dict(done.left_out), "absent": list(done.absent),
            "unreadable": list(done.unreadable),
        })  # fmt: skip
        return
    show(f"{done.records}: of {done.rows:,} rows: groups: {done.groups:,}; images: {done.images:,}, rated: "
         f"{done.rated:,}; stated pairs: {done.pairs:,}")  # fmt: skip
    for reason, count in done.left_out.items():
        show(f"left out: {reason}: {count:,}")
    for text in done.unreadable:
        show(text)
    for column in done.absent:
        show(f"not in the tables: {column}; every row was taken")


@command(data, "layouts")
def data_layouts(as_json: Json = False) -> None:
    """Layouts that `data import` knows: their columns, what each becomes, and the data set's licence."""
    from rewardtune.data.layouts import LAYOUTS

    rows: list[dict[str, Any]] = [
        {"name": layout.name, "summary": layout.summary, "licence": layout.licence, "columns": layout.columns(),
         "facts": layout.facts}
        for layout in LAYOUTS.values()
    ]  # fmt: skip
    if as_json:
        show_json(rows)
        return
    for row in rows:
        show(f"{row['name']}: {row['summary']}")
        show(f"licence: {row['licence']}")
        show_table(["  column", "becomes"], [[f"  {column}", becomes] for column, becomes in row["columns"].items()])
        show()


def _renames(given: list[str]) -> dict[str, str]:
    """`text=caption` -> {"text": "caption"}; the last = counts."""
    renames: dict[str, str] = {}
    for word in given:
        column, equals, field = word.rpartition("=")
        if not (column and equals and field):
            raise RecipeError(f"--map {word!r}: expected column=field, the tables' name and the layout's.")
        if column in renames or field in renames.values():
            raise RecipeError(f"--map {word!r}: one of the two names stands in an earlier --map.")
        renames[column] = field
    return renames


def _progress(rows: int) -> None:
    if rows % EVERY == 0:
        print(f"{rows:,} rows", file=sys.stderr)
