"""The pocket world: splits that share nothing, captions that match their facts, faults that show."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from rewardtune.data.images import open_image
from rewardtune.data.records import read_captioned_images, read_prompts
from rewardtune.pocket import panel
from rewardtune.pocket.faults import FAULTS, misread
from rewardtune.pocket.scenes import (
    BACKGROUNDS,
    CONCEPTS,
    NATURAL,
    Box,
    Group,
    Scene,
    place,
    render,
    sample_scene,
    simple_scene,
    vocabulary,
)

SPLITS = ("train", "validation", "heldout")


def _script(name: str) -> object:
    """A script of dev/pocket, which is no package."""
    path = Path(__file__).parents[2] / "dev" / "pocket" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"pocket_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_prompt_lists_share_no_composition() -> None:
    prompts = {split: read_prompts(f"pocket:prompts/{split}") for split in SPLITS}
    assert {split: len(p) for split, p in prompts.items()} == {"train": 2000, "validation": 128, "heldout": 256}
    for split, found in prompts.items():
        assert len(set(found)) == len(found), split
    compositions = {s: {p.metadata["composition"] for p in found} for s, found in prompts.items()}
    assert not compositions["train"] & compositions["validation"]
    assert not compositions["train"] & compositions["heldout"]
    assert not compositions["validation"] & compositions["heldout"]


def test_shipped_prompts_are_what_the_script_writes(tmp_path: Path) -> None:
    _script("make_scenes").write_prompts(tmp_path, seed=0)  # type: ignore[attr-defined]
    for split in SPLITS:
        shipped = Path(__file__).parents[2] / "rewardtune" / "pocket" / "data" / "prompts" / f"{split}.jsonl"
        assert (tmp_path / f"{split}.jsonl").read_bytes() == shipped.read_bytes()


def test_training_pictures_are_of_the_train_split(tmp_path: Path) -> None:
    script = _script("make_scenes")
    script.write_scenes(tmp_path / "a", count=12, simple=4, seed=3)  # type: ignore[attr-defined]
    script.write_scenes(tmp_path / "b", count=12, simple=4, seed=3)  # type: ignore[attr-defined]
    found = read_captioned_images(tmp_path / "a" / "manifest.jsonl")
    again = read_captioned_images(tmp_path / "b" / "manifest.jsonl")
    assert [f.caption for f in found] == [a.caption for a in again]
    assert all(f.image.read_bytes() == a.image.read_bytes() for f, a in zip(found, again, strict=True))
    rows = [json.loads(line) for line in (tmp_path / "a" / "manifest.jsonl").read_text().splitlines()]
    scene_of = _script("annotate").scene_of  # type: ignore[attr-defined]
    assert {scene_of(row["facts"]).split for row in rows} == {"train"}
    assert open_image(found[0].image).size == (64, 64)


def test_collected_pictures_are_of_mixed_quality() -> None:
    collected = _script("make_scenes").collected  # type: ignore[attr-defined]
    rng = random.Random(5)
    clean = 0
    for _ in range(400):
        scene = sample_scene(rng, "train")
        clean += np.array_equal(np.asarray(collected(scene, rng)), np.asarray(render(scene)))
    # as captioned and without a fault: 0.7 * 0.55 = 0.385 of 400, standard deviation 9.7
    assert 154 - 30 < clean < 154 + 30


def test_simple_scenes_are_for_training_only() -> None:
    rng = random.Random(2)
    for _ in range(200):
        scene = simple_scene(rng)
        assert scene.simple and scene.split == "train" and scene.boxes
    for split in ("validation", "heldout"):
        assert not any(sample_scene(rng, split).simple for _ in range(100))  # type: ignore[arg-type]
    assert not Scene((Group("dog", "red"),), "white").simple and not Scene((Group("dog", count=2),), "white").simple


def test_a_scene_comes_back_from_its_facts() -> None:
    scene_of = _script("annotate").scene_of  # type: ignore[attr-defined]
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        again = scene_of(scene.facts())
        assert again.facts() == scene.facts() and again.composition == scene.composition


def test_captions_and_facts_of_known_scenes() -> None:
    one = Scene((Group("owl", "red", size="large"),), "gray")
    assert one.caption == "a large red owl on a gray background"
    assert [f["kind"] for f in one.facts()] == ["object", "count", "colour", "size", "background"]
    three = Scene((Group("owl"), Group("fox", "blue", 1), Group("leaf")), "pink", "left", "above", wording=1)
    assert three.caption == "on a pink background, an owl to the left of a blue fox with a leaf above them"
    relations = [(f["first"], f["relation"], f["second"]) for f in three.facts() if f["kind"] == "relation"]
    assert relations == [("owl", "left", "fox"), ("leaf", "above", "owl"), ("leaf", "above", "fox")]
    assert Scene((Group("cherry", count=3),), "white").caption == "three cherries on a white background"


def test_a_composition_ignores_order_place_and_background() -> None:
    a, b = Group("dog", "red"), Group("fox")
    first, second = Scene((a, b), "white", "left"), Scene((b, a), "pink", "above")
    assert first.composition == second.composition and first.split == second.split
    assert Scene((Group("dog"), Group("fox", "red")), "white", "left").composition != first.composition


def test_every_word_of_a_caption_is_in_the_vocabulary() -> None:
    rng, known = random.Random(1), set(vocabulary())
    for _ in range(500):
        assert set(re.findall(r"\w+|,", sample_scene(rng).caption)) <= known


def test_the_world_is_as_large_as_promised() -> None:
    assert len(CONCEPTS) == 64
    assert all(set(names) <= set(CONCEPTS) for names in NATURAL.values())
    rng = random.Random(2)
    scenes = [sample_scene(rng) for _ in range(2000)]
    assert {len(s.groups) for s in scenes} == {1, 2, 3}
    assert {sum(g.count for g in s.groups) for s in scenes} == {1, 2, 3}
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    share = sum(s.split == "heldout" for s in scenes) / len(scenes)
    assert 0.03 < share < 0.07


def test_relations_hold_by_a_clear_margin_and_boxes_do_not_overlap() -> None:
    rng = random.Random(3)
    for _ in range(500):
        scene = sample_scene(rng)
        centres = {g.concept: np.mean([(b.x, b.y) for b in scene.boxes if b.group == i], axis=0)
                   for i, g in enumerate(scene.groups)}  # fmt: skip
        for fact in scene.facts():
            if fact["kind"] == "relation":
                dx, dy = centres[fact["first"]] - centres[fact["second"]]
                assert {"left": -dx, "right": dx, "above": -dy, "below": dy}[fact["relation"]] > 20
        for i, a in enumerate(scene.boxes):
            assert a.side / 2 - 4 < a.x < 68 - a.side / 2 and a.side / 2 - 4 < a.y < 68 - a.side / 2
            for b in scene.boxes[i + 1 :]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > 0.75 * (a.side + b.side) / 2


def test_rendering_draws_each_object_where_its_box_is() -> None:
    scene = Scene((Group("heart"),), "white", boxes=(Box(20, 40, 20, 0),))
    changed = (np.asarray(render(scene)).astype(int) - np.array(BACKGROUNDS["white"])).any(axis=2)
    y, x = np.nonzero(changed)
    assert abs((x.min() + x.max()) / 2 - 20) <= 1 and abs((y.min() + y.max()) / 2 - 40) <= 1
    assert 19 <= max(np.ptp(x), np.ptp(y)) + 1 <= 22


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_each_fault_changes_the_picture_more_when_it_is_worse(name: str) -> None:
    rng = random.Random(4)
    mild, severe = [], []
    for _ in range(12):
        picture = render(sample_scene(rng))
        pixels = np.asarray(picture).astype(float)
        for severity, found in ((0.1, mild), (0.9, severe)):
            faulty = np.asarray(FAULTS[name][0](picture, severity, rng)).astype(float)
            assert faulty.shape == (64, 64, 3)
            found.append(np.abs(faulty - pixels).mean())
    assert 0 < np.mean(mild) < np.mean(severe)


def test_misreading_always_breaks_a_claim() -> None:
    rng = random.Random(5)
    for _ in range(400):
        scene = place(sample_scene(rng), rng)
        assert panel.judge_recipe(scene, scene, ()).values["alignment"] == 5.0
        drawn = misread(scene, rng)
        opinion = panel.judge_recipe(scene, drawn, ())
        assert opinion.values["alignment"] < 4.7 and opinion.wrong, (scene.caption, drawn)
