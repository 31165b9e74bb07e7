"""The simulated panel: prices of mistakes by hand, what the eye sees on renders, and the files that come out."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from rewardtune.data.records import read_records, validate_file
from rewardtune.pocket import eye, panel
from rewardtune.pocket.faults import FAULTS, misread
from rewardtune.pocket.scenes import BACKGROUNDS, Box, Group, Scene, render, sample_scene

ROOT = Path(__file__).parents[2]
FOX, KEYS = Group("fox", "red"), Group("key", None, 2)
ASKED = Scene(
    (FOX, KEYS), "pink", "left", boxes=(Box(17, 32, 22, 0), Box(47, 18, 22, 1), Box(47, 46, 22, 1)),
)  # fmt: skip


def _alignment(drawn: Scene) -> tuple[float, tuple[str, ...]]:
    opinion = panel.judge_recipe(ASKED, drawn, ())
    assert [opinion.values[d] for d in panel.DIMENSIONS[1:]] == [5.0, 5.0, 5.0]
    return round(opinion.values["alignment"], 6), opinion.wrong


def test_prices_of_broken_claims() -> None:
    assert _alignment(ASKED) == (5.0, ())
    boxes = ASKED.boxes
    assert _alignment(replace(ASKED, background="gray")) == (4.4, ("the background is gray, not pink",))
    mirrored = tuple(replace(b, x=64 - b.x) for b in boxes)
    assert _alignment(replace(ASKED, boxes=mirrored)) == (4.2, ("the fox is not left of the keys",))
    blue = replace(ASKED, groups=(replace(FOX, tint="blue"), KEYS))
    assert _alignment(blue) == (4.0, ("the fox is blue, not red",))
    natural = replace(ASKED, groups=(replace(FOX, tint=None), KEYS))
    assert _alignment(natural) == (4.0, ("the fox is not red",))
    assert _alignment(replace(ASKED, boxes=boxes[:2])) == (4.0, ("there is 1 key, not 2",))
    tinted = replace(ASKED, groups=(FOX, replace(KEYS, tint="blue")))
    assert _alignment(tinted) == (4.0, ("the keys are blue, not in their own colours",))


def test_a_missing_object_costs_once() -> None:
    # colour, count and relation of the missing keys are not charged on top
    assert _alignment(replace(ASKED, boxes=ASKED.boxes[:1])) == (3.0, ("the keys are missing",))
    assert _alignment(replace(ASKED, boxes=ASKED.boxes[1:])) == (3.0, ("the fox is missing",))
    assert _alignment(replace(ASKED, boxes=()))[0] == 1.0
    other = replace(ASKED, groups=(Group("dog", "blue"), KEYS), background="gray")
    assert _alignment(other) == (2.4, ("the fox is missing", "the background is gray, not pink"))


def test_size_is_claimed_of_single_objects() -> None:
    asked = Scene((Group("fox", None, size="small"),), "white", boxes=(Box(32, 32, 18, 0),))
    large = replace(asked, boxes=(Box(32, 32, 48, 0),))
    opinion = panel.judge_recipe(asked, large, ())
    assert opinion.values["alignment"] == pytest.approx(4.4) and opinion.wrong == ("the fox is not small",)
    assert panel.judge_recipe(asked, asked, ()).values["alignment"] == 5.0
    assert panel.judge_recipe(asked, replace(asked, boxes=()), ()).values["alignment"] == pytest.approx(1.8)


def test_damage_of_faults_by_hand() -> None:
    blur = panel.judge_recipe(ASKED, ASKED, [panel.Fault("blur", 1.0)]).values
    # weights of blur are 1.0, 0.6, 0.1; damage at full severity is 1
    assert [round(blur[d], 4) for d in panel.DIMENSIONS[1:]] == [1.2, 2.72, 4.62]
    half = panel.Fault("grain", 0.5)
    assert half.damage == pytest.approx(0.56)
    both = panel.judge_recipe(ASKED, ASKED, [half, panel.Fault("pale", 0.5)]).values
    assert both["realism"] == pytest.approx(1 + 4 * (1 - 0.95 * 0.9 * 0.56) * (1 - 0.95 * 0.2 * 0.56))
    assert panel.judge_recipe(ASKED, ASKED, [panel.Fault("pale", 1.0)]).values["alignment"] < 4.0


def test_a_smear_beside_the_objects_hardly_counts() -> None:
    scene = Scene((Group("fox", size="small"),), "white", boxes=(Box(10, 10, 14, 0),))
    rng = random.Random(0)
    seen = [panel.apply_fault(render(scene), "smear", 0.8, rng)[1].seen for _ in range(40)]
    assert min(seen) == 0.0 and max(seen) > 0.5


def test_a_cut_counts_where_it_breaks_an_object() -> None:
    scene = Scene((Group("basketball"),), "white", boxes=(Box(32, 32, 40, 0),))
    rng = random.Random(0)
    through = [panel.apply_fault(render(scene), "shear_halves", 0.8, rng)[1].seen for _ in range(20)]
    assert min(through) == 1.0, "every cut between 18 and 46 goes through the ball"
    apart = Scene((Group("basketball"),), "white", boxes=(Box(8, 8, 14, 0),))
    beside = [panel.apply_fault(render(apart), "shear_halves", 0.8, rng)[1].seen for _ in range(20)]
    assert max(beside) == 0.0, "no cut reaches it"


def test_ratings_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    opinion = panel.Opinion({"alignment": 2.0, "realism": 4.0, "aesthetics": 5.0, "plausibility": 5.0})
    member = panel.Annotator("x", (0.1, 0.0, -0.4, 0.0), 0.0, 1.2, 0.25, (2.0, 1.0, 1.0, 0.0), 0.0)
    monkeypatch.setattr(panel, "PANEL", (member,))
    # overall (2 * 2 + 4 + 5) / 4 = 3.25; mixed 2.3125, 3.8125, 4.5625, 4.5625; stretched 2.075, 3.875, 4.775, 4.775;
    # shifted 2.175, 3.875, 4.375, 4.775; on half points 2, 4, 4.5, 5
    (scores,) = panel.rate(opinion, random.Random(0))
    assert [scores[d] for d in panel.DIMENSIONS] == [2.0, 4.0, 4.5, 5.0]


def test_members_differ_and_keep_to_the_scale() -> None:
    assert len(panel.PANEL) >= 5
    rng = random.Random(1)
    opinion = panel.Opinion({"alignment": 3.2, "realism": 3.8, "aesthetics": 2.4, "plausibility": 4.4})
    rated = np.array([[[s[d] for d in panel.DIMENSIONS] for s in panel.rate(opinion, rng)] for _ in range(400)])
    assert rated.min() >= 1.0 and rated.max() <= 5.0 and np.array_equal(rated * 2, (rated * 2).round())
    means = rated.mean(0)
    assert (np.ptp(means, axis=0) > 0.3).all(), "biases show"
    assert (np.abs(means.mean(0) - [3.2, 3.8, 2.4, 4.4]) < 0.25).all(), "the panel as a whole is fair"
    assert (rated.std(0) > 0.15).all()


def test_aggregates_by_hand() -> None:
    values = [1.0, 3.0, 3.5, 4.0, 5.0, 5.0]
    annotations = [dict.fromkeys(panel.DIMENSIONS, v) for v in values]
    assert panel.aggregate(annotations, trimmed=False)["realism"] == pytest.approx(21.5 / 6, abs=1e-4)
    assert panel.aggregate(annotations, trimmed=True)["realism"] == pytest.approx(15.5 / 4)


def test_critiques_name_what_is_wrong() -> None:
    rng = random.Random(2)
    values = dict.fromkeys(panel.DIMENSIONS, 3.0)
    full = panel.Opinion(values, ("the fox is missing", "the key is blue, not red"), ("very blurry", "grainy"))
    assert panel.critique(full, rng) == "the fox is missing; the key is blue, not red; very blurry"
    assert panel.critique(panel.Opinion(values, (), ("grainy",)), rng).endswith("; grainy")
    assert panel.critique(panel.Opinion(values, ("the fox is missing",)), rng).startswith("the fox is missing; ")
    assert "missing" not in panel.critique(panel.Opinion(values), rng)


# ------------------------------------------------------------------------------------------------------------- the eye


def test_the_eye_shares_no_code_with_the_judge() -> None:
    for name in ("eye.py", "flaws.py", "panel.py"):
        tree = ast.parse((ROOT / "rewardtune" / "pocket" / name).read_text(encoding="utf-8"))
        modules = {getattr(n, "module", None) or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
        assert not any("oracle" in m or "rewards" in m for m in modules | names), name
        assert "nn" not in names, "no network"


def test_the_eye_reads_clean_renders() -> None:
    rng = random.Random(7)
    right = total = 0
    for _ in range(40):
        scene = sample_scene(rng)
        facts = scene.facts()
        evidence, _, background = panel.read_view(eye.look(render(scene), facts), facts)
        assert background == scene.background
        right += sum(p > 0.5 for p in evidence)
        total += len(evidence)
    assert right / total > 0.98


def test_the_eye_finds_places_and_sizes() -> None:
    view = eye.look(render(ASKED), ASKED.facts())
    found = {(s.concept, round(s.y / 8)): s for s in view.found}
    assert set(found) == {("fox", 4), ("key", 2), ("key", 6)}
    for box, key in zip(ASKED.boxes, [("fox", 4), ("key", 2), ("key", 6)], strict=True):
        s = found[key]
        assert abs(s.x - box.x) < 1 and abs(s.y - box.y) < 1 and abs(s.side - box.side) < 1.5 and s.score > 0.95
    assert found["fox", 4].tint == "red" and found["key", 2].tint is None


def test_clean_renders_are_rated_high_and_misread_ones_low() -> None:
    rng = random.Random(8)
    known, seen, unharmed = [], [], []
    for _ in range(30):
        scene = sample_scene(rng)
        clean = panel.judge_picture(render(scene), scene.facts())
        assert min(clean.values.values()) > 3.9, (scene.caption, clean)
        unharmed.append([*clean.values.values()])
        drawn = misread(scene, rng)
        known.append(panel.judge_recipe(scene, drawn, ()))
        seen.append(panel.judge_picture(render(drawn), scene.facts()))
    assert (np.mean(unharmed, axis=0) > 4.7).all()
    a, b = (np.array([o.values["alignment"] for o in opinions]) for opinions in (known, seen))
    assert np.abs(a - b).mean() < 0.15
    assert sum(set(k.wrong) == set(s.wrong) for k, s in zip(known, seen, strict=True)) >= 26


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_each_fault_costs_points_where_it_should(name: str) -> None:
    rng = random.Random(f"fault/{name}")
    main = panel.DIMENSIONS[1 + int(np.argmax(FAULTS[name][1]))]
    means = []
    for severity in (0.15, 0.9):
        scenes = [sample_scene(rng) for _ in range(8)]
        rated = [panel.judge_picture(FAULTS[name][0](render(s), severity, rng), s.facts()).values[main] for s in scenes]
        means.append(np.mean(rated))
    assert means[1] < means[0] - 0.3 and means[1] < 4.3


def test_seen_and_known_ratings_agree_on_faulty_renders() -> None:
    rng = random.Random(9)
    known, seen = [], []
    for _ in range(80):
        scene = sample_scene(rng)
        drawn = misread(scene, rng) if rng.random() < 0.5 else scene
        picture, fault = panel.apply_fault(render(drawn), rng.choice(sorted(FAULTS)), rng.random(), rng)
        known.append([*panel.judge_recipe(scene, drawn, [fault]).values.values()])
        seen.append([*panel.judge_picture(picture, scene.facts()).values.values()])
    agreement = [spearmanr(a, b)[0] for a, b in zip(np.array(known).T, np.array(seen).T, strict=True)]
    assert all(r > least for r, least in zip(agreement, (0.65, 0.5, 0.75, 0.35), strict=True)), agreement


def test_a_larger_flaw_never_raises_a_rating() -> None:
    weights = panel.calibration()["quality"]
    assert all(w >= 0 for d in panel.DIMENSIONS[1:] for w in weights[d]["weights"])
    clean = dict.fromkeys(panel._HINGES, 0.0) | {"contrast": 1.0, "vivid": 1.0, "sharp": 1.0, "fit": 1.0}
    assert not panel.hinges(clean).any()
    rng = np.random.default_rng(0)
    for name, (value, sides) in panel._HINGES.items():
        for direction, _ in sides:
            base = clean | {n: clean[n] + rng.normal(0, 0.1) for n in clean if n != name}
            steps = [panel.hinges(base | {name: value + direction * d}) for d in (0.0, 0.05, 0.2, 0.5, 1.0, 3.0)]
            assert all((b >= a).all() for a, b in itertools.pairwise(steps)) and (steps[-1] > steps[0]).any()


@pytest.mark.parametrize("kind", ["black", "noise", "flat"])
def test_pictures_of_nothing_get_the_lowest_alignment(kind: str) -> None:
    pixels = {
        "black": np.zeros((64, 64, 3)),
        "noise": np.random.default_rng(0).integers(0, 255, (64, 64, 3)),
        "flat": np.full((64, 64, 3), BACKGROUNDS["pink"]),
    }[kind]
    opinion = panel.judge_picture(Image.fromarray(pixels.astype(np.uint8)), ASKED.facts())
    assert opinion.values["alignment"] < 2.0 and "the fox is missing" in opinion.wrong


# ------------------------------------------------------------------------------------------------------------ the files


def _annotate(out: Path, *options: str) -> None:
    command = [sys.executable, str(ROOT / "dev/pocket/annotate.py"), str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def _sizes(train: int, validation: int, heldout: int) -> list[str]:
    return ["--train", str(train), "--validation", str(validation), "--heldout", str(heldout)]


def test_annotated_files_are_valid_records(tmp_path: Path) -> None:
    samples = tmp_path / "samples" / "stage-1"
    samples.mkdir(parents=True)
    rng = random.Random(10)
    scenes = [sample_scene(rng, split) for split in ("train", "train", "heldout")]
    rows = []
    for i, scene in enumerate(scenes):
        render(scene).save(samples / f"{i}.png")
        rows.append({"image": f"{i}.png", "prompt": scene.caption, "facts": scene.facts(), "stage": 750})
    (samples / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = ["--samples", str(tmp_path / "samples"), *_sizes(6, 2, 4)]
    _annotate(tmp_path / "a", *options)
    summaries = {s: validate_file(tmp_path / "a" / f"{s}.jsonl") for s in ("train", "validation", "heldout")}
    assert {s: (v.groups, v.images) for s, v in summaries.items()} == {
        "train": (6, 24), "validation": (2, 8), "heldout": (4, 16)
    }  # fmt: skip
    for summary in summaries.values():
        assert summary.dimensions == panel.DIMENSIONS and summary.annotators == (6, 6) and summary.critiques
    compositions = {s: {g.prompt.metadata["composition"] for g in read_records(tmp_path / "a" / f"{s}.jsonl")}
                    for s in summaries}  # fmt: skip
    assert not compositions["train"] & compositions["heldout"]
    for group in read_records(tmp_path / "a" / "heldout.jsonl"):
        for image in group.images:
            assert dict(image.scores) == panel.aggregate(image.annotations, trimmed=True)
    made = [json.loads(line) for line in (tmp_path / "a" / "pictures.jsonl").read_text().splitlines()]
    assert [row["image"].split("/")[1] for row in made if row["source"] == "sample 750"] == [
        "train", "train", "heldout"
    ]  # fmt: skip
    choices = read_records(tmp_path / "a" / "preferences.jsonl")
    assert all(g.preferences and not g.images[0].scores for g in choices)
    _annotate(tmp_path / "b", *options)
    for name in ("train.jsonl", "heldout.jsonl", "pictures.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_choices_follow_one_members_ratings() -> None:
    spec = importlib.util.spec_from_file_location("pocket_annotate", ROOT / "dev" / "pocket" / "annotate.py")
    assert spec is not None and spec.loader is not None
    annotate = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = annotate
    spec.loader.exec_module(annotate)
    from rewardtune.data.records import PreferenceGroup, RatedImage
    from rewardtune.types import Prompt

    def image(name: str, value: float) -> RatedImage:
        scores = dict.fromkeys(panel.DIMENSIONS, value)
        return RatedImage(Path(name), scores, (scores,) * len(panel.PANEL))

    group = PreferenceGroup("g", Prompt("x"), (image("low", 1.0), image("high", 5.0)))
    chosen = annotate.choose(group, random.Random(0))
    assert chosen.preferences == ((1, 0),) and [i.image.name for i in chosen.images] == ["low", "high"]
    assert not chosen.images[0].scores and not chosen.images[0].annotations
    assert annotate.choose(replace(group, images=(group.images[0],) * 2), random.Random(0)) is None
