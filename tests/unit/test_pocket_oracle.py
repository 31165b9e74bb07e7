"""The held-out judge: its checks of facts by hand, and short versions of what its card claims."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from rewardtune.rewards.pocket_oracle import FACTS_SHARE, TIE_BAND, PocketOracle
from safetensors import safe_open

from rewardtune.data.references import pocket_path
from rewardtune.errors import DataError
from rewardtune.pocket import oracle as network
from rewardtune.pocket.faults import FAULTS, misread
from rewardtune.pocket.oracle import Detection, Reading, check
from rewardtune.pocket.scenes import Scene, render, sample_scene
from rewardtune.types import Prompt, Score

ROOT = Path(__file__).parents[2]
DEV = ROOT / "dev" / "pocket"


@pytest.fixture(scope="module")
def judge() -> PocketOracle:
    return PocketOracle.load(PocketOracle.Config())


def script(name: str) -> ModuleType:
    """A script of dev/pocket as a module."""
    spec = importlib.util.spec_from_file_location(f"dev_pocket_{name}", DEV / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensor(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


def some_scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(f"test-oracle:{seed}")
    return [sample_scene(rng, "heldout") for _ in range(count)]


def prompt(scene: Scene) -> Prompt:
    return Prompt(scene.caption, {"facts": scene.facts()})


def verdict(judge: PocketOracle, pictures: list[Image.Image], scenes: list[Scene]) -> Score:
    return judge.score(tensor(pictures), [prompt(scene) for scene in scenes])


# --- facts of readings written by hand


def seen(concept: str | None, x: float, y: float, side: float = 26.0, tint: str | None = None) -> Detection:
    return Detection(concept, tint, x, y, side, 0.9, 0.9)


READING = Reading(
    objects=(
        seen("dog", 17, 30, tint="red"), seen("dog", 17, 50, tint="blue"), seen("star", 47, 40, side=18),
        seen("whale", 22, 43, side=48), seen(None, 10, 10),
    ),
    background="pink", background_confidence=1.0, cleanliness=0.5,
)  # fmt: skip

FACTS = [
    ({"kind": "object", "concept": "dog"}, True),
    ({"kind": "object", "concept": "cat"}, False),
    ({"kind": "count", "concept": "dog", "count": 2}, True),
    ({"kind": "count", "concept": "dog", "count": 1}, False),
    ({"kind": "count", "concept": "dog", "count": 3}, False),
    ({"kind": "count", "concept": "cat", "count": 1}, False),
    ({"kind": "colour", "concept": "dog", "tint": "red"}, False),  # one of the two is blue
    ({"kind": "colour", "concept": "star", "tint": None}, True),
    ({"kind": "colour", "concept": "star", "tint": "red"}, False),
    ({"kind": "colour", "concept": "cat", "tint": None}, False),
    ({"kind": "size", "concept": "star", "size": "small"}, True),
    ({"kind": "size", "concept": "star", "size": "large"}, False),
    ({"kind": "size", "concept": "whale", "size": "large"}, True),
    ({"kind": "size", "concept": "dog", "size": "small"}, False),
    ({"kind": "size", "concept": "cat", "size": "small"}, False),
    # dogs' mean centre (17, 40), star (47, 40), whale (22, 43)
    ({"kind": "relation", "first": "dog", "relation": "left", "second": "star"}, True),
    ({"kind": "relation", "first": "star", "relation": "right", "second": "dog"}, True),
    ({"kind": "relation", "first": "dog", "relation": "above", "second": "star"}, False),
    ({"kind": "relation", "first": "dog", "relation": "left", "second": "whale"}, False),  # 5 px: within the margin
    ({"kind": "relation", "first": "dog", "relation": "left", "second": "cat"}, False),
    ({"kind": "background", "background": "pink"}, True),
    ({"kind": "background", "background": "gray"}, False),
]


@pytest.mark.parametrize(("fact", "expected"), FACTS)
def test_a_fact_is_checked_against_a_reading(fact: dict[str, object], expected: bool) -> None:
    assert check(READING, [fact]) == [expected]


@pytest.mark.parametrize(
    ("fact", "named"),
    [({"kind": "mood", "concept": "dog"}, "'mood'"), ({"kind": "count", "concept": "dog"}, "'count'"),
     ({"kind": "size", "concept": "star", "size": "huge"}, "'huge'"), ({"concept": "dog"}, "'kind'")],
)  # fmt: skip
def test_facts_of_another_form_are_refused(fact: dict[str, object], named: str) -> None:
    with pytest.raises(DataError, match=named):
        check(READING, [fact])


def test_maps_become_objects_where_and_as_they_say() -> None:
    names = {"concepts": ["cat", "dog"], "tints": [None, "red"], "backgrounds": ["white", "black"]}
    model = network.Oracle(names, widths=(8, 8, 8, 8, 8))
    maps = {"heat": torch.full((16, 16), -9.0), "offset": torch.zeros(2, 16, 16), "side": torch.zeros(16, 16),
            "concept": torch.zeros(2, 16, 16), "tint": torch.zeros(2, 16, 16)}  # fmt: skip
    for row, column, height in ((5, 7, 4.0), (6, 8, 3.0), (12, 2, 2.0)):  # the second is an echo of the first
        maps["heat"][row, column] = height
    maps["offset"][:, 5, 7] = torch.tensor([0.25, -0.5])
    maps["side"][5, 7] = 0.5
    maps["concept"][1, 5, 7], maps["tint"][1, 5, 7] = 3.0, 2.0
    maps["concept"][0, 12, 2] = 0.0  # both concepts at 0.5: the smallest confidence that names
    heat = maps["heat"].sigmoid()
    first, second = network._objects(model, maps, heat, heat > network.PEAK)
    assert (first.concept, first.tint) == ("dog", "red")
    assert (first.x, first.y) == ((7 + 0.5 + 0.25) * 4, (5 + 0.5 - 0.5) * 4)
    assert first.side == pytest.approx(16 * 1.648721)
    assert first.confidence == pytest.approx(1 / (1 + np.exp(-3.0)))
    assert (second.x, second.y, second.side) == (10.0, 50.0, 16.0)


def test_a_tint_that_is_the_artworks_own_colour_is_none() -> None:
    names = {"concepts": ["ladybug", "dog"], "tints": [None, "red"], "backgrounds": ["white", "black"]}
    model = network.Oracle(names, widths=(8, 8, 8, 8, 8))
    maps = {"offset": torch.zeros(2, 16, 16), "side": torch.zeros(16, 16), "concept": torch.zeros(2, 16, 16),
            "tint": torch.zeros(2, 16, 16)}  # fmt: skip
    maps["tint"][1] = 5.0
    maps["concept"][0, 3, 3], maps["concept"][1, 12, 12] = 5.0, 5.0
    heat = torch.zeros(16, 16)
    heat[3, 3], heat[12, 12] = 0.9, 0.8
    ladybug, dog = network._objects(model, maps, heat, heat > network.PEAK)
    assert (ladybug.concept, ladybug.tint) == ("ladybug", None)
    assert (dog.concept, dog.tint) == ("dog", "red")


def test_an_object_below_the_confidence_has_no_name() -> None:
    names = {"concepts": ["cat", "dog", "cow"], "tints": [None, "red"], "backgrounds": ["white", "black"]}
    model = network.Oracle(names, widths=(8, 8, 8, 8, 8))
    maps = {"offset": torch.zeros(2, 16, 16), "side": torch.zeros(16, 16), "concept": torch.zeros(3, 16, 16),
            "tint": torch.zeros(2, 16, 16)}  # fmt: skip
    heat = torch.zeros(16, 16)
    heat[4, 4] = 0.8
    (only,) = network._objects(model, maps, heat, heat > network.PEAK)
    assert only.concept is None
    assert only.confidence == pytest.approx(1 / 3)


def test_folding_the_normalisation_changes_nothing() -> None:
    torch.manual_seed(0)
    names = {"concepts": ["cat", "dog"], "tints": [None, "red"], "backgrounds": ["white", "black"]}
    widths = (8, 8, 12, 12, 16)
    whole = network.Oracle(names, widths=widths).eval()
    objects = network.Objects(names, widths=widths, fused=False)
    clean = network.Cleanliness(widths=widths, fused=False)
    x = torch.rand(16, 3, 64, 64)
    clean(x, objects(x)[1])  # moves the running statistics away from 0 and 1
    objects.eval(), clean.eval()
    network.fold(objects, whole.objects)
    network.fold(clean, whole.clean)
    with torch.no_grad():
        maps, features = objects(x[:3])
        before, after = maps | clean(x[:3], features), whole(x[:3])
    assert before["heat"].std() > 0 and before["error"].std() > 0
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-5)


# --- the shipped judge


def test_reading_the_card_imports_no_torch() -> None:
    code = (
        "import sys; from rewardtune.rewards.pocket_oracle import PocketOracle as P; P.Config(); "
        "assert P.card.held_out and not P.card.differentiable and P.card.needs_prompt; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_clean_renders_are_read_right(judge: PocketOracle) -> None:
    scenes = some_scenes(120, 0)
    said = verdict(judge, [render(s) for s in scenes], scenes)
    counts = torch.tensor([len(s.facts()) for s in scenes])
    assert float((said.parts["facts"] * counts).sum() / counts.sum()) >= 0.97


def test_clean_renders_count_as_clean(judge: PocketOracle) -> None:
    scenes = some_scenes(400, 0)
    assert verdict(judge, [render(s) for s in scenes], scenes).parts["cleanliness"].mean() > 0.9


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_each_drawing_fault_lowers_the_verdict(judge: PocketOracle, name: str) -> None:
    scenes = some_scenes(32, 1)
    before = verdict(judge, [render(s) for s in scenes], scenes)
    value = before.value.mean()
    for severity in (0.5, 1.0):
        after = verdict(judge, [FAULTS[name][0](render(s), severity, random.Random(name)) for s in scenes], scenes)
        assert after.value.mean() < value - TIE_BAND
        # A cut beside the objects, or a bend where they are plain, changes nothing that could be seen.
        lowered = 0.7 if name in ("shear_halves", "wobble") else 0.9
        assert (after.value < before.value).float().mean() > lowered
        assert after.parts["cleanliness"].mean() < before.parts["cleanliness"].mean()
        value = after.value.mean()


def test_misreadings_lower_the_facts_and_not_the_cleanliness(judge: PocketOracle) -> None:
    scenes, rng = some_scenes(60, 2), random.Random(2)
    before = verdict(judge, [render(s) for s in scenes], scenes)
    after = verdict(judge, [render(misread(s, rng)) for s in scenes], scenes)
    assert after.parts["facts"].mean() < before.parts["facts"].mean() - 0.1
    assert after.parts["all_facts"].mean() < 0.1
    clean = float(before.parts["cleanliness"].mean())
    assert float(after.parts["cleanliness"].mean()) == pytest.approx(clean, abs=0.05)


def test_the_verdict_is_the_stated_mixture(judge: PocketOracle) -> None:
    scenes = some_scenes(8, 3)
    said = verdict(judge, [render(s) for s in scenes[::-1]], scenes)  # wrong pictures: facts between 0 and 1
    assert FACTS_SHARE == 0.75
    torch.testing.assert_close(said.value, 0.75 * said.parts["facts"] + 0.25 * said.parts["cleanliness"])
    assert said.distribution is None
    assert float(said.value.min()) >= 0.0 and float(said.value.max()) <= 1.0
    for i, scene in enumerate(scenes):
        reading = judge.read(tensor([render(scenes[::-1][i])]))[0]
        held = judge.check(reading, scene.facts())
        assert float(said.parts["facts"][i]) == pytest.approx(sum(held) / len(held))
        assert float(said.parts["all_facts"][i]) == float(all(held))
        sizes = [h for h, f in zip(held, scene.facts(), strict=True) if f["kind"] == "size"]
        stated = float(said.parts["facts/size"][i])
        assert np.isnan(stated) if not sizes else stated == sum(sizes) / len(sizes)


def test_one_fact_outweighs_the_tie_band() -> None:
    longest = max(len(s.facts()) for s in some_scenes(300, 4))
    assert longest == 13
    assert FACTS_SHARE / longest > TIE_BAND


def test_each_value_depends_on_its_own_picture_only(judge: PocketOracle) -> None:
    scenes = some_scenes(6, 5)
    pictures = [render(s) for s in scenes]
    together = verdict(judge, pictures, scenes).value
    alone = torch.cat([verdict(judge, [p], [s]).value for p, s in zip(pictures, scenes, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_other_sizes_are_resized_and_images_keep_no_graph(judge: PocketOracle) -> None:
    scenes = some_scenes(12, 6)
    pictures = [render(s) for s in scenes]
    x = tensor([p.resize((192, 192), Image.Resampling.NEAREST) for p in pictures]).requires_grad_()
    said = judge.score(x, [prompt(s) for s in scenes])
    assert not said.value.requires_grad
    torch.testing.assert_close(said.parts["facts"], verdict(judge, pictures, scenes).parts["facts"])


@pytest.mark.parametrize(
    "bad", ["a dog", Prompt("a dog"), Prompt("a dog", {"facts": []}), Prompt("a dog", {"facts": "dog"})]
)
def test_a_prompt_without_facts_is_refused(judge: PocketOracle, bad: str) -> None:
    with pytest.raises(DataError, match="pocket world"):
        judge.score(torch.rand(1, 3, 64, 64), [bad])


def test_as_many_prompts_as_images(judge: PocketOracle) -> None:
    with pytest.raises(DataError, match="2 images came with 1 prompts"):
        judge.score(torch.rand(2, 3, 64, 64), [prompt(some_scenes(1, 7)[0])])


def test_the_weights_are_small_and_the_card_states_what_was_measured() -> None:
    folder = pocket_path("pocket:oracle")
    assert sum(p.stat().st_size for p in folder.iterdir()) < 6_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.float16}  # noqa: SIM118
    with safe_open(folder / "likeness.safetensors", framework="pt") as file:
        assert file.get_tensor("templates").dtype == torch.int8
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["clean"]["pictures"] >= 1000
    assert metrics["clean"]["facts_right"] >= 0.97
    assert f"{100 * metrics['clean']['facts_right']:.1f} %" in (folder / "README.md").read_text()


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        network.load(tmp_path)
    source = pocket_path("pocket:oracle")
    config = json.loads((source / "config.json").read_text())
    config["names"]["concepts"] = config["names"]["concepts"][1:]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "likeness.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with pytest.raises(DataError, match=r"do not fit config\.json"):
        network.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        network.load(tmp_path)


# --- the scripts


def test_the_training_target_of_cleanliness() -> None:
    train = script("train_oracle")
    clean = torch.full((1, 3, 64, 64), 0.5)
    objects = torch.zeros(1, 4, 7)
    objects[0, 0, :3] = torch.tensor([32.0, 32.0, 16.0])
    assert float(train.distance(clean, clean, objects)[0]) == 0.0
    lighter = clean + 0.1  # colours differ by 0.1 at every scale, neighbour differences not at all
    assert float(train.distance(lighter, clean, objects)[0]) == pytest.approx(0.1, abs=1e-6)
    inside = clean.clone()
    inside[..., 24:40, 24:40] += 0.1  # the object only: half the weight, and steps of 0.1 along its outline
    steps = (2 * 16 * 0.1) / 2
    on = 0.1 + steps / 256  # left and upper steps fall on pixels outside, right and lower ones inside
    off = steps / (64 * 64 - 256)
    assert float(train.distance(inside, clean, objects)[0]) == pytest.approx((on + off) / 2, abs=1e-6)


def test_training_pictures_depend_on_seed_and_step_only() -> None:
    train = script("train_oracle")
    first = train.batch(3, size=6, seed=1, faults=train.PLAIN, latents=train.soften)
    train.batch(4, size=6, seed=1, faults=train.PLAIN, latents=train.soften)
    again = train.batch(3, size=6, seed=1, faults=train.PLAIN, latents=train.soften)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    other = train.batch(3, size=6, seed=2, faults=train.PLAIN, latents=train.soften)
    assert not torch.equal(first[0], other[0])


def test_the_judge_is_trained_without_the_code_of_scorer_and_panel() -> None:
    for path in (DEV / "train_oracle.py", ROOT / "rewardtune/pocket/oracle.py", ROOT / "rewards/pocket_oracle.py"):
        text = path.read_text()
        for foreign in ("pocket.faults", "pocket.panel", "rewardtune.scorer", "rewards.zreward"):
            assert foreign not in text, (path, foreign)


def test_answers_become_labels_and_labels_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEV))
    sheet, compare = script("label_sheet"), script("oracle_agreement")
    prompts = [{"prompt": s.caption, "facts": s.facts()} for s in some_scenes(2, 8)]
    files = [tmp_path / f"answers{k}.txt" for k in range(3)]
    for file, text in zip(files, ("# comment\n0: 1 3\n1:\n", "0: 1\n1: 2\n", "1:\n0: 3 2\n"), strict=True):
        file.write_text(text)
    rows = sheet.labels(files, prompts)
    assert [i for i, p in enumerate(rows[0]["person"], 1) if not p] == [1, 3]
    assert rows[0]["votes"][:4] == [1, 2, 1, 3] and rows[1]["votes"][1] == 2
    assert all(rows[1]["person"]) and len(rows[1]["person"]) == len(prompts[1]["facts"])
    with pytest.raises(AssertionError, match="one line"):
        sheet.answers(files[0], prompts[:1])
    with pytest.raises(AssertionError, match="undecided"):
        sheet.labels(files[:2], prompts)
    said = [[True] * len(rows[0]["person"]), rows[1]["person"]]
    report = compare.agreement(rows, said)
    facts = len(said[0]) + len(said[1])
    assert report["overall"]["agreement"] == round(1 - 2 / facts, 4)
    assert report["person says wrong"]["agreement"] == 0.0
    assert report["person says right"]["agreement"] == 1.0
    assert report["whole pictures"]["agreement"] == 0.5
    assert compare.each_other([3, 2, 0, 1]) == {"labellers": 3, "agreement": round((3 + 1 + 3 + 1) / (4 * 3), 4)}
    # Wilson: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = 0.9, n = 10, z = 1.95996
    assert compare.share([True] * 9 + [False])["ci95"] == [0.5958, 0.9821]


def test_the_judge_agrees_with_people_on_samples(judge: PocketOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEV))
    compare = script("oracle_agreement")
    rows, _, said = compare.judged(compare.LABELS, compare.IMAGES, judge)
    report = compare.agreement(rows, said)
    assert len(rows) == 250 and report["overall"]["facts"] > 2000
    assert report["overall"]["agreement"] >= 0.9
    # to say yes to everything would agree often, too: wrong facts are found, and not too many
    assert report["person says wrong"]["agreement"] > 0.7
    assert abs(report["all facts right"]["oracle"] - report["all facts right"]["person"]) < 0.1
