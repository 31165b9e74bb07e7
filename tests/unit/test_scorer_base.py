"""The shipped base of the pocket scorer sees: it tells captions that fit a drawn scene from captions that do not."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from rewardtune.data.images import to_tensor
from rewardtune.data.references import pocket_path
from rewardtune.pocket.faults import misread
from rewardtune.pocket.scenes import render, sample_scene
from rewardtune.scorer.model import Scorer, load_scorer
from rewardtune.scorer.rubric import Level, reading


@pytest.fixture(scope="module")
def base() -> Scorer:
    return load_scorer("pocket:scorer-base")


@pytest.fixture(scope="module")
def matcher(base: Scorer) -> Scorer:
    """The base, asked for the answer it was taught: yes or no straight after the prompt. A rubric is data."""
    opening = "<|im_start|>assistant"
    rubric = base.rubric.model_copy(
        update={
            "dimensions": ("match",),
            "levels": (Level(token=" no", value=0.0), Level(token=" yes", value=1.0)),
            "template": base.rubric.template.removesuffix(opening),
            "reads": (opening,),
        }
    )
    return replace(base, rubric=rubric, reading=reading(rubric, base.tokenizer))


def test_base_tells_captions_that_fit_from_those_that_do_not(matcher: Scorer):
    rng = random.Random(0)
    scenes = [sample_scene(rng, "validation") for _ in range(40)]
    images = to_tensor([render(s) for s in scenes])
    # another caption for the same picture: what `misread` would draw, where that changes the words
    others = []
    for scene in scenes:
        other = misread(scene, rng)
        while other.caption == scene.caption:
            other = misread(scene, rng)
        others.append(other)
    with torch.no_grad():
        fits = matcher.distribution(images, [s.caption for s in scenes])[:, 0, 1]
        breaks = matcher.distribution(images, [s.caption for s in others])[:, 0, 1]
    assert (fits > 0.5).float().mean() >= 0.95
    assert (breaks < 0.5).float().mean() >= 0.9


def test_the_answer_follows_the_pixels(matcher: Scorer):
    """Ascending the gradient of "yes" on the picture moves the answer by nats: the signal reaches the pixels."""
    rng = random.Random(1)
    scene, other = sample_scene(rng, "validation"), sample_scene(rng, "validation")
    image = to_tensor([render(other)])
    chances = []
    for _ in range(15):
        image = image.detach().requires_grad_()
        chance = matcher.logits(image, [scene.caption]).log_softmax(-1)[0, 0, 1]
        chance.backward()
        chances.append(chance.item())
        assert image.grad is not None and image.grad.abs().sum() > 0
        image = (image + 0.01 * image.grad.sign()).clamp(0, 1)
    assert chances[-1] > chances[0] + 3.0


def test_base_files_are_small_and_say_what_they_are(base: Scorer):
    folder = pocket_path("pocket:scorer-base")
    assert (folder / "model.safetensors").stat().st_size < 8_000_000
    assert base.stored_dtype == torch.bfloat16
    assert type(base.model).__name__ == "Qwen3_5ForConditionalGeneration"
    assert "has never seen a score" in (folder / "README.md").read_text()
    assert (base.geometry.min_pixels, base.geometry.max_pixels) == (4096, 4096)


def test_base_writes_levels_and_words_as_single_tokens(base: Scorer):
    words = base.tokenizer
    assert words.tokenize(" a red dog to the left of two cats, blurry.") == [
        "\u0120a", "\u0120red", "\u0120dog", "\u0120to", "\u0120the", "\u0120left", "\u0120of", "\u0120two",
        "\u0120cats", ",", "\u0120blurry", ".",
    ]  # fmt: skip
    assert words.convert_ids_to_tokens(list(base.reading.level_ids)) == [*"123456789"]
    text = "An unknown word, 3.5 and \u20ac too"
    assert words.decode(words.encode(text)) == text
