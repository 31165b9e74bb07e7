"""Prompt files, captioned images and preference records: the documented examples, round trips, and every refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from rewardtune.data.records import (
    PreferenceGroup,
    RatedImage,
    read_captioned_images,
    read_prompts,
    read_records,
    validate_file,
    write_records,
)
from rewardtune.errors import DataError, RecipeError
from rewardtune.types import Prompt

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
Write = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i, name in enumerate(("fox.png", "fox2.png", "wall.jpg")):
        Image.new("RGB", (4, 4), (i * 40, 0, 0)).save(tmp_path / "images" / name)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Write:
    def _write(*rows: dict[str, Any] | str, name: str = "data.jsonl") -> Path:
        text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return _write


def _mistakes(read: Callable[[Path], object], path: Path) -> list[str]:
    """The lines of the report after its headline, without the path."""
    with pytest.raises(DataError) as caught:
        read(path)
    head, *lines = str(caught.value).split("\n")
    assert head.startswith(str(path))
    return [line.removeprefix(f"{path}:") for line in lines]


# ------------------------------------------------------------------------------------------------------ documentation


def _examples() -> dict[str, str]:
    """File name -> content, for each fenced text or jsonl block of docs/data.md after a `name`."""
    found = re.findall(r"`([\w.]+)`:\n\n```(?:text|jsonl)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    return dict(found)


def test_documented_examples_are_valid(folder: Path) -> None:
    kinds = {}
    for name, text in _examples().items():
        (folder / name).write_text(text, encoding="utf-8")
        kinds[name] = validate_file(folder / name).kind
    assert kinds == {
        "prompts.txt": "prompts",
        "prompts.jsonl": "prompts",
        "manifest.jsonl": "captioned-images",
        "scores.jsonl": "preferences",
        "annotators.jsonl": "preferences",
        "pairs.jsonl": "preferences",
    }


def test_documented_python_runs(folder: Path) -> None:
    (folder / "scores.jsonl").write_text(_examples()["scores.jsonl"], encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = "a red fox in the snow [{'alignment': 4.5, 'realism': 3.0}, {'alignment': 2.0}] ()"
    assert done.stdout.strip() == expected
    assert read_records(folder / "scores.parquet") == read_records(folder / "scores.jsonl")


def test_documented_records_mean_what_the_text_says(folder: Path) -> None:
    for name, text in _examples().items():
        (folder / name).write_text(text, encoding="utf-8")
    (bicycles,) = read_records(folder / "annotators.jsonl")
    assert [dict(image.scores) for image in bicycles.images] == [{"quality": 4.0}, {"quality": 1.25}]
    assert [len(image.annotations) for image in bicycles.images] == [3, 2]
    fox, walls = read_records(folder / "pairs.jsonl")
    assert fox.preferences == ((0, 1),) and not fox.images[0].scores
    assert walls.id == "walls" and walls.preferences == ((0, 1), (0, 2))
    assert [image.image.name for image in walls.images] == ["wall.jpg", "fox.png", "fox2.png"]


# ------------------------------------------------------------------------------------------------------------ prompts


def test_text_prompts(folder: Path) -> None:
    path = folder / "p.txt"
    # a byte order mark, Windows line ends, blank lines, and the separators that str.splitlines would split at
    path.write_bytes(b"\xef\xbb\xbfone cat\r\n\r\n  two\tcats \n\xe2\x80\xa8three\xe2\x80\xa8cats\n")
    assert read_prompts(path) == ["one cat", "two\tcats", "three\u2028cats"]


def test_prompt_metadata_travels(write: Write) -> None:
    (prompt,) = read_prompts(write({"prompt": "a cat", "facts": [{"kind": "object"}], "note": None}))
    assert prompt == "a cat" and dict(prompt.metadata) == {"facts": [{"kind": "object"}]}


def test_shipped_prompts() -> None:
    prompts = read_prompts("pocket:prompts/heldout")
    assert len(prompts) == 256 and {"facts", "composition"} <= set(prompts[0].metadata)
    with pytest.raises(RecipeError, match="prompts/heldout"):
        read_prompts("pocket:prompts/nothing")


def test_empty_prompt_files(write: Write) -> None:
    for path in (write(name="a.txt"), write("", " ", name="b.txt"), write(name="c.jsonl")):
        with pytest.raises(DataError, match="there are no prompts in it"):
            read_prompts(path)


def test_bad_prompts_are_reported_together(folder: Path) -> None:
    path = folder / "p.txt"
    lines = [b"fine", b"\x1b[31mred", b"c1 \xc2\x9b", b"\xff\xfe", b"x" * 10_001, b"del \x7f", b"fine too"]
    path.write_bytes(b"\n".join(lines))
    assert _mistakes(read_prompts, path) == [
        "2: `prompt` holds the control character U+001B. Take it out.",
        "3: `prompt` holds the control character U+009B. Take it out.",
        "4: not UTF-8 (byte 1 of the line). Save the file as UTF-8.",
        "5: `prompt` has 10,001 characters; at most 10,000 are taken.",
        "6: `prompt` holds the control character U+007F. Take it out.",
    ]


def test_bad_json_lines_are_reported_together(write: Write) -> None:
    path = write(
        {"prompt": "fine", "id": 7},
        "{not json}",
        "[1, 2]",
        '{"prompt": "a", "prompt": "b"}',
        {"prompt": "\ud800"},
        {"prompt": ""},
        {"text": "a cat"},
        {"prompt": 3},
        {"prompt": "again", "id": 7},
        '{"prompt": ' + "[" * 100_000,
        '{"prompt": "a\\u0007b"}',
    )
    found = _mistakes(read_prompts, path)
    assert [line.split(":")[0] for line in found] == ["2", "3", "4", "5", "6", "7", "8", "9", "10", "11"]
    for line, words in zip(
        found,
        ["JSON object", "found [1, 2]", "stands twice", "half a character", "is empty",
         "found nothing", "found 3", "line 1 already", "JSON object", "U+0007"],
        strict=True,
    ):  # fmt: skip
        assert words in line


def test_only_twenty_mistakes_are_listed(folder: Path) -> None:
    path = folder / "p.txt"
    path.write_text("\x01\n" * 57)
    found = _mistakes(read_prompts, path)
    assert len(found) == 21 and found[-1] == "... and 37 more"


def test_a_line_without_end_is_not_read_whole(folder: Path) -> None:
    path = folder / "p.txt"
    path.write_bytes(b"a\n" + b"b" * (5 << 20))
    assert "longer than 4 MiB" in _mistakes(read_prompts, path)[0]


def test_missing_files_and_unknown_endings(folder: Path, write: Write) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_prompts(folder / "none.txt")
    with pytest.raises(DataError, match="this is a folder, and a file is wanted"):
        read_prompts(folder)
    with pytest.raises(DataError, match="not a regular file"):
        read_prompts("/dev/zero")
    with pytest.raises(DataError, match=r"expected a \.jsonl or \.parquet"):
        read_prompts(write("a", name="p.csv"))


# --------------------------------------------------------------------------------------------------- captioned images


def test_captioned_images(write: Write, folder: Path) -> None:
    (found,) = read_captioned_images(write({"image": "images/fox.png", "caption": "a fox", "facts": []}))
    assert found.image == (folder / "images/fox.png").resolve() and found.caption == "a fox"


def test_paths_never_leave_the_folder(write: Write, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (4, 4)).save(outside / "a.png")
    (folder / "images/link.png").symlink_to(outside / "a.png")
    (folder / "linked").symlink_to(outside)
    (folder / "images/good.png").symlink_to(folder / "images/fox.png")
    os.mkfifo(folder / "images/pipe.png")
    refused = {
        "../outside.png": "leaves the folder",
        f"../{outside.name}/a.png": "leaves the folder",
        str(outside / "a.png"): "leaves the folder",
        "images/link.png": "leaves the folder",
        "linked/a.png": "leaves the folder",
        "images/../../x.png": "leaves the folder",
        "/dev/zero": "leaves the folder",
        "images/pipe.png": "not a regular file",
        "images": "not a regular file",
        "images/none.png": "there is no file",
        "https://example.org/a.png": "is a URL",
        "file:///etc/passwd": "is a URL",
        "images/\x00.png": "control characters",
        "images/fox\n.png": "control characters",
        "images/" + "x" * 5000: "cannot be opened",
        "": "expected the path",
    }
    path = write(*({"image": name, "caption": "x"} for name in refused))
    found = _mistakes(read_captioned_images, path)
    assert len(found) == len(refused)
    for line, words in zip(found, refused.values(), strict=True):
        assert words in line
    (one,) = read_captioned_images(write({"image": "images/good.png", "caption": "x"}))
    assert one.image.name == "fox.png"


def test_captions_are_checked_like_prompts(write: Write) -> None:
    path = write({"image": "images/fox.png", "caption": "a\x00b"}, {"image": "images/fox.png"}, {"caption": "a fox"})
    found = _mistakes(read_captioned_images, path)
    assert "1: `caption` holds the control character U+0000" in found[0]
    assert found[1] == "2: `caption`: expected a text, found nothing."
    assert found[2].startswith("3: `image`: expected the path")


# -------------------------------------------------------------------------------------------------- preference records


def _row(**changes: Any) -> dict[str, Any]:
    row = {"group": "g", "prompt": "a fox", "image": "images/fox.png", "scores": {"realism": 3, "alignment": 4.5}}
    return {k: v for k, v in (row | changes).items() if v is not ...}


def test_rows_of_a_group_may_be_apart(write: Write) -> None:
    groups = read_records(write(_row(), _row(group="h"), _row(image="images/fox2.png")))
    assert [(g.id, len(g.images)) for g in groups] == [("g", 2), ("h", 1)]


def test_scores_and_choices_of_one_group_mix(write: Write) -> None:
    path = write(
        _row(), _row(image="images/fox2.png"),
        {"group": "g", "prompt": "a fox", "chosen": "images/wall.jpg", "rejected": "images/fox.png"},
    )  # fmt: skip
    (group,) = read_records(path)
    assert [i.image.name for i in group.images] == ["fox.png", "fox2.png", "wall.jpg"]
    assert group.preferences == ((2, 0),)
    assert group.images[2].scores == {} and group.images[0].scores == {"realism": 3.0, "alignment": 4.5}


def test_given_scores_win_over_the_annotators_mean(write: Write) -> None:
    rows = [{"realism": 1, "alignment": 2}, {"realism": 4, "alignment": None}]
    (group,) = read_records(write(_row(annotations=rows)))
    assert group.images[0].scores == {"realism": 3.0, "alignment": 4.5}
    (group,) = read_records(write(_row(annotations=rows, scores=...)))
    assert group.images[0].scores == {"realism": 2.5, "alignment": 2.0}


def test_bad_records_are_reported_together(write: Write) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        (_row(image="images/fox2.png", scores={"realism": float("nan"), "alignment": 1}), "is nan"),
        (_row(image="images/fox2.png", scores={"realism": 0.5, "alignment": 1}), "is 0.5; scores go from 1 to 5"),
        (_row(image="images/fox2.png", scores={"realism": 5.5, "alignment": 1}), "is 5.5; scores go from 1 to 5"),
        (_row(image="images/fox2.png", scores={"realism": "4", "alignment": 1}), "expected a number"),
        (_row(image="images/fox2.png", scores={"realism": True, "alignment": 1}), "expected a number"),
        (_row(image="images/fox2.png", scores={"realsim": 4, "alignment": 1}), "rates alignment, realsim, but line 1"),
        (_row(image="images/fox2.png", scores={}), "expected dimensions and scores"),
        (_row(image="images/fox2.png", scores=3), "expected dimensions and scores"),
        (_row(), "stands in line 1 of the group already"),
        (_row(prompt="another fox", image="images/fox2.png"), "has another `prompt` in line 1"),
        (_row(prompt=...), "`prompt`: expected a text, found nothing"),
        (_row(image=...), "expected either `image` with scores, or `chosen`"),
        (_row(chosen="images/fox.png", rejected="images/fox2.png"), "expected either `image`"),
        (_row(group=...), "`group`: expected the name of a group"),
        (_row(image="images/fox2.png", critique=""), "`critique` is empty"),
        (_row(image="images/fox2.png", annotations={"realism": 3}), "expected a list"),
        (_row(image="images/fox2.png", annotations=[{"realism": 9, "alignment": 1}]), "`annotations[0].realism` is 9"),
        (_row(image="images/wall.jpg", metadata=[1]), "`metadata`: expected an object"),
        (_row(group="h", scores=...), "neither scores nor preferences"),
    ]
    found = _mistakes(read_records, write(_row(), *(row for row, _ in bad)))
    assert len(found) == len(bad)
    for line, (number, (_, words)) in zip(found, enumerate(bad, 2), strict=True):
        assert line.startswith(f"{number}: ") and words in line


def test_bad_pairs_are_reported_together(write: Write) -> None:
    def pair(chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
        return {"group": "g", "prompt": "a fox", "chosen": chosen, "rejected": rejected} | more

    path = write(
        pair("images/fox.png", "images/fox2.png"), pair("images/fox.png", "images/fox.png"),
        pair("images/fox2.png", "images/fox.png"), pair("images/fox.png", "images/fox2.png"),
        pair("images/fox.png", None), pair("../x.png", "images/fox.png"),
        pair("images/fox.png", "images/wall.jpg", group="g", prompt="a wolf"),
    )  # fmt: skip
    words = ["same picture", "the other way round", "already", "`rejected`: expected the path", "leaves", "another"]
    found = _mistakes(read_records, path)
    assert [line.split(":")[0] for line in found] == ["2", "3", "4", "5", "6", "7"]
    assert all(w in line for w, line in zip(words, found, strict=True))


def test_an_annotator_rates_a_picture_once(write: Write) -> None:
    rows = [{"annotator": "ada", "realism": 3, "alignment": 2}] * 2
    assert "rates this picture twice" in _mistakes(read_records, write(_row(annotations=rows)))[0]


def _groups(folder: Path) -> list[PreferenceGroup]:
    images = [(folder / "images" / n).resolve() for n in ("fox.png", "fox2.png", "wall.jpg")]
    seen = ({"realism": 3.0, "alignment": 4.5}, {"realism": 2.0, "alignment": 5.0})
    return [
        PreferenceGroup(
            "1", Prompt('a "fox", \u00fcber', {"facts": [{"kind": "object", "count": 1}], "composition": "x"}),
            (RatedImage(images[0], {"realism": 2.5, "alignment": 4.75}, seen, "soft; a tail is missing"),
             RatedImage(images[1], {"realism": 1.0})),
        ),
        PreferenceGroup("2", Prompt("a wall"), (RatedImage(images[2]), RatedImage(images[0])), ((0, 1),)),
        PreferenceGroup("3", Prompt("a wall"), (RatedImage(images[2], {"realism": 4.0}), RatedImage(images[1])),
                        ((0, 1),)),
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_records_survive_a_round_trip(folder: Path, suffix: str) -> None:
    groups = _groups(folder)
    groups[0] = PreferenceGroup("1", groups[0].prompt, (groups[0].images[0],))
    groups[2] = PreferenceGroup("3", groups[2].prompt, (RatedImage(groups[2].images[0].image,
                                {"realism": 4.0, "alignment": 1.0}), groups[2].images[1]), ((0, 1),))  # fmt: skip
    path = folder / f"out.{suffix}"
    write_records(groups, path)
    again = read_records(path)
    assert again == groups
    assert [dict(g.prompt.metadata) for g in again] == [dict(g.prompt.metadata) for g in groups]
    summary = validate_file(path)
    assert (summary.kind, summary.groups, summary.images, summary.critiques) == ("preferences", 3, 3, 1)
    assert summary.preferences == 2 and summary.annotators == (0, 2)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_writing_refuses_pictures_outside(folder: Path) -> None:
    (folder / "sub").mkdir()
    with pytest.raises(DataError, match="does not lie under"):
        write_records(_groups(folder), folder / "sub" / "out.jsonl")
    with pytest.raises(DataError, match=r"written as \.jsonl or \.parquet"):
        write_records(_groups(folder), folder / "out.csv")


def test_a_failed_write_leaves_the_old_file(folder: Path) -> None:
    path = folder / "out.jsonl"
    path.write_text("old")
    image = RatedImage((folder / "images/fox.png").resolve(), {"realism": float("nan")})
    with pytest.raises(ValueError):
        write_records([PreferenceGroup("1", Prompt("x"), (image,))], path)
    assert path.read_text() == "old" and not list(folder.glob(".out*"))


# ---------------------------------------------------------------------------------------------------------- validation


def test_validate_opens_the_pictures(write: Write, folder: Path) -> None:
    whole = (folder / "images/wall.jpg").read_bytes()
    (folder / "images/wall.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "images/fox2.png").write_bytes(b"")
    path = write(_row(), _row(image="images/fox2.png"), _row(image="images/wall.jpg"))
    with pytest.raises(DataError) as caught:
        validate_file(path)
    text = str(caught.value)
    assert "2 of its pictures" in text and "fox2.png: the file is empty" in text and "wall.jpg" in text
    assert validate_file(path, open_images=False).images == 3


def test_validate_tells_what_it_cannot_place(write: Write) -> None:
    with pytest.raises(DataError, match="its columns are picture, text"):
        validate_file(write({"picture": "a.png", "text": "a fox"}))
    with pytest.raises(DataError, match="no rows"):
        validate_file(write())


def test_validate_names_columns_that_nobody_reads(write: Write) -> None:
    summary = validate_file(write(_row(date="2026-01-01")))
    assert summary.unused_columns == ("date",) and "not read: date" in summary.describe()
    text = summary.describe()
    assert "1 row; 1 different prompt; 1 group; 1 image; scores on" in text and "aggregate scores only" in text


def test_validate_needs_no_torch(write: Write) -> None:
    path = write(_row())
    code = f"import sys; from rewardtune.data.records import validate_file; validate_file({str(path)!r}); " \
           "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------- parquet


def test_a_table_written_elsewhere(folder: Path) -> None:
    table = pyarrow.table({
        "group": [1, 1], "prompt": ["a fox", "a fox"], "image": ["images/fox.png", "images/fox2.png"],
        "scores": pyarrow.array([{"realism": 3.0, "alignment": None}, {"realism": 4.0, "alignment": 2.0}]),
        "critique": [None, "soft"],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    (group,) = read_records(folder / "a.parquet")
    assert group.id == "1"
    assert [dict(i.scores) for i in group.images] == [{"realism": 3.0}, {"realism": 4.0, "alignment": 2.0}]
    assert [i.critique for i in group.images] == [None, "soft"]


def test_parquet_mistakes_name_the_row(folder: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["fine", "bad\x07", None]}), folder / "a.parquet")
    found = _mistakes(read_prompts, folder / "a.parquet")
    assert [line.split(":")[0] for line in found] == ["2", "3"]


def test_a_broken_table_is_a_data_error(folder: Path) -> None:
    (folder / "a.parquet").write_bytes(b"PAR1 this is none PAR1")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_prompts(folder / "a.parquet")
