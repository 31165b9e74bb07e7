"""The scorer on a tiny, randomly initialised Qwen3.5 of both kinds of attention: reading, pixels, gradients, files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from rewardtune.rewards.zreward import ZReward
from tiny_scorer import COMPARISON, LEVELS, NAMES, PROMPTS, RUBRIC, THINKING, pictures, tokenizer, write_scorer
from transformers import Qwen3_5ForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rewardtune.data.images import resize, to_tensor
from rewardtune.data.records import PreferenceGroup, RatedImage, write_records
from rewardtune.errors import DataError, RecipeError
from rewardtune.recipe.sections import RewardSftRecipe, ScorerSection, TeacherSection, TrainSection
from rewardtune.scorer import export
from rewardtune.scorer.evaluate import evaluate_groups
from rewardtune.scorer.model import Scorer, load_scorer, save_scorer
from rewardtune.scorer.patches import Geometry, patchify
from rewardtune.scorer.rubric import Rubric, load_rubric, reading
from rewardtune.scorer.targets import target_maker
from rewardtune.scorer.trainable import trainable_scorer
from rewardtune.tasks.reward_sft import RewardSft, build_reward_sft, rated_rows
from rewardtune.types import Prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scorer(tmp_path_factory.mktemp("scorer"), layers=["linear_attention", "full_attention"])


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return load_scorer(folder)


# ------------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (24, 8)])
def test_patchify_equals_the_pil_processor_where_no_resize_happens(size: tuple[int, int]):
    made = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    images = [Image.fromarray(a) for a in made]
    bounds = {"shortest_edge": 1, "longest_edge": 10_000}
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size=bounds,
        image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.2, 0.6],
    )  # fmt: skip
    wanted = processor(images, return_tensors="pt")
    geometry = Geometry(4, 2, 2, (0.5, 0.4, 0.3), (0.5, 0.2, 0.6), min_pixels=1, max_pixels=10_000)
    rows, grid = patchify(to_tensor(images), geometry)
    torch.testing.assert_close(rows, wanted["pixel_values"], atol=1e-6, rtol=0)
    assert grid.tolist() == wanted["image_grid_thw"].tolist()


def test_patchify_resizes_as_the_processor_and_close_to_it():
    # a smooth picture: Pillow rounds to bytes on the way, we do not
    ramp = np.linspace(0, 255, 40)
    made = np.stack([np.add.outer(ramp, ramp) / 2] * 3, -1).round().astype(np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 256, "longest_edge": 256},
    )  # fmt: skip
    wanted = processor([Image.fromarray(made)], return_tensors="pt")
    geometry = Geometry(4, 2, 2, min_pixels=256, max_pixels=256)
    rows, grid = patchify(to_tensor([Image.fromarray(made)]), geometry)
    assert grid.tolist() == wanted["image_grid_thw"].tolist() == [[1, 4, 4]]
    off = (rows - wanted["pixel_values"]).abs()
    assert off.max() < 2.5 / 255 * 2
    # rounded as Pillow leaves them, they are the same bytes but for a few
    rounded, _ = patchify(to_tensor([Image.fromarray(made)]), replace(geometry, rounding=True))
    same = (rounded - wanted["pixel_values"]).abs() < 1e-5
    assert same.float().mean() > 0.7 > 0.1 > (off < 1e-5).float().mean()


def test_patchify_takes_pictures_of_different_sizes():
    geometry = Geometry(4, 2, 2, min_pixels=1, max_pixels=10_000)
    a, b = pictures(1, size=(16, 16)), pictures(1, seed=1, size=(8, 24))
    rows, grid = patchify([a[0], b[0]], geometry)
    assert grid.tolist() == [[1, 4, 4], [1, 2, 6]]
    assert torch.equal(rows, torch.cat([patchify(a, geometry)[0], patchify(b, geometry)[0]]))


def test_patchify_keeps_the_gradient_through_a_resize():
    images = pictures(2, size=(40, 24)).requires_grad_()
    rows, _ = patchify(images, Geometry(4, 2, 2, min_pixels=256, max_pixels=256))
    rows.pow(2).sum().backward()
    assert images.grad is not None and (images.grad != 0).float().mean() > 0.99


def test_too_narrow_pictures_are_refused():
    with pytest.raises(DataError, match="too narrow"):
        patchify(torch.zeros(1, 3, 2, 4000), Geometry(4, 2, 2))


# ------------------------------------------------------------------------------------------------------------- rubric


def rubric(**changes: Any) -> Rubric:
    return Rubric.model_validate({**RUBRIC, **changes})


def test_reading_finds_the_tokens_before_the_levels():
    words = tokenizer()
    read = reading(rubric(), words)
    assert words.convert_ids_to_tokens(list(read.level_ids)) == LEVELS
    tail = words.decode(list(read.frame.after))
    assert tail.endswith("<|im_start|>assistant alignment: realism: aesthetics: plausibility:")
    # what stands before each read ends with the dimension's name
    ends = [words.decode(list(read.frame.after)[: len(read.frame.after) + p + 1]) for p in read.positions]
    assert [end.rpartition(" ")[2] for end in ends] == [f"{name}:" for name in NAMES]
    assert read.frame.slots == ("image", "prompt") and read.frame.lead == " "


def test_half_points_are_several_tokens_and_refused_by_name():
    halves = [{"token": f"{1 + k / 2:.1f}", "value": 1 + k / 2} for k in range(9)]
    with pytest.raises(RecipeError, match=r"not one token.*'3\.5' \(value 3\.5\)"):
        reading(rubric(levels=halves), tokenizer())


def test_equal_level_tokens_are_refused():
    same = [{"token": "1", "value": 1.0}, {"token": "1", "value": 2.0}]
    with pytest.raises(RecipeError, match="two levels are the same token"):
        reading(rubric(levels=same), tokenizer())


def test_a_template_may_put_the_prompt_before_the_image():
    read = reading(rubric(template="a{prompt}bb{image}c"), tokenizer())
    assert read.frame.slots == ("prompt", "image") and read.frame.lead == ""
    assert [len(piece) for piece in read.frame.pieces[:2]] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reads": [" alignment:"]}, "4 dimensions need as many reads"),
        ({"reads": [" a :", "", " b :", " c :"]}, "may not be empty"),
        ({"template": "{prompt}"}, r"\{image\} exactly once"),
        ({"temperature": 0.0}, "temperature"),
        ({"levels": [{"token": "a", "value": 2.0}, {"token": "b", "value": 1.0}]}, "values must rise"),
        ({"scale": 3}, "scale"),
    ],
)
def test_mistakes_in_a_rubric_file_are_named(tmp_path: Path, changes: dict[str, Any], message: str):
    (tmp_path / "rubric.json").write_text(json.dumps({**RUBRIC, **changes}))
    with pytest.raises(RecipeError, match=message):
        load_rubric(tmp_path)


def test_a_rubric_that_is_no_json_or_not_there_is_named(tmp_path: Path):
    (tmp_path / "rubric.json").write_text("{")
    with pytest.raises(RecipeError, match="not JSON"):
        load_rubric(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_rubric(tmp_path / "other.json")


def test_the_shipped_rubric_has_nine_levels_and_four_dimensions():
    shipped = load_rubric()
    assert shipped.values == tuple(1 + k / 2 for k in range(9))
    assert shipped.dimensions == tuple(NAMES)


# ------------------------------------------------------------------------------------------------------- forward pass


def test_distribution_is_the_closed_set_softmax_of_the_models_own_next_tokens(scorer: Scorer):
    """Recomputed the plain way: one text, no padding, all logits, level columns picked afterwards."""
    images, prompt = pictures(1), "a red dog"
    found = scorer.distribution(images, [prompt])
    assert found.shape == (1, 4, 9)
    text = RUBRIC["template"].replace("{image}", "<|image_pad|>" * 4).replace("{prompt}", prompt)
    ids = scorer.tokenizer(text + "".join(RUBRIC["reads"]), return_tensors="pt").input_ids
    rows, grid = patchify(images, scorer.geometry)
    with torch.no_grad():
        logits = scorer.model(
            input_ids=ids, pixel_values=rows, image_grid_thw=grid, use_cache=False,
            mm_token_type_ids=(ids == scorer.model.config.image_token_id).int(),
        ).logits[0]  # fmt: skip
    levels = scorer.tokenizer.convert_tokens_to_ids(LEVELS)
    colons = (ids[0] == scorer.tokenizer.convert_tokens_to_ids(":")).nonzero()[:, 0]
    assert len(colons) == 4
    wanted = logits[colons][:, levels].softmax(-1)
    torch.testing.assert_close(found[0], wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 4))


def test_temperature_flattens(scorer: Scorer):
    hot = replace(scorer, rubric=rubric(temperature=2.0))
    images = pictures(1)
    torch.testing.assert_close(hot.logits(images, ["a cat"]) * 2, scorer.logits(images, ["a cat"]))


def test_batch_mates_change_nothing(scorer: Scorer):
    images = pictures(3)
    together = scorer.distribution(images, PROMPTS) @ scorer.levels
    for i in range(3):
        alone = scorer.distribution(images[i : i + 1], PROMPTS[i : i + 1]) @ scorer.levels
        assert (alone[0] - together[i]).abs().max() <= 1e-6
    other = scorer.distribution(torch.cat([images[:1], pictures(2, seed=9)]), [PROMPTS[0], "a", PROMPTS[1]])
    assert ((other @ scorer.levels)[0] - together[0]).abs().max() <= 1e-6


def test_image_and_prompt_both_matter(scorer: Scorer):
    images = pictures(2)
    a = scorer.distribution(images, ["a cat", "a cat"])
    assert (a[0] - a[1]).abs().max() > 1e-4
    b = scorer.distribution(images[:1], ["a red dog"])
    assert (a[0] - b[0]).abs().max() > 1e-4


def test_special_tokens_in_a_prompt_stay_text(scorer: Scorer):
    ids, _ = scorer._tokens(["a cat <|image_pad|> <|im_end|> dog"], [4])
    names = scorer.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert names.count("<|image_pad|>") == 4 and names.count("<|im_end|>") == 1
    assert "a cat <|image_pad|> <|im_end|> dog" in scorer.tokenizer.decode(ids[0])
    assert scorer.distribution(pictures(1), ["<|image_pad|><|vision_end|>"]).isfinite().all()


def test_an_empty_prompt_is_scored_and_a_huge_one_refused(scorer: Scorer):
    assert scorer.distribution(pictures(1), [""]).isfinite().all()
    with pytest.raises(DataError, match="reads at most 256"):
        scorer.distribution(pictures(1), ["dog " * 300])


# ---------------------------------------------------------------------------------------------------------- gradients


def test_each_image_gets_its_own_gradient_and_no_other(scorer: Scorer):
    images = pictures(3).requires_grad_()
    value = (scorer.distribution(images, PROMPTS) @ scorer.levels).mean(-1)
    for i in range(3):
        (gradient,) = torch.autograd.grad(value[i], images, retain_graph=True)
        assert gradient[i].abs().max() > 1e-5 and (gradient[i] != 0).float().mean() > 0.99
        assert torch.equal(gradient[torch.arange(3) != i], torch.zeros(2, 3, 16, 16))


def test_gradient_agrees_with_finite_differences_in_fp64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # the norms of transformers compute in fp32 whatever they are given; differences need all of it in fp64
    narrow = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else narrow(self))
    made = load_scorer(write_scorer(tmp_path, layers=["full_attention"] * 2), dtype=torch.float64)
    images = pictures(2).double().requires_grad_()
    levels = made.levels.double()

    def value(x: torch.Tensor) -> torch.Tensor:
        return (made.distribution(x, PROMPTS[:2]) @ levels).sum()

    (gradient,) = torch.autograd.grad(value(images), images)
    for seed in range(5):
        direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        step = 1e-5
        with torch.no_grad():
            slope = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-9)


def test_frozen_weights_get_no_gradient(scorer: Scorer):
    assert not any(p.requires_grad for p in scorer.model.parameters())
    assert not scorer.distribution(pictures(1), ["a cat"]).requires_grad


# -------------------------------------------------------------------------------------------------------------- files


def test_a_scorer_reloads_equal(scorer: Scorer, tmp_path: Path):
    save_scorer(scorer, tmp_path)
    again = load_scorer(tmp_path)
    images = pictures(3)
    assert torch.equal(again.distribution(images, PROMPTS), scorer.distribution(images, PROMPTS))
    assert again.geometry == scorer.geometry and again.rubric == scorer.rubric


def test_weights_stored_in_bfloat16_load_in_the_dtype_asked_for(tmp_path: Path):
    write_scorer(tmp_path, layers=["full_attention"], dtype=torch.bfloat16)
    loaded = load_scorer(tmp_path)
    assert loaded.stored_dtype == torch.bfloat16
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert load_scorer(tmp_path, dtype=torch.bfloat16).distribution(pictures(1), ["a cat"]).dtype == torch.float32


def other_rubric(folder: Path, **changes: Any) -> Path:
    (folder / "other.json").write_text(json.dumps({**RUBRIC, **changes}))
    return folder / "other.json"


HALVES = [{"token": text, "value": 1 + k / 2} for k, text in enumerate(LEVELS)]
FIVE = [{"token": text, "value": 1.0 + k} for k, text in enumerate("12345")]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"levels": FIVE}, r"the levels \(trained with 1 = 1, 2 = 1.5, .* 9 = 5; here 1 = 1, 2 = 2, .*, 5 = 5\)"),
        # the same values under other tokens
        ({"levels": [{**one, "token": "abcdefghi"[k]} for k, one in enumerate(HALVES)]}, "here a = 1, b = 1.5"),
        ({"dimensions": [*NAMES[:3], "fun"]}, "the dimensions .*plausibility; here .*aesthetics, fun"),
        ({"reads": [f" {name}=" for name in NAMES]}, r"reads \(trained with ' alignment: \| .*; here ' alignment= "),
        ({"template": RUBRIC["template"].replace(" {prompt}", " Rate {prompt}")}, "template .*vision_end.*here .*Rate"),
    ],
)  # fmt: skip
def test_a_rubric_that_does_not_match_the_checkpoint_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
):
    other = other_rubric(tmp_path, **changes)
    with pytest.raises(RecipeError, match=f"made for another rubric: .*{named}") as caught:
        ZReward.load(ZReward.Config(checkpoint=str(folder), rubric=str(other)), device="cpu")
    assert "reward 'zreward': checkpoint" in str(caught.value) and "scorer.rubric in a recipe" in str(caught.value)
    # training is what makes it fit, and says that it has to
    recipe = ScorerSection(model=str(folder), rubric=str(other))
    found = trainable_scorer(recipe, train=TrainSection(steps=1), device="cpu")
    assert found.rubric == load_rubric(other)
    assert "Training makes it fit the new one" in capsys.readouterr().err


def test_criteria_count_where_a_prompt_holds_them(folder: Path, tmp_path: Path):
    def criteria(judges: str) -> dict[str, Any]:
        return {name: {"judges": judges, "anchors": {"5": "good", "1": "bad"}} for name in NAMES}

    told = {**RUBRIC, "criteria": criteria("faults"), "template": RUBRIC["template"] + " {criteria}"}
    made = shutil.copytree(folder, tmp_path / "made")
    (made / "rubric.json").write_text(json.dumps(told))
    other = other_rubric(tmp_path, **{**told, "criteria": criteria("beauty")})
    with pytest.raises(RecipeError, match="the criteria of alignment, realism, aesthetics, plausibility differ"):
        load_scorer(made, rubric=other)
    # without them in the prompt they are not said, and cannot be wrong
    load_scorer(folder, rubric=other_rubric(tmp_path, criteria=criteria("beauty")))


def test_a_rubric_of_another_temperature_or_with_more_parts_is_no_other(folder: Path, tmp_path: Path):
    warm = other_rubric(tmp_path, temperature=2.0, thinking=THINKING, comparison=COMPARISON)
    images = pictures(1)
    hot, cold = load_scorer(folder, rubric=warm), load_scorer(folder)
    torch.testing.assert_close(hot.logits(images, ["a cat"]) * 2, cold.logits(images, ["a cat"]))
    assert hot.rubric.thinking is not None


def test_a_base_without_a_rubric_takes_any(folder: Path, tmp_path: Path):
    base = shutil.copytree(folder, tmp_path / "base")
    (base / "rubric.json").unlink()
    assert load_scorer(base, rubric=other_rubric(tmp_path, levels=FIVE)).rubric.values == (1, 2, 3, 4, 5)


def test_an_export_knows_its_rubric_when_its_file_was_exchanged(folder: Path, tmp_path: Path):
    task, out = new_task(folder, rated(tmp_path, [full(1.0), full(5.0)])), tmp_path / "export"
    out.mkdir()
    task.export(out, {"name": "try"})
    assert "rubric" not in (out / "README.md").read_text().partition("| | |")[2]
    (out / "rubric.json").write_text(other_rubric(tmp_path, levels=FIVE).read_text())
    with pytest.raises(RecipeError, match=r"read with .*rubric\.json, and was made for another rubric: the levels"):
        load_scorer(out)
    (out / "rubric.json").write_text(json.dumps({**RUBRIC, "temperature": 3.0}))
    assert load_scorer(out).rubric.temperature == 3.0
    facts = json.loads((out / "rewardtune.json").read_text())
    (out / "rewardtune.json").write_text(json.dumps({**facts, "rubric": "{"}))
    with pytest.raises(RecipeError, match=r"rewardtune\.json is damaged .* Export the run again"):
        load_scorer(out)
    # exports from before it was written down have their rubric.json
    del facts["rubric"]
    (out / "rewardtune.json").write_text(json.dumps(facts))
    assert load_scorer(out).rubric.temperature == 3.0
    with pytest.raises(RecipeError, match="made for another rubric: the levels"):
        load_scorer(out, rubric=tmp_path / "other.json")


def wide(folder: Path, to: Path, *, low: int = 64, high: int = 4096) -> Path:
    """A copy of a scorer that takes pictures of 1 to 64 image tokens, 64 pixels each."""
    made = shutil.copytree(folder, to)
    file = made / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"shortest_edge": low, "longest_edge": high}}))
    return made


def test_the_budget_of_image_tokens_is_kept_and_its_pixels_have_gradients(folder: Path, tmp_path: Path):
    made = wide(folder, tmp_path / "wide")
    reward = ZReward.load(ZReward.Config(checkpoint=str(made), max_pixels=64 * 9), device="cpu")
    images = pictures(2, size=(64, 48)).requires_grad_()
    rows, grid = patchify(images, reward.scorer.geometry)
    # 48 x 64 pixels would be 48 tokens; nine hold 24 x 16 of the same shape
    assert grid.tolist() == [[1, 6, 4]] * 2 and len(rows) == 2 * 24
    reward.score(images, PROMPTS[:2]).value.sum().backward()
    assert images.grad is not None and all((g != 0).float().mean() > 0.99 for g in images.grad)
    # it is the scorer's own answer about the picture of that size
    small = resize(images.detach(), (24, 16))
    found, wanted = reward.scorer.distribution(images, PROMPTS[:2]), load_scorer(made).distribution(small, PROMPTS[:2])
    torch.testing.assert_close(found.detach(), wanted, atol=1e-6, rtol=0)
    least = ZReward.load(ZReward.Config(checkpoint=str(made), min_pixels=64 * 36), device="cpu")
    assert patchify(pictures(1, size=(16, 16)), least.scorer.geometry)[1].tolist() == [[1, 12, 12]]


def test_an_export_keeps_the_bounds_that_it_was_trained_with(folder: Path, tmp_path: Path):
    write_records(rated(tmp_path, [full(1.0), full(5.0)]), tmp_path / "records.jsonl")
    recipe = RewardSftRecipe.model_validate({
        "task": "reward_sft", "train": {"steps": 1}, "data": {"records": str(tmp_path / "records.jsonl")},
        "scorer": {"model": str(wide(folder, tmp_path / "wide")), "min_pixels": 128, "max_pixels": 64 * 9},
    })  # fmt: skip
    task, out = build_reward_sft(recipe, device="cpu"), tmp_path / "export"
    out.mkdir()
    task.export(out, {})
    reward = ZReward.load(ZReward.Config(checkpoint=str(out)), device="cpu")
    assert (reward.scorer.geometry.min_pixels, reward.scorer.geometry.max_pixels) == (128, 576)
    images = pictures(1, size=(64, 48))
    wanted = task.scorer.distribution(images, PROMPTS[:1]).detach()
    torch.testing.assert_close(reward.scorer.distribution(images, PROMPTS[:1]), wanted, atol=1e-6, rtol=0)
    # a training that starts from it keeps them, too
    again = trainable_scorer(ScorerSection(model=str(out)), train=TrainSection(steps=1), device="cpu")
    assert again.geometry == task.scorer.geometry


def test_bounds_of_a_model_that_was_not_trained_here_end_at_1024_image_tokens(folder: Path, tmp_path: Path):
    vast = wide(folder, tmp_path / "vast", high=4096 * 4096)
    assert load_scorer(vast).geometry.max_pixels == 1024 * 64
    assert load_scorer(vast, max_pixels=2048 * 64).geometry.max_pixels == 2048 * 64
    # what was trained with more keeps it: its scores would be others
    (vast / "rewardtune.json").write_text("{}")
    assert load_scorer(vast).geometry.max_pixels == 4096 * 4096
    # one bound moves the other along where that is not given
    fixed = load_scorer(folder, max_pixels=128).geometry
    assert (fixed.min_pixels, fixed.max_pixels) == (128, 128)
    fixed = load_scorer(folder, min_pixels=1024).geometry
    assert (fixed.min_pixels, fixed.max_pixels) == (1024, 1024)


def test_bounds_that_no_picture_meets_are_refused(folder: Path):
    with pytest.raises(RecipeError, match=r"reward 'zreward': .*min_pixels 512 is above max_pixels 256; swap"):
        ZReward.load(ZReward.Config(checkpoint=str(folder), min_pixels=512, max_pixels=256), device="cpu")
    with pytest.raises(RecipeError, match="max_pixels 63 is less than one image token, which takes 64 pixels"):
        load_scorer(folder, max_pixels=63)
    with pytest.raises(ValidationError, match="min_pixels 512 is above max_pixels 256"):
        ScorerSection(model="x", min_pixels=512, max_pixels=256)
    with pytest.raises(ValidationError, match="a server cuts pictures itself"):
        TeacherSection.model_validate({"model": "x", "server": {"url": "http://h/v1"}, "cache": "c", "max_pixels": 256})


def test_what_is_no_scorer_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="no such folder"):
        load_scorer(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RecipeError, match="is a bert model"):
        load_scorer(tmp_path)


# ------------------------------------------------------------------------------------------------------------- reward


def test_the_card_of_zreward_imports_no_torch():
    code = (
        "import sys; import rewardtune.rewards.zreward as z; z.ZReward.card, z.ZReward.Config(); "
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_zreward_value_is_the_mean_of_the_dimensions_expectations(folder: Path):
    reward = ZReward.load(ZReward.Config(checkpoint=str(folder)), device="cpu")
    score = reward.score(pictures(3), PROMPTS)
    assert score.distribution is not None and score.levels is not None
    by_hand = [
        sum((1 + k / 2) * p for d in row for k, p in enumerate(d)) / 4 for row in score.distribution.tolist()
    ]  # fmt: skip
    assert score.value.tolist() == pytest.approx(by_hand, abs=1e-5)
    assert score.dimensions == tuple(NAMES) and list(score.parts) == NAMES
    torch.testing.assert_close(torch.stack(list(score.parts.values())).mean(0), score.value)
    assert reward.card.native_resolution == 16 and reward.card.range == (1.0, 5.0) and reward.card.differentiable


def test_zreward_resizes_and_stays_differentiable(folder: Path):
    reward = ZReward.load(ZReward.Config(checkpoint=str(folder)), device="cpu")
    images = pictures(2, size=(48, 48)).requires_grad_()
    reward.score(images, PROMPTS[:2]).value.sum().backward()
    assert images.grad is not None and all((g != 0).float().mean() > 0.9 for g in images.grad)


# ----------------------------------------------------------------------------------------------------------- training


def rated(tmp_path: Path, scores: list[dict[str, float]], annotations: Any = ()) -> list[PreferenceGroup]:
    images = []
    for i, score in enumerate(scores):
        file = tmp_path / f"{i}.png"
        shade = np.full((16, 16, 3), 40 + 60 * i, np.uint8)
        Image.fromarray(shade).save(file)
        images.append(RatedImage(file, score, tuple(annotations)))
    return [PreferenceGroup("g", Prompt("a red dog"), tuple(images))]


def full(value: float) -> dict[str, float]:
    return dict.fromkeys(NAMES, value)


def trained(task: RewardSft, steps: int, lr: float = 3e-3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in task.trainable["scorer"].parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        output = task.step(task.batch(step, range(4 * step, 4 * step + 4)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return losses


def new_task(folder: Path, groups: list[PreferenceGroup], target: str = "two-hot", **changes: Any) -> RewardSft:
    scorer = load_scorer(folder)
    scorer.model.requires_grad_(True)
    rows = rated_rows(groups, target_maker(target, scorer.rubric), scorer.rubric)
    return RewardSft(scorer, rows=rows, seed=0, base=str(folder), **changes)


def test_training_learns_the_scores_and_orders_the_pictures(folder: Path, tmp_path: Path):
    groups = rated(tmp_path, [full(1.5), full(3.25), full(4.5)])
    task = new_task(folder, groups, held_out=groups)
    losses = trained(task, 60)
    assert losses[-1] < 0.5 < losses[0]
    figures = task.evaluate()
    assert figures["hpa"] == 1.0 and figures["alignment/srcc"] == pytest.approx(1.0)
    document = evaluate_groups(task.scorer, groups, resamples=0)
    assert document["pairs"] == 12 and document["images"] == 3 and document["tokens_per_score"] == 1.0


@pytest.mark.parametrize("target", ["hard", "two-hot", "histogram"])
def test_targets_of_rows(folder: Path, tmp_path: Path, target: str):
    notes = [full(3.0), full(4.0), {"alignment": 4.0}]
    groups = rated(tmp_path, [{"alignment": 3.6, "realism": 3.5}], notes)
    row = new_task(folder, groups, target).rows[0].target
    at = {"hard": {5: 1.0}, "two-hot": {5: 0.8, 6: 0.2}, "histogram": {4: 1 / 3, 6: 2 / 3}}[target]
    expected = torch.zeros(9)
    for level, mass in at.items():
        expected[level] = mass
    torch.testing.assert_close(row[0], expected)
    # realism: rated by two annotators and in the aggregate; aesthetics by annotators only
    assert row[1].isfinite().all() and row[2].isfinite().all() == (target == "histogram")


def test_a_batch_is_named_by_its_indices(folder: Path, tmp_path: Path):
    task = new_task(folder, rated(tmp_path, [full(1.0), full(2.0), full(3.0)]))
    whole = task.batch(0, [0, 1, 2, 3, 4, 5])
    part = task.batch(7, [4, 2])
    assert torch.equal(part.target, whole.target[[4, 2]])
    # every row once an epoch
    shades = sorted(float(image.mean()) for image in whole.images[:3])
    assert shades == sorted(float(image.mean()) for image in whole.images[3:]) and len(set(shades)) == 3


def test_noisy_views_differ_from_visit_to_visit_and_come_back_on_resume(folder: Path, tmp_path: Path):
    groups = rated(tmp_path, [full(1.0), full(2.0), full(3.0)])
    plain, noisy = new_task(folder, groups), new_task(folder, groups, noise=0.2)
    count = len(noisy.rows)
    clean, seen, again = plain.batch(0, [0, 1]), noisy.batch(0, [0, 1]), noisy.batch(0, [0, 1])
    assert torch.equal(seen.target, clean.target)
    off = [(view - image).std().item() for view, image in zip(seen.images, clean.images, strict=True)]
    assert all(0 < x < 0.2 for x in off) and off[0] != off[1]
    assert all(torch.equal(a, b) for a, b in zip(seen.images, again.images, strict=True))
    later = noisy.batch(1, list(range(count, 2 * count)))  # every picture's second visit
    assert not any(torch.equal(a, b) for a in seen.images for b in later.images)


def test_records_without_scores_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="only preferences"):
        new_task(folder, rated(tmp_path, [{}, {}]))


def test_export_reloads_and_says_what_it_is(folder: Path, tmp_path: Path):
    task = new_task(folder, rated(tmp_path, [full(1.0), full(5.0)]))
    trained(task, 3)
    out = tmp_path / "export"
    out.mkdir()
    task.export(out, {"name": "try", "step": "3"})
    images = pictures(2)
    found = load_scorer(out).distribution(images, PROMPTS[:2])
    torch.testing.assert_close(found, task.scorer.distribution(images, PROMPTS[:2]).detach(), atol=1e-6, rtol=0)
    assert (found - load_scorer(folder).distribution(images, PROMPTS[:2])).abs().max() > 1e-3
    assert "in one forward pass" in (out / "README.md").read_text()
    assert json.loads((out / "rewardtune.json").read_text())["step"] == "3"
    # plain transformers reads it too
    Qwen3_5ForConditionalGeneration.from_pretrained(out)


def test_adapters_are_merged_into_the_export(folder: Path, tmp_path: Path):
    write_records(rated(tmp_path, [full(1.0), full(5.0)]), tmp_path / "records.jsonl")
    recipe = RewardSftRecipe.model_validate({
        "task": "reward_sft", "scorer": {"model": str(folder), "lora": {"rank": 4}}, "train": {"steps": 3},
        "data": {"records": str(tmp_path / "records.jsonl")}, "objective": {"noise": 0.01, "shift": 0.02},
    })  # fmt: skip
    task = build_reward_sft(recipe, device="cpu")
    assert (task.noise, task.shift) == (0.01, 0.02)
    names = [n for n, p in task.trainable["scorer"].named_parameters() if p.requires_grad]
    assert names and all("lora_" in n and "visual" not in n for n in names)
    trained(task, 5, lr=3e-2)
    out = tmp_path / "export"
    out.mkdir()
    task.export(out, {})
    images = pictures(2)
    found = load_scorer(out).distribution(images, PROMPTS[:2])
    torch.testing.assert_close(found, task.scorer.distribution(images, PROMPTS[:2]).detach(), atol=1e-5, rtol=0)
    assert (found - load_scorer(folder).distribution(images, PROMPTS[:2])).abs().max() > 1e-3


def test_a_base_in_bfloat16_takes_half_the_memory_and_trains_fp32_adapters(folder: Path, tmp_path: Path):
    write_records(rated(tmp_path, [full(1.0), full(5.0)]), tmp_path / "records.jsonl")

    def build(dtype: str) -> RewardSft:
        task = build_reward_sft(RewardSftRecipe.model_validate({
            "task": "reward_sft", "scorer": {"model": str(folder), "dtype": dtype, "lora": {"rank": 4}},
            "train": {"steps": 3, "precision": "bf16"}, "data": {"records": str(tmp_path / "records.jsonl")},
        }), device="cpu")  # fmt: skip
        assert isinstance(task, RewardSft)
        return task

    whole, half = build("float32"), build("bfloat16")
    parameters = dict(half.trainable["scorer"].named_parameters())
    assert all(p.dtype == (torch.float32 if "lora_" in name else torch.bfloat16) for name, p in parameters.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [task.step(task.batch(0, [0, 1])).loss for task in (whole, half)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    trained(half, 5, lr=3e-2)
    out = tmp_path / "export"
    out.mkdir()
    half.export(out, {})  # stored as the checkpoint was, in float32, and checked in it
    images = pictures(2)
    found = load_scorer(out).distribution(images, PROMPTS[:2])
    torch.testing.assert_close(found, half.scorer.distribution(images, PROMPTS[:2]).detach(), atol=0.03, rtol=0)
    assert (found - load_scorer(folder).distribution(images, PROMPTS[:2])).abs().max() > 1e-2


def test_an_export_ties_what_the_model_ties_and_leaves_the_trained_one(folder: Path, tmp_path: Path):
    task = new_task(folder, rated(tmp_path, [full(1.0), full(5.0)]))
    before = {name: value.clone() for name, value in task.scorer.model.state_dict().items()}
    copy = export._plain_copy(task.scorer)
    state = copy.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in state.items()) and state.keys() == before.keys()
    assert not any(p.is_meta for p in copy.parameters()) and not any(b.is_meta for b in copy.buffers())
    tied = task.scorer.model.config.get_text_config().tie_word_embeddings  # type: ignore[operator, union-attr]
    assert (copy.get_output_embeddings().weight is copy.get_input_embeddings().weight) == tied  # type: ignore[operator]
    with torch.no_grad():
        for value in copy.parameters():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in task.scorer.model.state_dict().items())
