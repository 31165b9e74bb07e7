"""The OCR rewards on pictures with words: what is read and where, how likely, with which gradient; what is refused."""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")

from rewardtune.backbones.text_reader import rows, shipped_recogniser
from rewardtune.backbones.text_recogniser import Recogniser, crop, fit, homography, log_likelihood, steps_needed
from rewardtune.backbones.wanted_text import WantedLine, wanted_lines
from rewardtune.data.images import to_tensor
from rewardtune.errors import DataError, RecipeError
from rewardtune.registry import rewards
from rewardtune.scoring.reward_set import load_reward
from rewardtune.types import Prompt


def picture(size: tuple[int, int], *words: tuple[int, int, str, int]) -> torch.Tensor:
    """(3, H, W): words at x, y with a height."""
    image = Image.new("RGB", size, (235, 230, 210))
    for x, y, word, height in words:
        ImageDraw.Draw(image).text((x, y), word, fill=(40, 30, 60), font=ImageFont.load_default(height))
    return to_tensor([image])[0]


@cache
def ocr(**options):
    return load_reward("ocr", **options)


def wants(text, **more) -> Prompt:
    return Prompt("a picture", {"text": text, **more})


LINE = picture((200, 60), (20, 8, "REWARD", 40))
PAGE = picture((320, 240), (30, 20, "HELLO", 50), (120, 150, "World 42", 40))


# ------------------------------------------------------------------------------------------------------- wanted text


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "OPEN" beside “Café”', ["OPEN", "Café"]),
        (Prompt('a "sign"', {"text": "OPEN"}), ["OPEN"]),
        (wants(["one", "two"]), ["one", "two"]),
        (wants("one\ntwo"), ["one", "two"]),
    ],
)
def test_wanted_lines(prompt, texts):
    assert [line.text for line in wanted_lines(prompt, reward="ocr")] == texts


def test_wanted_boxes():
    box = [0, 0.5, 1, 1]
    assert wanted_lines(wants("one", box=box), reward="ocr") == [WantedLine("one", (0, 0.5, 1, 1))]
    assert [line.box for line in wanted_lines(wants(["a", "b"], box=[None, box]), reward="ocr")] == [None, tuple(box)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("it's a sign", "says no text to write"),
        (wants(""), "empty line"),
        (wants([]), "expected a string"),
        (wants(7), "expected a string"),
        (wants("a", box=[0, 0, 2, 1]), "left, top, right, bottom"),
        (wants("a", box=[0.5, 0, 0.5, 1]), "left, top, right, bottom"),
        (wants(["a", "b"], box=[[0, 0, 1, 1]]), "each of its 2 line"),
    ],
)
def test_what_is_no_wanted_text(prompt, message):
    with pytest.raises(DataError, match=f"ocr: the prompt .*{message}"):
        wanted_lines(prompt, reward="ocr")


# -------------------------------------------------------------------------------------------------------- recogniser


def by_hand(probabilities: torch.Tensor, wanted: list[list[int]]) -> float:
    """CTC by its definition: the sum over every path that collapses to the text."""
    total = 0.0
    for path in product(range(probabilities.shape[1]), repeat=len(probabilities)):
        kinds = [next((k for k, kind in enumerate(wanted) if i in kind), -1 if i else -2) for i in path]
        classes = [tuple(wanted[k]) if k >= 0 else k for k in kinds]
        merged = [c for c, before in zip(classes, [None, *classes], strict=False) if c != before and c != -2]
        if merged == [tuple(kind) for kind in wanted]:
            total += math.prod(probabilities[t, i].item() for t, i in enumerate(path))
    return math.log(total)


@pytest.mark.parametrize("wanted", [[[1], [2]], [[1], [1]], [[3]], [[1, 2], [3]]])
def test_the_likelihood_is_ctc(wanted):
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)

    def likelihood(logits):
        return log_likelihood(logits.log_softmax(-1), wanted)

    assert likelihood(logits).item() == pytest.approx(by_hand(logits.softmax(-1), wanted), rel=1e-9)
    assert torch.autograd.gradcheck(likelihood, logits)
    assert steps_needed(wanted) == (3 if wanted == [[1], [1]] else len(wanted))


def test_the_homography_and_the_crop():
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    straight = torch.tensor([[4.0, 3.0], [16.0, 3.0], [16.0, 11.0], [4.0, 11.0]])
    torch.testing.assert_close(crop(image, straight), image[:, 3:11, 4:16], atol=1e-5, rtol=0)
    turned = straight.roll(-1, 0)
    torch.testing.assert_close(crop(image, turned), image[:, 3:11, 4:16].rot90(1, (1, 2)), atol=1e-5, rtol=0)
    target = torch.tensor([[1.0, 2.0], [9.0, 1.0], [10.0, 7.0], [0.0, 8.0]], dtype=torch.float64)
    mapped = torch.cat([straight.double(), torch.ones(4, 1)], 1) @ homography(straight.double(), target).T
    torch.testing.assert_close(mapped[:, :2] / mapped[:, 2:], target)


def test_pieces_are_as_rapidocr_makes_them():
    """Where nothing is made smaller; there antialiasing differs on purpose."""
    from rapidocr.ch_ppocr_rec import TextRecognizer

    theirs = TextRecognizer.__new__(TextRecognizer)
    theirs.rec_image_shape = [3, 48, 320]
    for height, width in ((31, 100), (40, 500), (48, 48)):
        piece = torch.rand(3, height, width, generator=torch.Generator().manual_seed(width))
        bytes_ = (piece * 255).round().byte()
        reference = theirs.resize_norm_img(bytes_.flip(0).permute(1, 2, 0).numpy(), max(320 / 48, width / height))
        ours = fit(bytes_.float() / 255)
        assert ours.shape == reference.shape
        # OpenCV interpolates bytes to bytes
        assert (ours - torch.from_numpy(reference)).abs().max() < 2.5 / 127.5


def test_a_file_that_is_no_recogniser_is_refused():
    detector = shipped_recogniser().parent / "PP-OCRv6_det_small.onnx"
    with pytest.raises(RecipeError, match=r"ONNX graph|no list of characters"):
        Recogniser(detector)


# ------------------------------------------------------------------------------------------------------------ reward


def test_a_line_and_wrong_ones():
    reward = ocr(region="whole")
    prompts = [Prompt('"REWARD"'), wants("KITTEN"), wants("Reward"), wants("REWARD", box=[0, 0, 1, 1])]
    score = reward.score(LINE.expand(4, -1, -1, -1), prompts)
    right, wrong, case, boxed = score.value.tolist()
    assert -0.01 < right <= 0 and wrong < -6 and case < -3
    assert boxed == pytest.approx(right, abs=1e-3)
    assert score.parts["exact"].tolist() == [1, 0, 0, 1]
    assert score.parts["probability"][0] == pytest.approx(math.exp(6 * right), rel=1e-4)
    assert ocr(region="whole", case="ignore").score(LINE[None], prompts[2:3]).value.item() > -0.05


def test_lines_are_found_and_told_apart():
    ((first, second), (joined,)) = ocr().read(
        torch.stack([PAGE, PAGE]), [wants(["World 42", "HELLO"]), wants("HELLO World 42")]
    )
    assert (first.read, second.read, joined.read) == ("World 42", "HELLO", "HELLO World 42")
    assert first.quads[0][:, 1].min() > 120 > second.quads[0][:, 1].max()
    assert len(joined.quads) == 2 and joined.log_likelihood > -1
    assert ocr().score(PAGE[None], [wants("HELLO World 42")]).parts["exact"].item() == 1


def test_a_box_says_where():
    here = ocr().score(PAGE[None], [wants("HELLO", box=[0.05, 0.05, 0.6, 0.35])]).value.item()
    there = ocr().score(PAGE[None], [wants("HELLO", box=[0.3, 0.55, 1, 0.9])]).value.item()
    assert here > -0.01 and there < -6


def test_the_gradient_in_float64():
    reward = ocr(region="whole").reward
    reward.recogniser.double()
    try:
        small = torch.nn.functional.interpolate(LINE[None].double(), size=(30, 100), mode="area")
        # on flat ground the maximum of a window is where it is by chance, and its slope another on either side
        small = small + 0.02 * torch.rand(small.shape, generator=torch.Generator().manual_seed(0))
        leaf = small.clone().requires_grad_(True)
        prompt = [wants("RENARD", box=[0.02, 0.03, 0.97, 0.98])]

        def value(images):
            (lines,) = reward.read(images, prompt)
            return lines[0].log_likelihood

        (gradient,) = torch.autograd.grad(value(leaf), leaf)
        direction = gradient / gradient.norm()
        up, down = (value(small + step * direction).item() for step in (1e-6, -1e-6))
        assert (up - down) / 2e-6 == pytest.approx(gradient.norm().item(), rel=1e-5)
    finally:
        reward.recogniser.float()


def test_a_long_text_in_a_narrow_picture_has_a_value():
    value = ocr(region="whole").score(LINE[None], [wants("ab" * 60)]).value
    assert torch.isfinite(value).all() and value < -5


def test_what_is_refused():
    with pytest.raises(DataError, match=r"ocr: the recogniser cannot read '🦊' \(U\+1F98A\)"):
        ocr(region="whole").score(LINE[None], [wants("a🦊")])
    with pytest.raises(DataError, match="2 lines without a `box`"):
        ocr(region="whole").score(LINE[None], [wants(["one", "two"])])


def test_regions_in_rows():
    def quad(x, y):
        return torch.tensor([[x, y], [x + 10, y], [x + 10, y + 8], [x, y + 8]], dtype=torch.float32)

    assert rows([quad(30, 1), quad(0, 3), quad(5, 20)]) == [[1, 0], [2]]
    assert rows([]) == []


# ----------------------------------------------------------------------------------------------------- edit distance


def test_edit_distance():
    module = __import__(rewards.load_class("ocr-edit-distance").__module__, fromlist=["edit_distance"])
    for a, b, distance in (("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0)):
        assert module.edit_distance(a, b) == module.edit_distance(b, a) == distance
    assert module.similarity("thecatsat", "cat") == 1
    assert module.similarity("cut", "cat") == pytest.approx(2 / 3)
    assert module.similarity("completely other", "cat") == 0
    assert module.similarity("", "cat") == 0


def test_the_whole_pipeline_reads():
    reward = load_reward("ocr-edit-distance")
    images = torch.stack([PAGE, torch.full_like(PAGE, 0.5)])
    score = reward.score(images, [wants(["Hello", "world 42"]), Prompt('"HELLO"')])
    assert score.value.tolist() == score.parts["exact"].tolist() == [1, 0]
    assert not score.value.requires_grad


def test_jpeg_size():
    flat, busy = torch.full((1, 3, 64, 64), 0.5), torch.rand(1, 3, 64, 64)
    images = torch.cat([flat, busy])
    large = load_reward("jpeg-size").score(images, ["", ""])
    small = load_reward("jpeg-size", compressibility=True).score(images, ["", ""])
    assert 0.3 < large.value[0] < 2 < 4 < large.value[1] < 20
    assert torch.equal(small.value, -large.value)
