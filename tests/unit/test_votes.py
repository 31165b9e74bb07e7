"""People's votes: checked on the way in, merged by hand-computed rules, shown on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_comparison as tiny

from rewardtune.compare.page import render
from rewardtune.compare.report import add_votes
from rewardtune.compare.votes import judge_agreement, merge_votes, read_votes
from rewardtune.errors import DataError

SHAPE: dict[str, Any] = {"report": "abc", "sides": ["base", "tuned"], "prompts": 4, "seeds": 1}


def vote(prompt: int, choice: str, *, tuned: str = "left", seed: int = 0) -> dict[str, Any]:
    """`tuned`: where the tuned side stood."""
    left, right = ("tuned", "base") if tuned == "left" else ("base", "tuned")
    return {"prompt": prompt, "seed": seed, "left": left, "right": right, "choice": choice, "seconds": 1.5}


def write(path: Path, votes: list[dict[str, Any]], **other: Any) -> Path:
    content = {"kind": "rewardtune-votes", "version": 1, "report": "abc", "rater": "Ann", "session": "s1",
               "saved": "2026-01-01T00:00:00Z", "votes": votes, **other}  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def test_left_and_right_are_turned_back_into_sides(tmp_path: Path) -> None:
    votes = [vote(0, "left"), vote(1, "right", tuned="right"), vote(2, "left", tuned="right"), vote(3, "both-bad")]
    merged = merge_votes(read_votes([write(tmp_path / "a.json", votes)], **SHAPE), a="tuned", b="base")
    assert merged is not None
    # prompts 0 and 1 for tuned, 2 for base, 3 a tie
    assert (merged["net"].wins, merged["net"].ties, merged["net"].losses) == (2, 1, 1)
    assert merged["net"].net == 0.25
    assert merged["both_bad"] == 1
    assert merged["agreement"] is None, "one rater agrees with nobody"
    turned = merge_votes(read_votes([tmp_path / "a.json"], **SHAPE), a="base", b="tuned")
    assert turned is not None and turned["net"].net == -0.25


def test_raters_are_merged_and_compared(tmp_path: Path) -> None:
    ann = write(tmp_path / "a.json", [vote(0, "left"), vote(1, "left"), vote(2, "tie")])
    bob = write(
        tmp_path / "b.json", [vote(0, "left"), vote(1, "right"), vote(2, "both-bad")], rater="Bob", session="s2"
    )
    merged = merge_votes(read_votes([ann, bob], **SHAPE), a="tuned", b="base")
    assert merged is not None
    assert merged["votes"] == 6
    assert merged["net"].net == pytest.approx(2 / 6)
    # they agree on prompts 0 and 2 (a tie and both bad are the same verdict), not on 1
    assert merged["agreement"] == {"agree": pytest.approx(2 / 3), "pairs": 3}
    assert [(r["rater"], r["votes"]) for r in merged["raters"]] == [("Ann", 3), ("Bob", 3)]
    assert merged["raters"][0]["net"] == pytest.approx(2 / 3)
    # clusters are prompts: nets of single prompts are 1, 0 and 0, so the interval is that of three numbers
    assert merged["net"].ci95[0] == 0.0


def test_a_later_vote_replaces_an_earlier_one_even_across_downloads(tmp_path: Path) -> None:
    first = write(tmp_path / "1.json", [vote(0, "right"), vote(1, "left")])
    second = write(
        tmp_path / "2.json", [vote(0, "right"), vote(1, "left"), vote(0, "left")], saved="2026-01-02T00:00:00Z"
    )
    for order in ([first, second], [second, first]):
        merged = merge_votes(read_votes(order, **SHAPE), a="tuned", b="base")
        assert merged is not None and (merged["votes"], merged["net"].wins) == (2, 2)


def test_judge_and_people(tmp_path: Path) -> None:
    files = read_votes([write(tmp_path / "a.json", [vote(0, "left"), vote(1, "left"), vote(2, "tie")])], **SHAPE)
    index = {(p, 0): p for p in range(4)}
    found = judge_agreement(files, np.array([1, -1, 1, 0], dtype=np.int8), index, a="tuned", b="base")
    assert found == {"agree": 0.5, "votes": 2}
    assert judge_agreement(files, np.zeros(4, dtype=np.int8), index, a="tuned", b="base") is None


def test_votes_on_another_pair_do_not_count(tmp_path: Path) -> None:
    files = read_votes([write(tmp_path / "a.json", [vote(0, "left")])], **{**SHAPE, "sides": ["base", "tuned", "x"]})
    assert merge_votes(files, a="x", b="base") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"report": "other"}, "other images"),
        ({"kind": "something"}, "not votes"),
        ({"version": 2}, "version"),
        ({"extra": 1}, "extra"),
        ({"votes": [vote(9, "left")]}, "vote 0 names"),
        ({"votes": [vote(-1, "left")]}, "prompt"),
        ({"votes": [vote(0, "left", seed=7)]}, "vote 0 names"),
        ({"votes": [{**vote(0, "left"), "left": "<b>"}]}, "vote 0 names"),
        ({"votes": [{**vote(0, "left"), "right": "tuned"}]}, "vote 0 names"),
        ({"votes": [vote(0, "maybe")]}, "choice"),
    ],
)
def test_files_that_are_not_votes_of_this_report(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.json", **{"votes": [vote(0, "left")], **change})
    with pytest.raises(DataError, match=message) as caught:
        read_votes([path], **SHAPE)
    assert str(path) in str(caught.value)


def test_broken_missing_and_huge_files(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"kind": ')
    (tmp_path / "huge.json").write_bytes(b" " * 8_000_001)
    for name in ("broken.json", "huge.json", "missing.json"):
        with pytest.raises(DataError, match=name):
            read_votes([tmp_path / name], **SHAPE)


def test_human_verdict_reaches_document_and_page(tmp_path: Path) -> None:
    world = tiny.make(tmp_path / "report", prompts=4, seeds=1)
    document = world.document()
    votes = [vote(0, "left"), vote(1, "left"), vote(2, "right"), vote(3, "tie")]
    path = write(tmp_path / "a.json", votes, report=document["report"], rater="<b>Ann\x1b")
    files = read_votes([path], **{**SHAPE, "report": document["report"]})
    add_votes(document, files, world.scored, world.plan)
    add_votes(document, files, world.scored, world.plan)
    judged, human = document["pairs"]
    assert judged["judge"] == "oracle"
    assert (human["judge"], human["wins"], human["ties"], human["losses"], human["net"]) == ("human", 2, 1, 1, 0.25)
    assert document["votes"]["pairs"][0]["judge_agreement"]["votes"] == 3
    assert "Of 4 votes, people preferred tuned in 2" in document["headline"]
    json.dumps(document, allow_nan=False)
    html = render(world.folder, document, world.scored, world.plan)
    assert "People: 4 votes by 1 rater" in html
    assert "&lt;b&gt;Ann +25.0 % in 4" in html
