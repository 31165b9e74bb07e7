"""Opening pictures: what is taken, what is refused and with which words; tensors and back."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewardtune.data.images import grid, open_image, resize, to_pil, to_tensor
from rewardtune.errors import DataError, NonFiniteError


def _picture(width: int = 20, height: int = 12) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 9, y * 15, (x + y) * 5], -1).astype(np.uint8))


def _png_of(width: int, height: int) -> bytes:
    """A well-formed PNG header of any size with almost no pixel data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("jpg", {"quality": 95}), ("webp", {"lossless": True})])
def test_opens_the_three_formats(tmp_path: Path, suffix: str, options: dict[str, object]) -> None:
    path = tmp_path / f"a.{suffix}"
    _picture().save(path, **options)
    found = np.asarray(open_image(path)).astype(int)
    assert np.abs(found - np.asarray(_picture()).astype(int)).max() <= (0 if suffix != "jpg" else 12)


def test_turns_a_picture_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side: the viewer turns it by 90 degrees clockwise
    _picture().save(tmp_path / "a.png", exif=exif)
    found = open_image(tmp_path / "a.png")
    assert found.size == (12, 20)
    assert np.array_equal(np.asarray(found), np.rot90(np.asarray(_picture()), -1))


def test_transparency_becomes_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[0, 1] = (0, 0, 255, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = np.asarray(open_image(tmp_path / "a.png"))
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[0, 1].tolist() == [255, 255, 255]


def test_palette_with_transparency_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "a.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "a.png")).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_grey_and_cmyk_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (3, 3), 77).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((1, 1)) == (77, 77, 77)
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    r, g, b = open_image(tmp_path / "cmyk.jpg").getpixel((8, 8))
    assert r > 240 and g < 15 and b < 15


def _refusal(path: Path, **options: int) -> str:
    with pytest.raises(DataError) as caught:
        open_image(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_refuses_what_is_not_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    assert "empty" in _refusal(path)
    path.write_text("hello")
    assert "not a PNG, JPEG or WEBP" in _refusal(path)
    _picture().save(tmp_path / "a.gif")
    assert "not a PNG, JPEG or WEBP" in _refusal(tmp_path / "a.gif")
    _picture().save(tmp_path / "a.bmp")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.bmp").read_bytes())
    assert "not a PNG, JPEG or WEBP" in _refusal(tmp_path / "b.png")
    assert "cannot be opened" in _refusal(tmp_path / "none.png")
    assert "not a regular file" in _refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in _refusal(tmp_path / "pipe.png")
    assert "not a regular file" in _refusal(Path("/dev/null"))


def test_refuses_an_animation(tmp_path: Path) -> None:
    frames = [_picture(), _picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=100)
    assert "animation" in _refusal(tmp_path / "a.webp")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_refuses_a_truncated_picture(tmp_path: Path, suffix: str) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3])
    _refusal(path)


@pytest.mark.parametrize(("width", "height"), [(8001, 8001), (12_000, 12_000), (20_000, 20_000)])
def test_refuses_a_bomb_before_decoding(tmp_path: Path, width: int, height: int) -> None:
    # 64, 144 and 400 megapixels: above our limit only, in the range where Pillow warns, and where it raises
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_of(width, height))
    assert "allowed" in _refusal(path)


def test_the_limit_counts_pixels(tmp_path: Path) -> None:
    _picture(20, 12).save(tmp_path / "a.png")
    assert "20 x 12 pixels, more than the 239" in _refusal(tmp_path / "a.png", max_pixels=239)
    open_image(tmp_path / "a.png", max_pixels=240)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_random_damage_is_a_data_error_or_a_picture(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    _picture().save(buffer, kind)
    rng = random.Random(kind)
    path = tmp_path / "a"
    refused = 0
    for _ in range(300):
        data = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            data = data[: rng.randrange(1, len(data))]
        path.write_bytes(bytes(data))
        try:
            assert open_image(path).mode == "RGB"
        except DataError:
            refused += 1
    assert refused > 30


def test_tensors_and_back() -> None:
    pixels = torch.tensor([[[[0.0, 1.0]], [[0.5, -0.3]], [[1.4, 0.25]]]])
    (picture,) = to_pil(pixels)
    assert [picture.getpixel((x, 0)) for x in range(2)] == [(0, 128, 255), (255, 0, 64)]
    again = to_tensor([picture, picture])
    assert again.shape == (2, 3, 1, 2) and again.dtype == torch.float32
    assert torch.equal(again[1, :, 0, 0], torch.tensor([0.0, 128 / 255, 1.0]))


def test_every_byte_survives_the_way_to_tensors_and_back() -> None:
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    assert np.array_equal(np.asarray(to_pil(to_tensor([picture]))[0]), np.asarray(picture))


def test_tensor_refusals() -> None:
    with pytest.raises(DataError, match=r"\(2, 2\), \(3, 2\)"):
        to_tensor([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 2))])
    with pytest.raises(NonFiniteError):
        to_pil(torch.full((1, 3, 2, 2), float("nan")))


def test_resize_keeps_a_constant_and_carries_gradient() -> None:
    images = torch.full((1, 3, 8, 8), 0.3, requires_grad=True)
    small = resize(images, (3, 5))
    assert small.shape == (1, 3, 3, 5) and torch.allclose(small, torch.tensor(0.3))
    small.sum().backward()
    assert images.grad is not None and images.grad.sum().item() == pytest.approx(45.0, rel=1e-5)
    assert resize(images, (8, 8)) is images


def test_resize_agrees_with_pillow() -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(60, 200, (32, 32, 3), np.uint8))
    ours = resize(to_tensor([picture]), (12, 20))
    theirs = to_tensor([picture.resize((20, 12), Image.Resampling.BICUBIC)])
    assert (ours - theirs).abs().max() < 1.5 / 255


def test_grid_places_row_by_row() -> None:
    colours = torch.tensor([0.0, 0.2, 0.4]).view(3, 1, 1, 1).expand(3, 3, 4, 6)
    sheet = grid(colours, 2)
    assert sheet.size == (14, 10)
    assert [sheet.getpixel(p)[0] for p in ((0, 0), (8, 0), (0, 6), (6, 0), (8, 6))] == [0, 51, 102, 255, 255]
