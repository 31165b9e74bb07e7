"""Files that users bring: prompts, captioned images and preference records, checked completely before use.

First in the flow of every task. All mistakes of a file are reported at once; paths never leave the file's folder.
The formats are described, with examples, in docs/data.md.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rewardtune.data.images import open_image
from rewardtune.data.references import PREFIX, pocket_path
from rewardtune.data.rows import (
    SHOWN,
    ImageFolder,
    Mistakes,
    Row,
    check_scores,
    check_text,
    counted,
    read_rows,
    short,
    text_lines,
    write_parquet,
)
from rewardtune.errors import DataError
from rewardtune.types import Prompt

Kind = Literal["prompts", "captioned-images", "preferences"]
_RECORD_COLUMNS = frozenset({"group", "prompt", "image", "scores", "annotations", "critique", "metadata", "chosen",
                             "rejected", "id"})  # fmt: skip


@dataclass(frozen=True)
class CaptionedImage:
    """A training picture and its text."""

    image: Path
    caption: str


@dataclass(frozen=True)
class RatedImage:
    """One picture of a group. `scores`: dimension -> 1.0 to 5.0, empty when only preferences are known.

    `annotations`: one such mapping per annotator, empty when only aggregates are known.
    """

    image: Path
    scores: Mapping[str, float] = field(default_factory=dict)
    annotations: tuple[Mapping[str, float], ...] = ()
    critique: str | None = None


@dataclass(frozen=True)
class PreferenceGroup:
    """Pictures of one prompt. `preferences`: stated (winner, loser) pairs of positions in `images`.

    Pairs that follow from scores are not listed; whoever trains on scores forms them.
    """

    id: str
    prompt: Prompt
    images: tuple[RatedImage, ...]
    preferences: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class FileSummary:
    """What `validate_file` found in a file without mistakes."""

    path: str
    kind: Kind
    rows: int
    prompts: int
    """Different prompts or captions."""
    images: int = 0
    groups: int = 0
    dimensions: tuple[str, ...] = ()
    annotators: tuple[int, int] = (0, 0)
    """Fewest and most annotators of a picture."""
    preferences: int = 0
    """Stated pairs."""
    critiques: int = 0
    unused_columns: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for people."""
        parts = [counted(self.rows, "row"), counted(self.prompts, "different prompt")]
        if self.groups:
            parts.append(counted(self.groups, "group"))
        if self.images:
            parts.append(counted(self.images, "image"))
        if self.dimensions:
            low, high = self.annotators
            parts.append("scores on " + ", ".join(self.dimensions))
            parts.append("aggregate scores only" if high == 0 else f"{low} to {high} annotators")
        if self.preferences:
            parts.append(counted(self.preferences, "stated preference"))
        if self.critiques:
            parts.append(counted(self.critiques, "critique"))
        if self.unused_columns:
            parts.append("not read: " + ", ".join(self.unused_columns))
        return f"{self.path}: {self.kind}: " + "; ".join(parts)


# ---------------------------------------------------------------------------------------------------------- prompts


def read_prompts(source: str | Path) -> list[Prompt]:
    """Prompts of a .txt (one a line, blank lines ignored), .jsonl or .parquet file, or of `pocket:prompts/<split>`.

    In rows, the column `prompt` is the text and every other column becomes the prompt's metadata.
    Raises DataError with every mistake and its line; an empty file is one.
    """
    path = _locate(source)
    mistakes = Mistakes(path)
    prompts: list[Prompt] = []
    if path.suffix.lower() == ".txt":
        for line, text in text_lines(path, mistakes):
            text = text.strip()
            if text and check_text(text, "prompt", line, mistakes):
                prompts.append(Prompt(text))
    else:
        for line, row in read_rows(path, mistakes):
            if check_text(row.get("prompt"), "prompt", line, mistakes):
                prompts.append(Prompt(row["prompt"], {k: v for k, v in row.items() if k != "prompt"}))
    mistakes.stop()
    if not prompts:
        raise DataError(f"{path}: there are no prompts in it. Write one a line.")
    return prompts


# -------------------------------------------------------------------------------------------------- captioned images


def read_captioned_images(manifest: str | Path) -> list[CaptionedImage]:
    """Rows of a .jsonl or .parquet manifest with `image` (a path under the manifest's folder) and `caption`.

    Checks that every file is there, without decoding it. Raises DataError with every mistake and its line.
    """
    path = _locate(manifest)
    mistakes = Mistakes(path)
    folder = ImageFolder(path.parent)
    found = []
    for line, row in read_rows(path, mistakes):
        good = check_text(row.get("caption"), "caption", line, mistakes)
        image = folder.find(row.get("image"), "image", line, mistakes)
        if good and image is not None:
            found.append(CaptionedImage(image, row["caption"]))
    mistakes.stop()
    if not found:
        raise DataError(f"{path}: there are no rows in it.")
    return found


# ------------------------------------------------------------------------------------------------ preference records


def read_records(path: str | Path, *, rated: bool = True) -> list[PreferenceGroup]:
    """Preference records of a .jsonl or .parquet file, in the order in which their groups begin.

    Two kinds of rows, freely mixed: one row an image (`prompt`, `image`, and `scores` or `annotations`) and one row a
    pair (`prompt`, `chosen`, `rejected`). Rows of one `group` belong together; a pair row without one stands alone.
    With `rated=False` groups may be without either. Images are checked to be there, not decoded. Raises DataError with
    every mistake and its line.
    """
    path = _locate(path)
    mistakes = Mistakes(path)
    return _records(path, list(read_rows(path, mistakes)), mistakes, rated=rated)


def write_records(groups: Iterable[PreferenceGroup], path: str | Path) -> None:
    """Write records as .jsonl or .parquet, so that `read_records` gives the same groups back.

    Images are named relative to the file's folder and must lie under it. The file appears whole or not at all.
    """
    path = Path(path)
    rows: list[Row] = []
    groups = list(groups)
    # as in a table, every picture names every dimension
    names = dict.fromkeys(name for group in groups for image in group.images for name in image.scores)
    for group in groups:
        rows += _rows_of(group, path, dimensions=tuple(names))
    if path.suffix.lower() == ".parquet":
        _replace(path, lambda file: write_parquet(rows, file))
    elif path.suffix.lower() == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        _replace(path, lambda file: file.write_text(text, encoding="utf-8"))
    else:
        raise DataError(f"{path}: records are written as .jsonl or .parquet.")


# -------------------------------------------------------------------------------------------------------- validation


def validate_file(path: str | Path, *, open_images: bool = True) -> FileSummary:
    """Read a data file of any kind, told apart by its columns, and decode every picture that it names.

    Raises DataError with every mistake; imports no torch. `open_images=False` only checks that pictures are there.
    """
    path = _locate(path)
    if path.suffix.lower() == ".txt":
        prompts = read_prompts(path)
        return FileSummary(str(path), "prompts", len(prompts), len(set(prompts)))
    mistakes = Mistakes(path)
    rows = list(read_rows(path, mistakes))
    columns = {name for _, row in rows for name in row}
    if not rows:
        mistakes.stop()
        raise DataError(f"{path}: there are no rows in it.")
    if columns & {"chosen", "rejected"} or ("image" in columns and columns & {"scores", "annotations"}):
        groups = _records(path, rows, mistakes)
        if open_images:
            _open_all(path, {image.image for group in groups for image in group.images})
        return _summarise(path, len(rows), groups, columns)
    if "image" in columns:
        pairs = read_captioned_images(path)
        if open_images:
            _open_all(path, {pair.image for pair in pairs})
        captions = {pair.caption for pair in pairs}
        extra = tuple(sorted(columns - {"image", "caption", "id"}))
        return FileSummary(str(path), "captioned-images", len(rows), len(captions), len(pairs), unused_columns=extra)
    if "prompt" in columns:
        prompts = read_prompts(path)
        return FileSummary(str(path), "prompts", len(rows), len(set(prompts)))
    mistakes.stop()
    raise DataError(
        f"{path}: cannot tell what this file is; its columns are {', '.join(sorted(columns)) or 'none'}. Prompts have "
        "`prompt`; captioned images `image` and `caption`; preference records `prompt` with `image` and `scores` (or "
        "`annotations`), or with `chosen` and `rejected`."
    )


# ------------------------------------------------------------------------------------------------------------- inside


def _locate(source: str | Path) -> Path:
    """The file behind a path or a `pocket:` reference."""
    path = pocket_path(source) if isinstance(source, str) and source.startswith(PREFIX) else Path(source).expanduser()
    if not path.exists():
        raise DataError(f"{path}: there is no such file.")
    if not path.is_file():
        what = "a folder, and a file is wanted" if path.is_dir() else "not a regular file (a device or pipe)"
        raise DataError(f"{path}: this is {what}.")
    return path


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path` and rename, so that an interruption leaves the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class _Gathered:
    """One group while its rows are being read."""

    prompt: str
    line: int
    metadata: Mapping[str, Any] | None = None
    images: dict[Path, RatedImage] = field(default_factory=dict)
    lines: dict[Path, int] = field(default_factory=dict)
    pairs: list[tuple[Path, Path]] = field(default_factory=list)


class _Reader:
    """Turns flat rows into groups."""

    def __init__(self, path: Path, mistakes: Mistakes) -> None:
        self.mistakes = mistakes
        self.folder = ImageFolder(path.parent)
        self.groups: dict[str, _Gathered] = {}
        self.dimensions: tuple[frozenset[str], int] | None = None

    def add(self, line: int, row: Row) -> None:
        if not check_text(row.get("prompt"), "prompt", line, self.mistakes):
            return
        is_pair = "chosen" in row or "rejected" in row
        if is_pair == ("image" in row):
            self.mistakes.add(line, "expected either `image` with scores, or `chosen` with `rejected`.")
            return
        name = row.get("group", f"pair at line {line}" if is_pair else None)
        if not isinstance(name, str | int) or isinstance(name, bool) or not str(name):
            self.mistakes.add(line, f"`group`: expected the name of a group, found {short(name)}.")
            return
        group = self.groups.setdefault(str(name), _Gathered(row["prompt"], line))
        if group.prompt != row["prompt"]:
            self.mistakes.add(line, f"group {short(name)} has another `prompt` in line {group.line}; "
                                    "images of one group answer one prompt.")  # fmt: skip
            return
        self._add_metadata(group, row, line)
        if is_pair:
            self._add_pair(group, row, line)
        else:
            self._add_image(group, row, line)

    def finish(self, *, rated: bool) -> list[PreferenceGroup]:
        for name, group in self.groups.items():
            if rated and not group.pairs and group.images and not any(i.scores for i in group.images.values()):
                self.mistakes.add(group.line, f"group {short(name)} has neither scores nor preferences.")
        self.mistakes.stop()
        return [_finished(name, group) for name, group in self.groups.items()]

    def _add_metadata(self, group: _Gathered, row: Row, line: int) -> None:
        metadata = row.get("metadata")
        if metadata is None:
            return
        if isinstance(metadata, str):
            try:
                metadata = json.loads(metadata)
            except (ValueError, RecursionError):
                metadata = None
        if not isinstance(metadata, dict):
            self.mistakes.add(line, f"`metadata`: expected an object, found {short(row['metadata'])}.")
        elif group.metadata is not None and group.metadata != metadata:
            self.mistakes.add(line, "`metadata` belongs to the prompt and differs from an earlier row of the group.")
        else:
            group.metadata = metadata

    def _add_pair(self, group: _Gathered, row: Row, line: int) -> None:
        found = [self.folder.find(row.get(column), column, line, self.mistakes) for column in ("chosen", "rejected")]
        winner, loser = found
        if winner is None or loser is None:
            return
        if winner == loser:
            self.mistakes.add(line, "`chosen` and `rejected` are the same picture.")
            return
        if (loser, winner) in group.pairs:
            self.mistakes.add(line, "an earlier row of the group prefers these two the other way round.")
            return
        if (winner, loser) in group.pairs:
            self.mistakes.add(line, "an earlier row of the group states this preference already.")
            return
        group.pairs.append((winner, loser))

    def _add_image(self, group: _Gathered, row: Row, line: int) -> None:
        image = self.folder.find(row["image"], "image", line, self.mistakes)
        annotations = self._annotations(row, line)
        scores: dict[str, float] | None = {}
        if "scores" in row:
            scores = check_scores(row["scores"], "scores", line, self.mistakes)
            self._check_dimensions(row["scores"], "scores", line)
        elif annotations:
            scores = _means(annotations)
        critique = row.get("critique")
        good = critique is None or check_text(critique, "critique", line, self.mistakes)
        if image is None or annotations is None or scores is None or not good:
            return
        if image in group.images:
            self.mistakes.add(line, f"{short(row['image'])} stands in line {group.lines[image]} of the group already.")
            return
        group.images[image] = RatedImage(image, scores, annotations, critique)
        group.lines[image] = line

    def _annotations(self, row: Row, line: int) -> tuple[Mapping[str, float], ...] | None:
        given = row.get("annotations", [])
        if not isinstance(given, list):
            self.mistakes.add(line, f"`annotations`: expected a list, one entry an annotator, found {short(given)}.")
            return None
        found, names = [], set()
        for i, entry in enumerate(given):
            column = f"annotations[{i}]"
            if isinstance(entry, dict) and entry.get("annotator") is not None:
                if str(entry["annotator"]) in names:
                    self.mistakes.add(line, f"`{column}`: {short(entry['annotator'])} rates this picture twice.")
                names.add(str(entry["annotator"]))
            if isinstance(entry, dict):
                entry = {name: value for name, value in entry.items() if name != "annotator"}
            scores = check_scores(entry, column, line, self.mistakes)
            if scores is None:
                return None
            self._check_dimensions(entry, column, line)
            found.append(scores)
        return tuple(found)

    def _check_dimensions(self, scores: Any, column: str, line: int) -> None:
        """A misspelt dimension would otherwise be a dimension that only this row has."""
        if not isinstance(scores, Mapping) or not scores:
            return
        names = frozenset(map(str, scores))
        if self.dimensions is None:
            self.dimensions = (names, line)
        expected, first = self.dimensions
        if names != expected:
            self.mistakes.add(line, f"`{column}` rates {', '.join(sorted(names))}, but line {first} rates "
                                    f"{', '.join(sorted(expected))}. Use null for a dimension that was not "
                                    "rated.")  # fmt: skip


def _records(
    path: Path, rows: Sequence[tuple[int, Row]], mistakes: Mistakes, *, rated: bool = True
) -> list[PreferenceGroup]:
    reader = _Reader(path, mistakes)
    for line, row in rows:
        reader.add(line, row)
    groups = reader.finish(rated=rated)
    if not groups:
        raise DataError(f"{path}: there are no rows in it.")
    return groups


def _finished(name: str, group: _Gathered) -> PreferenceGroup:
    for pair in group.pairs:
        for image in pair:
            group.images.setdefault(image, RatedImage(image))
    position = {image: i for i, image in enumerate(group.images)}
    pairs = tuple((position[winner], position[loser]) for winner, loser in group.pairs)
    return PreferenceGroup(name, Prompt(group.prompt, group.metadata or {}), tuple(group.images.values()), pairs)


def _means(annotations: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each dimension over the annotators who rated it."""
    names = dict.fromkeys(name for scores in annotations for name in scores)
    rated = {name: [scores[name] for scores in annotations if name in scores] for name in names}
    return {name: sum(values) / len(values) for name, values in rated.items()}


def _rows_of(group: PreferenceGroup, path: Path, *, dimensions: Sequence[str]) -> list[Row]:
    root = path.parent.resolve()
    names = []
    for image in group.images:
        if not image.image.resolve().is_relative_to(root):
            raise DataError(f"{path}: the picture {image.image} does not lie under {root}, so no path can name it.")
        names.append(image.image.resolve().relative_to(root).as_posix())
    head: Row = {"group": group.id, "prompt": str(group.prompt)}
    if group.prompt.metadata:
        head["metadata"] = dict(group.prompt.metadata)
    compared = {i for pair in group.preferences for i in pair}
    rows: list[Row] = []
    for i, image in enumerate(group.images):
        row: Row = {**head, "image": names[i]}
        if image.scores:
            row["scores"] = {name: image.scores.get(name) for name in dimensions}
        if image.annotations:
            row["annotations"] = [{name: scores.get(name) for name in dimensions} for scores in image.annotations]
        if image.critique is not None:
            row["critique"] = image.critique
        # a picture of which only comparisons are known is named by its pair rows
        if len(row) > len(head) + 1 or i not in compared:
            rows.append(row)
    return rows + [{**head, "chosen": names[a], "rejected": names[b]} for a, b in group.preferences]


def _summarise(path: Path, rows: int, groups: Sequence[PreferenceGroup], columns: set[str]) -> FileSummary:
    images = [image for group in groups for image in group.images]
    counts = [len(image.annotations) for image in images if image.scores]
    return FileSummary(
        str(path), "preferences", rows,
        prompts=len({str(group.prompt) for group in groups}),
        images=len({image.image for image in images}),
        groups=len(groups),
        dimensions=tuple(dict.fromkeys(name for image in images for name in image.scores)),
        annotators=(min(counts, default=0), max(counts, default=0)),
        preferences=sum(len(group.preferences) for group in groups),
        critiques=sum(image.critique is not None for image in images),
        unused_columns=tuple(sorted(columns - _RECORD_COLUMNS)),
    )  # fmt: skip


def _open_all(path: Path, images: Iterable[Path]) -> None:
    """Decode every picture; all that fail are reported together."""
    failed: list[str] = []
    for image in sorted(images):
        try:
            open_image(image)
        except DataError as error:
            failed.append(str(error))
    if failed:
        more = f"\n... and {len(failed) - SHOWN:,} more" if len(failed) > SHOWN else ""
        raise DataError(f"{path}: {len(failed):,} of its pictures cannot be used.\n" + "\n".join(failed[:SHOWN]) + more)
