"""Public preference sets become records: each layout's meaning, every way in, what is left out, and every refusal."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from rewardtune.cli.app import app
from rewardtune.data import importers
from rewardtune.data.importers import Imported, import_records
from rewardtune.data.layouts import LAYOUTS, Layout, Order, Scale
from rewardtune.data.records import PreferenceGroup, read_records, validate_file
from rewardtune.errors import DataError, RecipeError

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
Row = dict[str, Any]
Write = Callable[..., Path]


def picture(shade: int, kind: str = "PNG") -> bytes:
    """A small picture, a different file for each shade."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


A, B, C, D = (picture(shade) for shade in (10, 60, 120, 200))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Write:
    def _write(*rows: Row, name: str = "t.parquet", **options: Any) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, **options)
        return path

    return _write


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            app(list(words))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def pick(**changes: Any) -> Row:
    """A row of Pick-a-Pic: A is preferred to B."""
    return {
        "caption": "a fox", "jpg_0": A, "jpg_1": B, "label_0": 1.0, "label_1": 0.0, "has_label": True,
        "are_different": True, "best_image_uid": "u0", "image_0_uid": "u0", "image_1_uid": "u1", "ranking_id": 7,
    } | changes  # fmt: skip


def rated(**changes: Any) -> Row:
    """A row of ImageRewardDB."""
    return {
        "image": {"bytes": A, "path": "a.png"}, "prompt_id": "p1", "prompt": "a fox", "classification": "Animals",
        "image_amount_in_total": 3, "rank": 1, "overall_rating": 7, "image_text_alignment_rating": 4,
        "fidelity_rating": 1,
    } | changes  # fmt: skip


def imported(name: str, *sources: Path, **options: Any) -> Imported:
    return import_records(LAYOUTS[name], sources, "out", **options)


def preferred(group: PreferenceGroup) -> list[tuple[bytes, bytes]]:
    """Contents of the pictures of each stated pair."""
    files = [image.image.read_bytes() for image in group.images]
    return [(files[winner], files[loser]) for winner, loser in group.preferences]


def refused(call: Callable[[], object], kind: type[Exception] = DataError) -> str:
    """The message of a refusal, after which no records are there."""
    with pytest.raises(kind) as caught:
        call()
    assert not Path("out/records.jsonl").exists()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ layouts


def test_pickapic_the_higher_label_wins(write: Write) -> None:
    path = write(pick(), pick(caption="a cat", jpg_0=C, jpg_1=D, label_0=0.0, label_1=1.0))
    done = imported("pickapic-v2", path)
    fox, cat = read_records(done.records)
    assert (fox.prompt, preferred(fox)) == ("a fox", [(A, B)])
    assert (cat.prompt, preferred(cat)) == ("a cat", [(D, C)])
    assert not any(image.scores for group in (fox, cat) for image in group.images)
    assert (done.rows, done.groups, done.images, done.pairs, done.rated) == (2, 2, 4, 2, 0)
    assert done.left_out == {} and done.absent == ()


def test_pickapic_ties_and_unlabelled_rows_are_left_out_and_counted(write: Write) -> None:
    path = write(
        pick(),
        pick(jpg_0=C, label_0=0.5, label_1=0.5),
        pick(jpg_0=D, has_label=False),
        pick(jpg_0=D, label_0=None),
        pick(jpg_0=D, label_1=float("nan")),
        pick(jpg_0=D, caption=None),
        pick(jpg_0=D, caption=" "),
        pick(jpg_0=None),
        pick(jpg_1=A),
    )
    done = imported("pickapic-v2", path)
    (fox,) = read_records(done.records)
    assert preferred(fox) == [(A, B)]
    assert done.left_out == {
        importers.TIED: 1, importers.UNLABELLED: 3, importers.NO_PROMPT: 2, importers.NO_PICTURE: 1, importers.SAME: 1
    }  # fmt: skip
    # pictures of rows that are left out are not written either
    assert len(list(Path("out/images").rglob("*.png"))) == 2


def test_pickapic_without_has_label_takes_every_row_and_says_so(write: Write) -> None:
    row = pick()
    del row["has_label"]
    assert imported("pickapic-v2", write(row)).absent == ("has_label",)


def test_rows_of_one_prompt_are_one_group_and_the_majority_decides(write: Write) -> None:
    path = write(
        pick(), pick(jpg_0=B, jpg_1=A, label_0=0.0, label_1=1.0), pick(label_0=0.0, label_1=1.0),  # A > B by 2 to 1
        pick(jpg_0=B, jpg_1=C), pick(jpg_0=C, jpg_1=B),  # 1 to 1
        pick(jpg_0=C, jpg_1=A),
    )  # fmt: skip
    done = imported("pickapic-v2", path)
    (fox,) = read_records(done.records)
    assert preferred(fox) == [(A, B), (C, A)]
    assert done.left_out == {importers.REPEATED: 2, importers.CANCELLED: 2}


def test_hpdv2_train_one_is_preferred(folder: Path, write: Write) -> None:
    (folder / "b.png").write_bytes(B)
    (folder / "a.png").write_bytes(A)
    path = write({"prompt": "a fox", "image_path": ["a.png", "b.png"], "human_preference": [0, 1]})
    (fox,) = read_records(imported("hpdv2", path).records)
    assert preferred(fox) == [(B, A)]


def test_hpdv2_test_the_lowest_rank_is_best(write: Write) -> None:
    path = write({"prompt": "a fox", "image_path": [A, B, C], "rank": [2, 1, 2]})
    done = imported("hpdv2", path)
    (fox,) = read_records(done.records)
    assert sorted(preferred(fox)) == sorted([(B, A), (B, C)])
    assert done.left_out == {importers.TIED: 1}


def test_hpdv2_as_published_is_json_with_file_path(folder: Path) -> None:
    (folder / "a.png").write_bytes(A)
    (folder / "b.png").write_bytes(B)
    rows = [{"human_preference": [1, 0], "prompt": "ein Füchs\u2028lein", "file_path": ["a.png", "b.png"]}] * 2
    for name, text in {
        "train.json": json.dumps(rows, indent=1, ensure_ascii=False),
        "lines.jsonl": "\ufeff" + "\n".join(json.dumps(row) for row in rows),
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
        done = import_records(LAYOUTS["hpdv2"], [name], f"out-{name}")
        (group,) = read_records(done.records)
        assert (group.prompt, preferred(group), done.rows) == ("ein Füchs\u2028lein", [(A, B)], 2)


def test_hpdv3_the_first_path_is_preferred(folder: Path, write: Write) -> None:
    for name, data in {"x.png": A, "y.png": B}.items():
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / name).write_bytes(data)
    path = write({
        "prompt": "a fox", "path1": "images/y.png", "path2": "images/x.png", "confidence": 0.9, "choice_dist": [3, 9],
        "model1": "m", "model2": "n",
    })  # fmt: skip
    (fox,) = read_records(imported("hpdv3", path).records)
    assert preferred(fox) == [(B, A)]


def test_imagerewarddb_ratings_become_scores_and_ranks_preferences(write: Write) -> None:
    path = write(
        rated(rank=2, overall_rating=4),
        rated(prompt_id="p2", prompt="a cat"),
        rated(image={"bytes": B, "path": None}, rank=1),
        rated(image={"bytes": C, "path": None}, rank=2, overall_rating=1),
    )
    done = imported("imagerewarddb", path)
    fox, cat = read_records(done.records)
    assert (fox.id, cat.id, cat.preferences) == ("p1", "p2", ())
    assert [dict(image.scores) for image in fox.images] == [
        {"overall": 3.0, "alignment": 3.0, "fidelity": 1.0},
        {"overall": 5.0, "alignment": 3.0, "fidelity": 1.0},
        {"overall": 1.0, "alignment": 3.0, "fidelity": 1.0},
    ]
    assert sorted(preferred(fox)) == sorted([(B, A), (B, C)])
    assert (done.rated, done.pairs, done.left_out) == (4, 2, {importers.TIED: 1})


def test_imagerewarddb_in_its_grouped_form_means_the_same(write: Write) -> None:
    cells = {"image": [{"bytes": x, "path": "x"} for x in (A, B)], "rank": [2, 1], "overall_rating": [1, 7],
             "image_text_alignment_rating": [4, 4], "fidelity_rating": [1, 1]}  # fmt: skip
    (fox,) = read_records(imported("imagerewarddb", write({"prompt_id": "p", "prompt": "a fox", **cells})).records)
    assert preferred(fox) == [(B, A)]
    assert [image.scores["overall"] for image in fox.images] == [1.0, 5.0]


def test_imagerewarddb_metadata_names_files(folder: Path, write: Write) -> None:
    row = rated(image_path="images/train/train_1/a.webp")
    del row["image"]
    file = folder / row["image_path"]
    file.parent.mkdir(parents=True)
    file.write_bytes(picture(9, "WEBP"))
    (group,) = read_records(imported("imagerewarddb", write(row)).records)
    assert group.images[0].image.suffix == ".webp"


def rich(**changes: Any) -> Row:
    return {"image": A, "prompt": "a fox", "filename": "train/u0.png", "artifact_score": 0.75,
            "misalignment_score": 1.0, "aesthetics_score": 0.0, "overall_score": 0.5} | changes  # fmt: skip


def test_richhf_higher_is_better_in_all_four(write: Write) -> None:
    done = imported("richhf-18k", write(rich(), rich(image=B, artifact_score=0.25), rich(image=A)))
    (fox,) = read_records(done.records)
    assert dict(fox.images[0].scores) == {"plausibility": 4.0, "alignment": 5.0, "aesthetics": 1.0, "overall": 3.0}
    assert fox.images[1].scores["plausibility"] == 2.0
    assert fox.preferences == () and done.left_out == {importers.TWICE: 1}


def test_a_picture_without_all_scores_is_left_out(write: Write) -> None:
    done = imported("richhf-18k", write(rich(), rich(image=B, overall_score=None)))
    (fox,) = read_records(done.records)
    assert len(fox.images) == 1 and done.left_out == {importers.UNRATED: 1}


def test_a_scale_may_run_downwards_and_can_be_undone() -> None:
    scale = Scale(("stars",), worst=9, best=1)
    assert [scale.score(x) for x in (9, 5, 1)] == [1.0, 3.0, 5.0]
    for x in (9.0, 6.5, 1.0):
        assert scale.worst + (scale.score(x) - 1) * (scale.best - scale.worst) / 4 == x
    assert scale.formula() == "1 + 4 (x - 9) / -8"
    assert Scale(("x",), 0, 1).formula() == "1 + 4 x"


def test_every_layout_says_where_its_facts_come_from() -> None:
    for name, layout in LAYOUTS.items():
        assert layout.name == name
        assert "onfirmed" in layout.facts and layout.licence != "?" and layout.summary


# -------------------------------------------------------------------------------------------------------- own layouts


def test_a_layout_of_ones_own_with_a_group_and_scores_for_each_of_two(write: Write) -> None:
    ours = Layout(
        "ours", "drafts", prompt="brief", group="job", pictures=("left", "right"),
        orders=(Order(("l", "r"), "lowest"),), scores={"quality": Scale(("ql", "qr"), 0, 10)},
    )  # fmt: skip
    path = write(
        {"brief": "x", "job": 1, "left": A, "right": B, "l": 5, "r": 3, "ql": 0, "qr": 10},
        {"brief": "x", "job": 1, "left": B, "right": C, "l": 1, "r": 1, "ql": 10, "qr": 5},
    )
    (group,) = read_records(import_records(ours, [path], "out").records)
    assert group.id == "1" and preferred(group) == [(B, A)]
    assert [dict(image.scores) for image in group.images] == [{"quality": 1.0}, {"quality": 5.0}, {"quality": 3.0}]


def test_ranks_of_a_group_without_scores(write: Write) -> None:
    ours = Layout("ours", "ranked", prompt="p", pictures=("i",), orders=(Order(("r",), "lowest"),), compare="group")
    path = write(*[{"p": p, "i": i, "r": r} for p, i, r in (("x", A, 2), ("x", B, 1), ("y", C, 1))])
    done = import_records(ours, [path], "out")
    (group,) = read_records(done.records)
    assert preferred(group) == [(B, A)] and done.left_out == {importers.UNUSED: 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pictures": ("a",)}, "give `orders` or `scores`"),
        ({"pictures": ("a", "b"), "orders": (Order(("x",), "highest"),)}, "x stands beside 2 columns"),
        ({"pictures": ("a", "b"), "scores": {"q": Scale(("x",), 0, 1)}}, "x stands beside 2 columns"),
    ],
)
def test_a_layout_that_says_nothing_or_too_little(arguments: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Layout("ours", "drafts", prompt="p", **arguments)
    with pytest.raises(RecipeError, match="no length"):
        Scale(("x",), 3, 3)


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize(("data", "suffix"), [(A, ".png"), (picture(1, "JPEG"), ".jpg"), (picture(1, "WEBP"), ".webp")])
def test_pictures_are_written_once_under_the_name_of_their_content(write: Write, data: bytes, suffix: str) -> None:
    done = imported("pickapic-v2", write(pick(jpg_0=data, jpg_1=C), pick(caption="a cat", jpg_0=C, jpg_1=data)))
    name = hashlib.sha256(data).hexdigest()
    file = Path("out/images") / name[:2] / f"{name}{suffix}"
    assert file.read_bytes() == data
    assert len([path for path in Path("out").rglob("*") if path.is_file()]) == 3
    assert (done.images, done.groups) == (2, 2)
    assert validate_file(done.records).preferences == 2


@pytest.mark.parametrize("as_path", [False, True])
def test_the_three_ways_of_giving_a_picture(folder: Path, write: Write, as_path: bool) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.png").write_bytes(A)
    cell = {"bytes": None, "path": "a.png"} if as_path else {"bytes": A, "path": "not there.png"}
    path = write(rated(image=cell), name="sub/t.parquet")
    (group,) = read_records(imported("imagerewarddb", path).records)
    assert group.images[0].image.read_bytes() == A
    assert group.images[0].image.is_relative_to(folder / "out")


# ------------------------------------------------------------------------------------------------- columns and limits


def test_map_reads_another_column(write: Write) -> None:
    path = write(pick(text="a wall", winner=0.0, label_1=1.0))
    done = imported("pickapic-v2", path, renamed={"text": "caption", "winner": "label_0"})
    (group,) = read_records(done.records)
    assert (group.prompt, preferred(group)) == ("a wall", [(B, A)])


def test_a_missing_column_names_the_closest_one_and_the_map(write: Write) -> None:
    row = {**pick(captions="a fox", jpg0=A), "label": 1.0}
    del row["caption"], row["jpg_0"]
    said = refused(lambda: imported("pickapic-v2", write(row)))
    assert "t.parquet: 2 of the columns of layout pickapic-v2 are missing" in said
    assert "`caption`, the prompt; its pictures form a group: closest is `captions`: if that is it, add --map "\
           "captions=caption" in said  # fmt: skip
    assert "--map jpg0=jpg_0" in said
    assert "The file has: " in said and "best_image_uid" in said
    assert not Path("out").exists()


def test_a_missing_order_names_all_ways_of_giving_it(write: Write) -> None:
    said = refused(lambda: imported("hpdv2", write({"prompt": "x", "image_path": [A, B], "ranks": [1, 2]})))
    assert "`human_preference` (or `rank`)" in said


def test_columns_of_every_table_are_checked_before_anything_is_written(write: Write) -> None:
    bad = write({"caption": "x"}, name="bad.parquet")
    refused(lambda: imported("pickapic-v2", write(pick()), bad))
    assert not Path("out").exists()


def test_a_map_to_or_from_what_is_not_there(write: Write) -> None:
    path = write(pick())
    said = refused(lambda: imported("pickapic-v2", path, renamed={"caption": "captoin"}), RecipeError)
    assert "did you mean 'caption'?" in said
    said = refused(lambda: imported("pickapic-v2", path, renamed={"captoin": "caption"}))
    assert "t.parquet" in said and "did you mean 'caption'?" in said


def test_limit_counts_rows_of_all_tables(write: Write) -> None:
    first = write(pick(), pick(caption="b"))
    second = write(pick(caption="c"), pick(caption="d"), name="u.parquet")
    done = imported("pickapic-v2", first, second, limit=3)
    assert done.rows == 3
    assert [group.prompt for group in read_records(done.records)] == ["a fox", "b", "c"]
    assert [group.id for group in read_records(done.records)] == ["pickapic-v2-1", "pickapic-v2-2", "pickapic-v2-3"]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"caption": "a \x1b[2J fox"}, "`caption` holds the control character U+001B"),
        ({"label_1": 2.0}, "`label_1` is 2; expected a number from 0 to 1."),
        ({"label_1": float("inf")}, "`label_1` is inf; expected a number from 0 to 1."),
    ],
)
def test_a_mistake_names_file_row_and_column(write: Write, changes: Row, said: str) -> None:
    message = refused(lambda: imported("pickapic-v2", write(pick(), pick(**changes))))
    assert f"t.parquet:2: {said}" in message
    assert message.startswith(f"{Path('t.parquet').resolve()}: 1 mistake.")
    assert not [path for path in Path("out").rglob("*") if ".part" in path.name]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (A[:48], "the picture cannot be decoded"),
        (b"\x89PNG" + B[:9], "not a PNG, JPEG or WEBP picture. Convert it"),
        (b"GIF89a" + A, "not a PNG, JPEG or WEBP picture (it begins with b'GIF89a"),
        (b"", "not a PNG, JPEG or WEBP picture"),
    ],
)
def test_a_picture_that_cannot_be_read_is_left_out_counted_and_named(write: Write, data: bytes, said: str) -> None:
    done = imported("pickapic-v2", write(pick(), pick(caption="another", jpg_0=data)))
    assert (done.groups, done.pairs) == (1, 1)
    assert done.left_out == {"pictures that cannot be read": 1, "pictures left with neither scores nor a preference": 1}
    assert done.unreadable[0].startswith(f"{Path('t.parquet').resolve()}:2: `jpg_0`: {said}")
    assert not [path for path in Path("out").rglob("*") if ".part" in path.name]
    done.records.unlink()
    message = refused(lambda: imported("pickapic-v2", write(pick(jpg_0=data, jpg_1=data))))
    assert "of 1 rows none can be used" in message and said in message


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("caption", 5, "`caption`: expected a text, found 5."),
        ("label_0", "1", "`label_0`: expected a number, found '1'."),
        ("label_0", True, "`label_0`: expected a number, found True."),
        ("jpg_0", 5, "`jpg_0`: expected a picture as bytes, a path or a struct of both, found 5."),
        ("jpg_0", "a.png", "`jpg_0`: there is no file 'a.png' under"),
        ("jpg_0", "../a.png", "`jpg_0`: '../a.png' leaves the folder"),
        ("jpg_0", "https://x.org/a.png", "is a URL; nothing is fetched"),
        ("jpg_0", "", "expected the path of a picture, found ''."),
        ("has_label", "yes", "`has_label`: expected true or false, found 'yes'."),
        ("label_0", [1.0, 0.0], "`label_0` has 3 numbers for 2 pictures."),
    ],
)
def test_a_wrong_type(write: Write, column: str, value: Any, said: str) -> None:
    assert said in refused(lambda: imported("pickapic-v2", write(pick(**{column: value}))))


def test_a_mistake_calls_a_column_as_the_file_does(write: Write) -> None:
    row = pick(text=5)
    del row["caption"]
    assert "`text`: expected a text" in refused(
        lambda: imported("pickapic-v2", write(row), renamed={"text": "caption"})
    )


@pytest.mark.parametrize(("value", "name"), [(0, "overall_rating"), (8, "fidelity_rating")])
def test_a_score_outside_its_scale(write: Write, value: int, name: str) -> None:
    said = refused(lambda: imported("imagerewarddb", write(rated(**{name: value}))))
    assert f"`{name}` is {value}; expected a number from 1 to 7." in said


def test_a_group_with_two_prompts_or_no_name(write: Write) -> None:
    said = refused(lambda: imported("imagerewarddb", write(rated(), rated(prompt="a cat"))))
    assert "t.parquet:2: group 'p1' has another prompt in an earlier row, 'a fox'" in said
    said = refused(lambda: imported("imagerewarddb", write(rated(), rated(prompt_id=None))))
    assert "`prompt_id`: expected a group's name, found nothing." in said


def test_many_mistakes_are_told_together_and_the_rest_is_not_read(write: Write) -> None:
    reached: list[int] = []
    rows = [pick(label_0=9.0)] * 100
    said = refused(lambda: imported("pickapic-v2", write(*rows), progress=reached.append))
    assert said.count("`label_0` is 9") == 19
    assert "t.parquet:20: this row and those after it were not read." in said
    assert reached[-1] == 19


def test_nothing_usable_says_why(write: Write) -> None:
    said = refused(lambda: imported("pickapic-v2", write(pick(has_label=False), pick(label_0=0.5, label_1=0.5))))
    assert "of 2 rows none can be used" in said
    assert "rows without a label: 1; tied pairs: 1" in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("t.csv", b"caption\n", "expected a .parquet, .json or .jsonl table, found '.csv'"),
        ("t.json", b"[]", "there are no rows in it"),
        ("t.json", b'[{"caption": 1}, nonsense]', "t.json:2: not a JSON object"),
        ("t.json", b'[{"caption": "x"', "t.json:1: not a JSON object"),
        ("t.json", b"[1, 2]", "expected a JSON object such as {...}, found 1."),
        ("t.json", b'[{"caption": "\xff"}]', "not UTF-8"),
    ],
)
def test_a_file_that_is_no_table(folder: Path, name: str, content: bytes, said: str) -> None:
    (folder / name).write_bytes(content)
    only = Layout("ours", "x", prompt="caption", pictures=("caption",), orders=(Order((), "first"),))
    assert said in refused(lambda: import_records(only, [name], "out"))
    assert "there is no such file" in refused(lambda: import_records(only, ["nowhere.parquet"], "out"))


def test_json_objects_may_be_larger_than_what_is_read_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewardtune.data import tables

    monkeypatch.setattr(tables, "CHUNK", 7)
    (folder / "a.png").write_bytes(A)
    (folder / "b.png").write_bytes(B)
    rows = [{"prompt": f"number {i}", "path1": "a.png", "path2": "b.png"} for i in range(3)]
    (folder / "t.json").write_text(json.dumps(rows))
    groups = read_records(imported("hpdv3", folder / "t.json").records)
    assert [group.prompt for group in groups] == ["number 0", "number 1", "number 2"]


# ------------------------------------------------------------------------------------- interruptions, memory, resuming


def test_an_interrupted_import_leaves_no_records_and_continues(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(pick(), pick(jpg_0=C))

    def interrupt(rows: int) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        imported("pickapic-v2", path, progress=interrupt)
    there = {file: file.stat().st_mtime_ns for file in Path("out").rglob("*.png")}
    assert len(there) == 2 and not Path("out/records.jsonl").exists()
    checked = []
    real = importers.open_image
    monkeypatch.setattr(importers, "open_image", lambda file: checked.append(file) or real(file))
    done = imported("pickapic-v2", path)
    assert done.pairs == 2 and len(checked) == 1
    assert {file: file.stat().st_mtime_ns for file in there} == there


def test_a_picture_that_was_cut_short_is_written_again(write: Write) -> None:
    done = imported("pickapic-v2", write(pick()))
    done.records.unlink()
    cut = next(Path("out").rglob("*.png"))
    whole = cut.read_bytes()
    cut.write_bytes(whole[:20])
    imported("pickapic-v2", Path("t.parquet"))
    assert cut.read_bytes() == whole


def test_records_are_never_overwritten(write: Write) -> None:
    done = imported("pickapic-v2", write(pick()))
    before = done.records.read_bytes()
    with pytest.raises(RecipeError, match="is there already"):
        imported("pickapic-v2", write(pick(caption="a cat")))
    assert done.records.read_bytes() == before


def peaks(code: str) -> tuple[int, int]:
    """Most bytes that Python's objects and that pyarrow's buffers took at once, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", f"import pyarrow, tracemalloc\n{code}\nprint(tracemalloc.get_traced_memory()[1], "
         "pyarrow.default_memory_pool().max_memory())"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    python, arrow = map(int, done.stdout.split())
    return python, arrow


def test_an_import_holds_neither_the_table_nor_its_pictures(write: Write) -> None:
    # what follows a PNG's end is ignored, so small pictures can be large files
    rows = [pick(caption=f"{i}", jpg_0=picture(i) + bytes([i]) * 200_000, jpg_1=B) for i in range(200)]
    path = write(*rows, compression="none", use_dictionary=False, row_group_size=20)
    assert path.stat().st_size > 40_000_000
    python, arrow = peaks(
        "from rewardtune.data.importers import import_records\nfrom rewardtune.data.layouts import LAYOUTS\n"
        "import_records(LAYOUTS['pickapic-v2'], ['t.parquet'], 'warm', limit=1)\ntracemalloc.start()\n"
        "assert import_records(LAYOUTS['pickapic-v2'], ['t.parquet'], 'out').pairs == 200"
    )
    assert arrow < 16_000_000  # three of ten groups; read at once it is more than the file
    assert python < 16_000_000


def test_a_large_row_group_is_read_page_by_page(write: Write) -> None:
    write(*[pick(jpg_0=bytes([i % 251]) * 12_000) for i in range(4000)], compression="none", use_dictionary=False)
    _, arrow = peaks(
        "from pathlib import Path\nfrom rewardtune.data.layouts import LAYOUTS\n"
        "from rewardtune.data.rows import Mistakes\nfrom rewardtune.data.tables import open_table\n"
        "path = Path('t.parquet')\ntracemalloc.start()\n"
        "table = open_table(path, LAYOUTS['pickapic-v2'], {})\n"
        "assert sum(1 for row in table.rows(Mistakes(path))) == 4000"
    )
    assert arrow < 32_000_000  # two pages of 1,024 rows and a little; the group has 48 MB


# ------------------------------------------------------------------------------------------------------- command line


def test_the_command_says_what_it_wrote_and_left_out(write: Write, run: Any) -> None:
    write(pick(), pick(jpg_0=C, label_0=0.5, label_1=0.5))
    code, out, err = run("data", "import", "pickapic-v2", "t.parquet", "--out", "out")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "out/records.jsonl: of 2 rows: groups: 1; images: 2, rated: 0; stated pairs: 1",
        "left out: tied pairs: 1",
    ]


def test_json_is_one_document(write: Write, run: Any) -> None:
    write(pick(text="x"), pick(has_label=False))
    words = ["data", "import", "pickapic-v2", "t.parquet", "--out", "out", "--map", "text=caption", "--json"]
    code, out, _ = run(*words)
    assert code == 0
    assert json.loads(out) == {
        "records": "out/records.jsonl", "rows": 2, "groups": 1, "images": 2, "pairs": 1, "rated": 0,
        "left_out": {"rows without a label": 1}, "absent": [], "unreadable": [],
    }  # fmt: skip
    assert read_records("out/records.jsonl")[0].prompt == "x"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("pickapic t.parquet --out out", 2, "did you mean 'pickapic-v2'?"),
        ("pickapic-v2 t.parquet", 2, "--out"),
        ("pickapic-v2 --out out", 2, "SOURCE"),
        ("pickapic-v2 t.parquet --out out --map caption", 2, "expected column=field"),
        ("pickapic-v2 t.parquet --out out --map a=caption --map b=caption", 2, "stands in an earlier --map"),
        ("pickapic-v2 t.parquet --out out --limit 0", 2, "--limit"),
        ("pickapic-v2 nowhere.parquet --out out", 3, "there is no such file"),
        ("hpdv3 t.parquet --out out", 3, "--map "),
        ("pickapic-v2 t.parquet --out t.parquet/out", 6, "the system refused"),
    ],
)
def test_a_wrong_command_is_one_paragraph_with_its_code(
    write: Write, run: Any, folder: Path, words: str, code: int, said: str
) -> None:
    write(pick())
    got, out, err = run("data", "import", *words.split())
    assert (got, out) == (code, "")
    assert said in err and "Traceback" not in err
    assert not (folder / "out").exists()


def test_layouts_lists_columns_meanings_and_licences(run: Any) -> None:
    code, out, _ = run("data", "layouts")
    assert code == 0
    for name in LAYOUTS:
        assert f"{name}: " in out
    assert re.search(r"label_0 +the preference: the highest wins, equal is a tie\n", out)
    assert re.search(r"fidelity_rating +score fidelity = 1 \+ 4 \(x - 1\) / 6\n", out)
    assert "licence: Apache-2.0 (card)" in out
    _, out, _ = run("data", "layouts", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert set(rows) == set(LAYOUTS)
    assert rows["hpdv3"]["columns"]["path1"] == "picture 1, preferred"
    assert "Not confirmed" in rows["richhf-18k"]["facts"]


def test_listing_layouts_and_refusing_load_no_torch_and_no_pyarrow() -> None:
    code = (
        "import sys\nfrom rewardtune.cli.app import app\n"
        "try:\n    app(['data', 'layouts'])\nexcept SystemExit as left:\n    assert not left.code\n"
        "assert not [name for name in ('torch', 'pyarrow', 'diffusers') if name in sys.modules]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------ documentation


def _section() -> str:
    return re.split(r"^## ", DOCS.read_text(encoding="utf-8").split("## Public preference sets\n")[1], flags=re.M)[0]


def test_documented_commands_work_when_pasted(write: Write, folder: Path, run: Any) -> None:
    for name, data in {
        "HPD/train/a.png": A,
        "HPD/train/b.png": B,
        "HPDv3/images/x.png": A,
        "HPDv3/images/y.png": B,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write(pick(), name="train-00000-of-00002.parquet")
    write(pick(caption="a cat"), name="train-00001-of-00002.parquet")
    hpd = [{"human_preference": [1, 0], "prompt": "x", "file_path": ["a.png", "b.png"]}]
    (folder / "HPD/train/train.json").write_text(json.dumps(hpd))
    hpd3 = [{"prompt": "x", "path1": "images/x.png", "path2": "images/y.png"}]
    (folder / "HPDv3/train.json").write_text(json.dumps(hpd3))
    write(rated(), name="metadata-train.parquet")
    row = rich(text="a fox")
    del row["prompt"]
    write(row, name="richhf-train.parquet")
    commands = re.findall(r"```bash\n(.*?)```", _section(), re.S)[0].splitlines()
    assert len(commands) == 7
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "rewardtune"
        code, out, err = run(*[found for word in words for found in (sorted(glob.glob(word)) or [word])])
        assert (code, err) == (0, ""), command
        assert out
    assert len(read_records("data/pickapic/records.jsonl")) == 2


def test_documented_layout_of_ones_own_runs(write: Write) -> None:
    write({"brief": "x", "left": A, "right": B, "left_votes": 3, "right_votes": 5}, name="votes.parquet")
    (code,) = re.findall(r"```py\n(.*?)```", _section(), re.S)
    exec(code, {})
    (group,) = read_records("data/ours/records.jsonl")
    assert preferred(group) == [(B, A)]


def test_the_documented_table_names_every_column_that_is_read() -> None:
    rows = {cells[0].strip("` "): line for line in _section().splitlines() if len(cells := line.split("|")[1:]) == 6}
    assert set(LAYOUTS) <= set(rows)
    for name, layout in LAYOUTS.items():
        for column, becomes in layout.columns().items():
            assert (f"`{column}`" in rows[name]) == (becomes != "not read"), (name, column)
        for dimension, scale in layout.scores.items():
            assert dimension in rows[name] and scale.formula() in rows[name]
