"""The diversity measure on drawn pictures: what must leave it alone, what must lower it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from rewardtune.compare.diversity import diversity, features

PROMPTS, SEEDS = 12, 3
OWNER = [p for p in range(PROMPTS) for _ in range(SEEDS)]


def picture(prompt: int, seed: int) -> Image.Image:
    """A shape and colours that the prompt fixes, at a place and size that the seed fixes."""
    what = np.random.default_rng(prompt)
    where = np.random.default_rng(1000 + 100 * prompt + seed)
    image = Image.new("RGB", (64, 64), tuple(int(c) for c in what.integers(120, 256, 3)))
    draw = ImageDraw.Draw(image)
    colour = tuple(int(c) for c in what.integers(0, 140, 3))
    x, y, r = where.uniform(16, 48), where.uniform(16, 48), where.uniform(8, 16)
    shape = (draw.ellipse, draw.rectangle)[prompt % 2]
    shape((x - r, y - r, x + r, y + r), fill=colour)
    return image


def pictures() -> list[Image.Image]:
    return [picture(p, s) for p in range(PROMPTS) for s in range(SEEDS)]


def test_identical_images_have_none() -> None:
    found = diversity([picture(0, 0)] * (PROMPTS * SEEDS), OWNER)
    assert (found.value, found.within, found.between) == (0.0, 0.0, 0.0)


def test_one_image_for_all_seeds_and_one_for_all_prompts_both_collapse_it() -> None:
    full = diversity(pictures(), OWNER)
    assert full.within is not None and full.between is not None
    assert 0 < full.within < full.between
    assert full.value == pytest.approx((full.within * full.between) ** 0.5)
    same_seeds = diversity([picture(p, 0) for p in range(PROMPTS) for _ in range(SEEDS)], OWNER)
    assert same_seeds.within == 0.0 and same_seeds.value == 0.0
    same_prompts = diversity([picture(0, s) for _ in range(PROMPTS) for s in range(SEEDS)], OWNER)
    assert same_prompts.between is not None and same_prompts.between < 0.6 * full.between
    assert same_prompts.value < 0.8 * full.value


def test_more_spread_is_more_diverse() -> None:
    def halfway(a: Image.Image, b: Image.Image) -> Image.Image:
        return Image.blend(a, b, 0.5)

    calm = [halfway(picture(p, s), picture(p, 0)) for p in range(PROMPTS) for s in range(SEEDS)]
    assert diversity(calm, OWNER).within < 0.8 * diversity(pictures(), OWNER).within  # type: ignore[operator]


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0, 3.0])
def test_blur_does_not_raise_it(radius: float) -> None:
    sharp = diversity(pictures(), OWNER).value
    soft = diversity([image.filter(ImageFilter.GaussianBlur(radius)) for image in pictures()], OWNER).value
    assert soft <= 1.01 * sharp


def test_sharpening_a_soft_side_gains_almost_nothing() -> None:
    soft = [image.filter(ImageFilter.GaussianBlur(1.5)) for image in pictures()]
    sharpened = [image.filter(ImageFilter.UnsharpMask(2, 150, 0)) for image in soft]
    ratio = diversity(sharpened, OWNER).value / diversity(soft, OWNER).value
    assert 0.95 < ratio < 1.05


def test_noise_does_not_pass_for_variety() -> None:
    rng = np.random.default_rng(0)

    def noisy(image: Image.Image) -> Image.Image:
        grain = rng.normal(0, 20, (64, 64, 3))
        return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))

    same = diversity([noisy(picture(0, 0)) for _ in OWNER], OWNER).value
    assert same < 0.25 * diversity(pictures(), OWNER).value


def test_one_seed_and_one_prompt_leave_the_part_that_exists() -> None:
    one_seed = diversity([picture(p, 0) for p in range(PROMPTS)], range(PROMPTS))
    assert one_seed.within is None and one_seed.value == one_seed.between
    one_prompt = diversity([picture(0, s) for s in range(SEEDS)], [0] * SEEDS)
    assert one_prompt.between is None and one_prompt.value == one_prompt.within
    with pytest.raises(ValueError, match="two images"):
        diversity([picture(0, 0)], [0])


def test_size_of_the_picture_hardly_matters() -> None:
    large = [image.resize((256, 256), Image.Resampling.BICUBIC) for image in pictures()]
    assert diversity(large, OWNER).value == pytest.approx(diversity(pictures(), OWNER).value, rel=0.05)


def test_a_plain_picture_has_no_edges() -> None:
    vector = features(Image.new("RGB", (64, 64), (90, 120, 200)))
    assert np.abs(vector[-128:]).max() == 0.0
