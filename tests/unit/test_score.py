"""`score`: specs, folders, manifests and prompts, and rows equal to what the reward says when asked directly."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rewardtune import registry
from rewardtune.errors import DataError, NonFiniteError, RecipeError
from rewardtune.plugins import Options, RewardCard
from rewardtune.progress import Progress
from rewardtune.scoring.score import find_images, parse_spec, parse_specs, score_images
from rewardtune.types import Score

LEVELS = torch.tensor([1.0, 2.0, 3.0])


class Redness:
    """Mean red, doubled by an option; a part that only exists for prompts with a `wish`."""

    card = RewardCard(
        name="test-redness", summary="red", differentiable=True, needs_prompt=False, range=(0.0, 2.0), models={"m": "1"}
    )

    class Config(Options):
        factor: float = 1.0
        word: str = ""

    @classmethod
    def load(cls, config: Config, *, device: str) -> Self:
        reward = cls()
        reward.config = config
        return reward

    config: Config

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        wishes = [float(getattr(p, "metadata", {}).get("wish", "nan")) for p in prompts]
        value = images[:, 0].mean(dim=(1, 2)) * self.config.factor
        return Score(value, parts={"wish": torch.tensor(wishes)})


class Levels:
    """A distribution that depends on how long the prompt is and how bright the picture."""

    card = RewardCard(name="test-levels", summary="levels", differentiable=True, needs_prompt=True, range=(1.0, 3.0))
    Config = Options

    @classmethod
    def load(cls, config: Options, *, device: str) -> Self:
        return cls()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        bright = images.mean(dim=(1, 2, 3))
        length = torch.tensor([len(p) / 10 for p in prompts])
        logits = torch.stack([torch.zeros_like(bright), bright, length], dim=-1)
        table = torch.stack([logits.softmax(-1), logits.flip(-1).softmax(-1)], dim=1)
        return Score((table @ LEVELS).mean(-1), table, LEVELS, ("first", "second"))


class Broken(Redness):
    """NaN for dark pictures."""

    card = RewardCard(name="test-broken", summary="", differentiable=False, needs_prompt=False, range=None)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        value = images.mean(dim=(1, 2, 3))
        return Score(torch.where(value < 0.2, torch.nan, value))


for _reward in (Redness, Levels, Broken):
    registry.rewards.register(_reward.card.name, _reward)


def save(path: Path, red: int, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(path)
    return path


def test_specs() -> None:
    assert parse_spec("a") == ("a", {})
    assert parse_spec("a:x=1e-4,y=true,z=runs/x/export,w=null") == (
        "a",
        {"x": 1e-4, "y": True, "z": "runs/x/export", "w": None},
    )
    assert parse_spec("a:path=C:/x") == ("a", {"path": "C:/x"})
    assert parse_specs("a, b:x=1,y=2 ,c") == ["a", "b:x=1,y=2", "c"]
    for wrong in ("a:x", "a:=1", ":x=1", "", "a:x=1,x=2", "a:"):
        with pytest.raises(RecipeError, match="reward"):
            parse_spec(wrong)


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, red in (("b.png", 102), ("a.png", 51), ("c.webp", 255)):
        save(tmp_path / name, red)
    (tmp_path / "notes.txt").write_text("not a picture")
    document = score_images("test-redness:factor=2", images=tmp_path, device="cpu", batch_size=2)
    assert [Path(row["image"]).name for row in document["rows"]] == ["a.png", "b.png", "c.webp"]
    assert [row["value"] for row in document["rows"]] == pytest.approx([0.4, 0.8, 2.0], abs=0.02)
    first = document["rows"][0]
    assert {"image", "prompt", "value", "levels", "distribution", "dimensions"} <= first.keys()
    assert (first["prompt"], first["levels"], first["distribution"], first["dimensions"]) == (None, None, None, None)
    assert first["parts"] == {"wish": None}, "NaN in a part means that it says nothing"
    assert document["reward"]["name"] == "test-redness" and document["reward"]["models"] == {"m": "1"}
    json.dumps(document, allow_nan=False)


def test_sizes_may_differ_and_rows_stay_in_order(tmp_path: Path) -> None:
    reds = [20, 40, 60, 80, 100]
    for i, red in enumerate(reds):
        save(tmp_path / f"{i}.png", red, (8 + 8 * (i % 2), 8))
    document = score_images("test-redness", images=tmp_path, device="cpu", batch_size=4)
    assert [row["value"] for row in document["rows"]] == pytest.approx([r / 255 for r in reds])


def test_distributions_equal_the_reward_itself(tmp_path: Path) -> None:
    for i in range(5):
        save(tmp_path / f"{i}.png", 50 * i)
    (tmp_path / "prompts.txt").write_text("one\nthe second\na third prompt\nfour\nfive\n")
    document = score_images(
        "test-levels", images=tmp_path, prompts=tmp_path / "prompts.txt", device="cpu", batch_size=2
    )
    images = torch.zeros(5, 3, 8, 8)
    images[:, 0] = torch.tensor([0, 50, 100, 150, 200]).view(5, 1, 1) / 255
    expected = Levels().score(images, ["one", "the second", "a third prompt", "four", "five"])
    assert expected.distribution is not None
    for i, row in enumerate(document["rows"]):
        assert row["levels"] == [1.0, 2.0, 3.0]
        assert np.allclose(row["distribution"], expected.distribution[i], atol=1e-6)
        assert row["value"] == pytest.approx(expected.value[i].item(), abs=1e-6)
        assert row["dimensions"]["second"] == pytest.approx((expected.distribution[i, 1] @ LEVELS).item(), abs=1e-6)


def test_one_prompt_serves_all_images(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", 50)
    (tmp_path / "p.txt").write_text("only one\n")
    rows = score_images("test-levels", images=tmp_path, prompts=tmp_path / "p.txt", device="cpu")["rows"]
    assert {row["prompt"] for row in rows} == {"only one"}


def test_a_manifest_brings_prompts_and_their_metadata(tmp_path: Path) -> None:
    save(tmp_path / "x" / "1.png", 51)
    save(tmp_path / "x" / "2.png", 102)
    rows: list[dict[str, Any]] = [
        {"image": "x/2.png", "prompt": "b", "wish": 3},
        {"image": "x/1.png", "caption": "a"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score_images("test-redness", images=tmp_path / "m.jsonl", device="cpu")["rows"]
    assert [(row["prompt"], row["parts"]["wish"]) for row in found] == [("b", 3.0), ("a", None)]
    assert [row["value"] for row in found] == pytest.approx([0.4, 0.2])


def test_a_parquet_manifest(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    save(tmp_path / "1.png", 255)
    parquet.write_table(arrow.table({"image": ["1.png"], "prompt": ["a"]}), tmp_path / "m.parquet")
    assert score_images("test-redness", images=tmp_path / "m.parquet", device="cpu")["rows"][0]["value"] == 1.0


def test_bad_input_is_named(tmp_path: Path) -> None:
    save(tmp_path / "ok" / "1.png", 1)
    save(tmp_path / "ok" / "2.png", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        find_images(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="by its prompt"):
        score_images("test-levels", images=tmp_path / "ok", device="cpu")
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match="3 prompts for 2 images"):
        score_images("test-levels", images=tmp_path / "ok", prompts=tmp_path / "three.txt", device="cpu")
    whole = (tmp_path / "ok" / "1.png").read_bytes()
    (tmp_path / "ok" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1\.png"):
        score_images("test-redness", images=tmp_path / "ok", device="cpu")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "../secret.png"}], "leaves the folder"),
        ([{"image": "/etc/passwd"}], "leaves the folder"),
        ([{"prompt": "a"}], "image"),
        ([{"image": "1.png", "prompt": "a"}, {"image": "1.png"}], "some have none"),
        ([], "no rows"),
    ],
)
def test_bad_manifests(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    save(tmp_path / "secret.png", 1)
    save(tmp_path / "in" / "1.png", 1)
    manifest = tmp_path / "in" / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        find_images(manifest)


def test_a_value_that_is_not_finite_stops(tmp_path: Path) -> None:
    save(tmp_path / "1.png", 255)
    save(tmp_path / "2.png", 10)
    with pytest.raises(NonFiniteError, match="test-broken"):
        score_images("test-broken", images=tmp_path, device="cpu")


def test_unknown_reward_is_suggested(tmp_path: Path) -> None:
    save(tmp_path / "1.png", 255)
    with pytest.raises(ImportError, match="test-redness"):
        score_images("test-rednes", images=tmp_path, device="cpu")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and standard error of `rewardtune score WORDS`."""
    from rewardtune.cli.app import app

    with pytest.raises(SystemExit) as left:
        app(["score", *words])
    return int(left.value.code or 0), capsys.readouterr().err


def test_a_crash_in_a_file_of_ones_own_names_that_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    plugin = tmp_path / "crashing.py"
    plugin.write_text(
        "import rewardtune as rt\n\n\n@rt.register_reward_function('score-crashes', needs_prompt=False)\n"
        "def crash(images, prompts):\n    return [1 / 0 for _ in images]\n"
    )
    code, said = run(capsys, "--reward", "score-crashes", "--plugin", str(plugin), "--images", str(tmp_path))
    assert code == 70 and "ZeroDivisionError" in said
    assert f"raised in {plugin}, line 6" in said and "fault of rewardtune" not in said


def test_a_second_reward_is_not_dropped_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code, said = run(capsys, "--reward", "jpeg-size", "--reward", "zreward", "--images", str(tmp_path))
    assert code == 2 and "takes one --reward, not 2 (jpeg-size, zreward)" in said


def test_picture_files_are_brought_to_rgb_and_one_alone_will_do(tmp_path):
    """As docs/rewards.md says: a tensor of one or four channels is refused, a file of them is not."""
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 8, 4))
    half.putpixel((0, 7), (0, 0, 0, 255))
    half.save(tmp_path / "transparent.png")
    found = [score_images("test-redness", images=tmp_path / f"{name}.png", device="cpu")["rows"]
             for name in ("grey", "transparent")]  # fmt: skip
    assert [len(rows) for rows in found] == [1, 1]
    # red above, white below, and one black pixel
    assert [rows[0]["value"] for rows in found] == pytest.approx([0.2, 63 / 64])


def test_a_log_hears_of_progress_only_where_it_takes_long(monkeypatch):
    def lines(seconds: float) -> list[str]:
        clock = iter([0.0, *(seconds * i / 20 for i in range(1, 21))])
        monkeypatch.setattr("rewardtune.progress.time.monotonic", lambda: next(clock))
        stream = io.StringIO()
        progress = Progress("scoring images", 20, stream=stream)
        for _ in range(20):
            progress.advance(1)
        return stream.getvalue().splitlines()

    assert lines(5) == []
    assert len(lines(100)) == 10 and lines(100)[-1] == "scoring images: 20/20 in 1:40"
