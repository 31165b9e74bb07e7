"""Public preference sets, laid out in columns (`layouts.py`), become preference records with pictures beside them.

Behind `rewardtune data import`. Tables are read a few rows at a time (`tables.py`), so pictures never fill the memory;
the records do stay in it until they are written, as whoever trains on them holds them too.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from rewardtune.data.images import open_image
from rewardtune.data.layouts import Layout
from rewardtune.data.records import PreferenceGroup, RatedImage, write_records
from rewardtune.data.rows import SHOWN, ImageFolder, Mistakes, Row, check_text, short
from rewardtune.data.tables import Table, open_table
from rewardtune.errors import DataError, RecipeError
from rewardtune.types import Prompt

RECORDS = "records.jsonl"
STARTS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}
"""First bytes of the formats that `open_image` reads."""

# why something was left out
TIED = "tied pairs"
UNLABELLED = "rows without a label"
NO_PROMPT = "rows without a prompt"
NO_PICTURE = "rows without a picture"
UNREADABLE = "pictures that cannot be read"
UNRATED = "pictures without all scores"
SAME = "pictures that a row shows twice"
TWICE = "pictures that their group has already"
REPEATED = "choices between a pair that has a choice already"
CANCELLED = "choices that cancel each other out"
UNUSED = "pictures left with neither scores nor a preference"


@dataclass(frozen=True)
class Imported:
    """What was written, and what was left out: reason -> count.

    pairs: stated preferences. rated: pictures with scores, counted in each group. absent: optional columns that some
    file lacks. unreadable: the first of the pictures that cannot be read, where they are and why.
    """

    records: Path
    rows: int
    groups: int
    images: int
    pairs: int
    rated: int
    left_out: Mapping[str, int]
    absent: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


def import_records(
    layout: Layout,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    renamed: Mapping[str, str] | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Imported:
    """Write OUT/records.jsonl and OUT/images/ from .parquet, .jsonl or .json tables.

    renamed: column of the files -> column of the layout. limit: rows to read, of all files together. progress: called
    with the number of rows after each. Pictures are copied byte for byte, named by their SHA-256. The records appear
    whole or not at all; pictures that an interrupted import has written are not written again. A picture that cannot
    be read is left out and counted.
    Raises RecipeError for a column that the layout does not have or records that are there already, DataError for
    anything wrong with a file: its first 20 mistakes together, then it is given up.
    """
    out = Path(out)
    records = out / RECORDS
    if records.exists():
        raise RecipeError(f"{records} is there already; name another folder, so that nothing is overwritten.")
    # every file's columns are checked before anything is written
    tables = [open_table(Path(source), layout, renamed or {}) for source in sources]
    gathering = _Gathering(layout, out)
    rows = 0
    for table in tables:
        mistakes = Mistakes(table.path)
        gathering.open(table, mistakes)
        for number, row in table.rows(mistakes, None if limit is None else limit - rows):
            rows += 1
            gathering.add(number, row)
            progress(rows)
            if mistakes.count >= SHOWN - 1:
                # more than anybody mends by hand; the rest of a large set would take hours
                mistakes.add(number + 1, "this row and those after it were not read.")
                break
        mistakes.stop()
    groups = list(gathering.groups())
    left_out = {reason: count for reason, count in gathering.left_out.items() if count}
    if not groups:
        why = "; ".join(f"{reason}: {count:,}" for reason, count in left_out.items())
        why += "".join(f"\n{text}" for text in gathering.unreadable)
        names = ", ".join(map(str, sources))
        raise DataError(
            f"{names}: of {rows:,} rows none can be used; nothing is written. Left out: {why or 'nothing'}."
        )
    write_records(groups, records)
    images = [image for group in groups for image in group.images]
    return Imported(
        records,
        rows=rows,
        groups=len(groups),
        images=len({image.image for image in images}),
        pairs=sum(len(group.preferences) for group in groups),
        rated=sum(bool(image.scores) for image in images),
        left_out=left_out,
        absent=tuple(dict.fromkeys(column for table in tables for column in table.absent)),
        unreadable=tuple(gathering.unreadable),
    )


@dataclass(frozen=True)
class _Seen:
    """One picture of a row: where it is (bytes or a path that was checked), its place in the order, its scores."""

    content: bytes | Path
    column: str
    place: float | None
    scores: Mapping[str, float]


@dataclass
class _Group:
    """Pictures of one prompt while rows are being read. votes: (winner, loser) -> how often it was said."""

    prompt: str
    images: dict[Path, Mapping[str, float]] = field(default_factory=dict)
    places: dict[Path, float] = field(default_factory=dict)
    votes: Counter[tuple[Path, Path]] = field(default_factory=Counter)


class _Gathering:
    """Turns rows into groups, and counts what it leaves out."""

    def __init__(self, layout: Layout, out: Path) -> None:
        self.layout = layout
        self.pictures = _Pictures(out / "images")
        self.left_out: Counter[str] = Counter()
        self.found: dict[str, _Group] = {}
        self.unreadable: list[str] = []

    def open(self, table: Table, mistakes: Mistakes) -> None:
        self.table = table
        self.mistakes = mistakes
        self.folder = ImageFolder(table.path.parent)

    def add(self, number: int, row: Row) -> None:
        """`row`: column of the layout -> value; a null or missing column is left out of it."""
        layout = self.layout
        before = self.mistakes.count
        if layout.labelled and not self._flag(row.get(layout.labelled, True), layout.labelled, number):
            self.left_out[UNLABELLED] += self.mistakes.count == before
            return
        prompt = row.get(layout.prompt, "")
        if isinstance(prompt, str) and not prompt.strip():
            self.left_out[NO_PROMPT] += 1
            return
        check_text(prompt, self._name(layout.prompt), number, self.mistakes)
        group = row.get(layout.group) if layout.group else prompt
        if not isinstance(group, str | int) or isinstance(group, bool) or not str(group):
            found = "nothing" if group is None else short(group)
            self.mistakes.add(number, f"`{self._name(layout.group or '')}`: expected a group's name, found {found}.")
        pictures = self._pictures_of(row, number)
        if self.mistakes.count > before or pictures is None:
            return
        there = self.found.setdefault(str(group), _Group(prompt))
        if there.prompt != prompt:
            self.mistakes.add(number, f"group {short(group)} has another prompt in an earlier row, "
                                      f"{short(there.prompt)}; pictures of one group answer one prompt.")  # fmt: skip
            return
        self._keep(there, pictures, number)

    def groups(self) -> Iterator[PreferenceGroup]:
        """What the rows come to: one preference a pair, by majority. A group of which nothing is left is none."""
        for n, (name, group) in enumerate(self.found.items(), start=1):
            self._vote(group, group.places)
            said = list(dict.fromkeys(frozenset(pair) for pair in group.votes))
            pairs = []
            for first, second in (sorted(pair) for pair in said):
                ahead, behind = group.votes[first, second], group.votes[second, first]
                if ahead == behind:
                    self.left_out[CANCELLED] += ahead + behind
                    continue
                self.left_out[REPEATED] += ahead + behind - 1
                pairs.append((first, second) if ahead > behind else (second, first))
            used = {image for pair in pairs for image in pair}
            images = [RatedImage(i, scores) for i, scores in group.images.items() if scores or i in used]
            self.left_out[UNUSED] += len(group.images) - len(images)
            at = {image.image: i for i, image in enumerate(images)}
            if images:
                # a prompt is too long for a name
                identity = name if self.layout.group else f"{self.layout.name}-{n}"
                preferences = tuple((at[winner], at[loser]) for winner, loser in pairs)
                yield PreferenceGroup(identity, Prompt(group.prompt), tuple(images), preferences)

    # ------------------------------------------------------------------------------------------------- reading a row

    def _pictures_of(self, row: Row, number: int) -> list[_Seen] | None:
        """The pictures of a row; None when one of them or its label is missing, or after a mistake."""
        layout, order = self.layout, self.table.order
        before = self.mistakes.count
        cells = [(column, _unwrapped(cell)) for column, cell in self._cells(row, layout.pictures)]
        if not cells or any(cell is None for _, cell in cells):
            self.left_out[NO_PICTURE] += 1
            return None
        contents = [self._content(cell, column, number) for column, cell in cells]
        scores = {
            dimension: self._numbers(row, scale.columns, len(cells), (scale.worst, scale.best), number)
            for dimension, scale in layout.scores.items()
        }
        places: Sequence[float | None] = [None] * len(cells)
        if order and order.best == "first":
            places = range(len(cells), 0, -1)
        elif order:
            places = self._numbers(row, order.columns, len(cells), order.limits, number)
        if self.mistakes.count > before:
            return None
        if order and None in places and not scores:
            self.left_out[UNLABELLED] += 1
            return None
        sign = -1 if order and order.best == "lowest" else 1
        return [
            _Seen(
                content,
                column,
                place=None if place is None else sign * place,
                scores={d: layout.scores[d].score(x) for d, ratings in scores.items() if (x := ratings[i]) is not None},
            )
            for i, ((column, _), content, place) in enumerate(zip(cells, contents, places, strict=True))
            if content is not None
        ]

    def _cells(self, row: Row, columns: Sequence[str]) -> list[tuple[str, Any]]:
        """Column and value for each picture of a row: a value a column, or a column's list."""
        cells: list[tuple[str, Any]] = []
        for column in columns:
            value = row.get(column)
            cells += [(column, entry) for entry in value] if isinstance(value, list) else [(column, value)]
        return cells

    def _content(self, cell: Any, column: str, number: int) -> bytes | Path | None:
        """A picture given as bytes or as a path beside the table; None after a mistake."""
        if isinstance(cell, bytes):
            return cell
        if isinstance(cell, str):  # an empty path is refused there
            return self.folder.find(cell, self._name(column), number, self.mistakes)
        self.mistakes.add(number, f"`{self._name(column)}`: expected a picture as bytes, a path or a struct of both, "
                                  f"found {short(cell)}.")  # fmt: skip
        return None

    def _numbers(
        self, row: Row, columns: Sequence[str], count: int, limits: tuple[float, float] | None, number: int
    ) -> list[float | None]:
        """A number for each picture of a row, None where it is missing. After a mistake, which is noted, any list."""
        cells = self._cells(row, columns)
        if cells and len(cells) != count:
            self.mistakes.add(number, f"`{self._name(columns[0])}` has {len(cells)} numbers for {count} pictures.")
            return []
        low, high = sorted(limits or (-math.inf, math.inf))
        numbers: list[float | None] = []
        for column, cell in cells:
            if cell is None or (isinstance(cell, float) and math.isnan(cell)):  # pandas writes NaN for a missing number
                numbers.append(None)
            elif isinstance(cell, bool) or not isinstance(cell, int | float):
                self.mistakes.add(number, f"`{self._name(column)}`: expected a number, found {short(cell)}.")
            elif not low <= cell <= high or math.isinf(cell):
                expected = f"a number from {low:g} to {high:g}" if limits else "a finite number"
                self.mistakes.add(number, f"`{self._name(column)}` is {cell:g}; expected {expected}.")
            else:
                numbers.append(float(cell))
        return numbers

    def _flag(self, value: Any, column: str, number: int) -> bool:
        if value not in (True, False):  # 0 and 1 too
            self.mistakes.add(number, f"`{self._name(column)}`: expected true or false, found {short(value)}.")
            return False
        return bool(value)

    def _name(self, column: str) -> str:
        """What the file calls a column of the layout."""
        return self.table.names.get(column, column)

    # ------------------------------------------------------------------------------------------------- keeping a row

    def _keep(self, group: _Group, seen: list[_Seen], number: int) -> None:
        by_row = self.layout.compare == "row"
        if by_row and not self.layout.scores:
            # pictures that are preferred to none and to which none is preferred are not written
            places = [picture.place for picture in seen]
            ties = sum(a == b for a, b in combinations(places, 2))
            if len(set(places)) < 2:
                self.left_out[TIED if ties else UNUSED] += ties or len(seen)
                return
        kept: dict[Path, float] = {}
        for picture in seen:
            rated = picture.scores if len(picture.scores) == len(self.layout.scores) else {}
            if self.layout.scores and not rated:
                self.left_out[UNRATED] += 1
                if picture.place is None:
                    continue
            try:
                data = picture.content if isinstance(picture.content, bytes) else picture.content.read_bytes()
                image = self.pictures.put(data)
            except DataError as error:
                # a set of a million pictures has some that are broken, and nobody can mend a published file
                self.left_out[UNREADABLE] += 1
                if len(self.unreadable) < SHOWN:
                    self.unreadable.append(f"{self.table.path}:{number}: `{self._name(picture.column)}`: {error}")
                continue
            if image in kept:
                self.left_out[SAME] += 1
                continue
            if image in group.images and not (by_row and self.layout.orders):
                self.left_out[TWICE] += 1
                continue
            if not group.images.get(image):
                group.images[image] = rated
            if picture.place is not None:
                kept[image] = picture.place
        if by_row:
            self._vote(group, kept)
        else:
            group.places |= kept

    def _vote(self, group: _Group, places: Mapping[Path, float]) -> None:
        """One vote for each pair of pictures in different places; the higher place wins."""
        for (a, place_a), (b, place_b) in combinations(places.items(), 2):
            if place_a == place_b:
                self.left_out[TIED] += 1
            else:
                group.votes[(a, b) if place_a > place_b else (b, a)] += 1


def _unwrapped(cell: Any) -> Any:
    """HF datasets' image is a struct of bytes and path, one of which may be null."""
    if isinstance(cell, Mapping) and set(cell) == {"bytes", "path"}:
        return cell["path"] if cell["bytes"] is None else cell["bytes"]
    return cell


class _Pictures:
    """Files named by their content, so that each picture is written once however many rows show it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, data: bytes) -> Path:
        """The file that holds `data`. Raises DataError, without a path, for what `open_image` refuses."""
        suffix = next((suffix for start, suffix in STARTS.items() if data.startswith(start)), None)
        if suffix is None:
            raise DataError(f"not a PNG, JPEG or WEBP picture (it begins with {data[:8]!r}).")
        name = hashlib.sha256(data).hexdigest()
        # a folder with a million files is slow to list
        path = self.folder / name[:2] / f"{name}{suffix}"
        if path.is_file() and path.stat().st_size == len(data):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_bytes(data)
            open_image(part)
            part.replace(path)
        except DataError as error:
            raise DataError(str(error).removeprefix(f"{part}: ")) from None
        finally:
            part.unlink(missing_ok=True)
        return path
