"""The judge's comparison with artwork: where a template is laid, what is asked for, and what training feeds it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from rewardtune.rewards.pocket_oracle import PocketOracle

from rewardtune.data.images import to_tensor
from rewardtune.pocket import likeness, oracle
from rewardtune.pocket.likeness import SIZES, WIDE, WINDOW, Likeness, lay_over, looks, windows
from rewardtune.pocket.scenes import CONCEPTS, Scene, render, sample_scene, tints_of

DEV = Path(__file__).parents[2] / "dev" / "pocket"
SIDE = WINDOW // 2


@pytest.fixture(scope="module")
def judge() -> PocketOracle:
    return PocketOracle.load(PocketOracle.Config())


def scenes(count: int) -> list[Scene]:
    rng = random.Random("test-likeness")
    return [sample_scene(rng, "heldout") for _ in range(count)]


def test_a_window_holds_what_lies_around_the_centre() -> None:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    side = torch.tensor([WINDOW / WIDE])  # then a pixel of the window is one of the picture
    seen = windows(picture, torch.tensor([30.0]), torch.tensor([33.0]), side, room=0)
    expected = picture[..., 33 - 20 : 33 + 20, 30 - 20 : 30 + 20] * 2 - 1
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


def test_a_template_is_laid_where_it_fits_best() -> None:
    torch.manual_seed(1)
    model = Likeness(1).eval()
    images = torch.rand(3, 3, 64, 64)
    centre, side = torch.full((3,), 32.0), torch.full((3,), 24.0)
    with torch.no_grad():
        seen = looks(model, images, centre, centre, side)
    planted = [(0, 4, 4), (2, 0, 7), (3, 8, 1)]  # size, row, column of each
    expected = torch.stack([seen[s][i, :, r : r + SIDE, c : c + SIDE] for i, (s, r, c) in enumerate(planted)])
    noisy = expected + 0.05 * expected.std() * torch.randn_like(expected)
    found, where = lay_over(seen, noisy)
    assert [tuple(row) for row in where.tolist()] == planted
    torch.testing.assert_close(found, expected)
    # and that is the least squared distance, written out
    gaps = {
        (s, r, c): float((seen[s][1, :, r : r + SIDE, c : c + SIDE] - noisy[1]).square().sum())
        for s in range(len(SIZES)) for r in range(9) for c in range(9)
    }  # fmt: skip
    assert min(gaps, key=lambda place: gaps[place]) == planted[1]


def test_there_is_a_template_for_whatever_a_caption_can_ask_for() -> None:
    names = {"concepts": ["anchor", *sorted(CONCEPTS)], "tints": [None]}  # a name that is no longer drawn has none
    pairs = oracle.pairs_of(names)
    assert set(pairs) == {(c, t) for c in CONCEPTS for t in (None, *tints_of(c))}
    index = {pair: k for k, pair in enumerate(pairs)}
    for scene in scenes(50):
        assert oracle.wanted(scene.facts(), index) == [(g.concept, g.tint) for g in scene.groups]
    assert oracle.wanted([{"kind": "object", "concept": "spaceship"}], index) == []
    facts = [{"kind": "relation", "first": "dog", "relation": "left", "second": "fox"},
             {"kind": "colour", "concept": "fox", "tint": "green"}]  # fmt: skip
    assert oracle.wanted(facts, index) == [("dog", None), ("fox", "green")]


def test_an_object_has_the_name_that_was_asked_for_only_if_it_is_like_it(judge: PocketOracle) -> None:
    """Clean renders: what is there is found under its name; asked for something else, nothing takes that name."""
    of = scenes(60)
    pictures = to_tensor([render(scene) for scene in of])
    right = judge.read(pictures, [scene.facts() for scene in of])
    named = [g.concept in {o.concept for o in reading.objects}
             for scene, reading in zip(of, right, strict=True) for g in scene.groups]  # fmt: skip
    assert sum(named) / len(named) > 0.97
    rng, wrong = random.Random(0), []
    for scene in of:
        there = {g.concept for g in scene.groups}
        wrong.append([{"kind": "object", "concept": rng.choice(sorted(set(CONCEPTS) - there))} for _ in range(2)])
    readings = judge.read(pictures, wrong)
    taken = [held for reading, facts in zip(readings, wrong, strict=True) for held in judge.check(reading, facts)]
    assert sum(taken) / len(taken) < 0.03


def test_what_nobody_asks_for_keeps_the_name_that_the_tower_gives(judge: PocketOracle) -> None:
    of = scenes(12)
    pictures = to_tensor([render(scene) for scene in of])
    plain, told = judge.read(pictures), judge.read(pictures, [[{"kind": "background", "background": "pink"}]] * 12)
    assert plain == told


def test_stored_templates_are_what_the_encoder_of_artwork_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DEV))
    import train_likeness
    from safetensors.torch import load_file

    torch.manual_seed(0)
    pair = train_likeness.Pair([("dog", None), ("fox", "green")]).eval()
    train_likeness.store(pair, tmp_path)
    model = Likeness(2)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v
                           for k, v in load_file(tmp_path / "likeness.safetensors").items()})  # fmt: skip
    with torch.no_grad():
        art = pair.templates(torch.tensor([1, 0]))
    found = model.eval().artwork(torch.tensor([1, 0]))
    assert found.shape == (2, likeness.FEATURES, SIDE, SIDE) and art.std() > 0
    assert (found - art).abs().max() < art.max() / 127
    pixels = train_likeness.artwork("dog", None)
    assert pixels[3].max() == 1 and pixels[3, 0].max() == 0 and (pixels[:3] <= pixels[3:] + 1e-6).all()


def test_lessons_are_the_share_of_people_who_would_name_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEV))
    from oracle_lessons import LABELS, lessons, load_lessons

    names = {"concepts": ["dog", "fox"], "tints": [None, "green"], "backgrounds": ["white"]}
    facts = [{"kind": kind, "group": g, "concept": c, **more} for g, c in ((0, "dog"), (1, "fox"))
             for kind, more in (("object", {}), ("count", {"count": 1}), ("colour", {"tint": None}))]  # fmt: skip
    # two people differ on the fox: no lesson
    (only,) = lessons([{"facts": facts, "person": [True, True, False, None, None, None]}], names)
    assert (only.picture, only.concept, only.named) == (0, 0, 1.0)
    said = {"facts": facts, "person": [True] * 3 + [False] * 3, "closer": {"dog": False}}
    assert [k.named for k in lessons([said], names)] == [0.5, 0.0]
    assert [k.named for k in lessons([said | {"heard": 2}], names)] == [pytest.approx(2 / 3), 0.0]
    tints = {t for c in CONCEPTS for t in tints_of(c)}
    x, every, typical = load_lessons({"concepts": sorted(CONCEPTS), "tints": [None, *sorted(tints)]})
    assert x.shape[1:] == (3, 64, 64) and len(typical) < len(x) == len(LABELS.read_text().splitlines())
    assert 0.5 < sum(k.named for k in every) / len(every) < 0.95


def test_no_lesson_is_among_the_labels_that_measure_the_judge() -> None:
    def captions(name: str) -> set[str]:
        return {json.loads(line)["prompt"] for line in (DEV / name).read_text().splitlines()}

    assert not captions("oracle_lessons.jsonl") & captions("oracle_labels.jsonl")
