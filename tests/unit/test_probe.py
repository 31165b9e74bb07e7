"""`rewards probe`: a walk whose end is known, the real pocket reward and judge, refusals, and a page that is safe."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_compare_page import PAYLOADS

from rewardtune.cli.app import app
from rewardtune.data.images import open_image, to_tensor
from rewardtune.errors import DataError, RecipeError
from rewardtune.probe.ascent import ascend, plan, rounded
from rewardtune.probe.run import probe
from rewardtune.probe.verdict import decide, signed
from rewardtune.registry import load_plugin
from rewardtune.scoring.checked import NoGraph
from rewardtune.scoring.reward_set import load_reward
from rewardtune.types import Prompt

HERE = Path(__file__).parent


@pytest.fixture(autouse=True, scope="module")
def plugins():
    for name in ("redness", "fussy"):
        load_plugin(str(HERE / f"{name}.py"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two of other sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (24, 16), (100, 100, 100)).save(folder / "a.png")
    Image.new("RGB", (16, 16), (250, 100, 3)).save(folder / "b.png")
    return folder


# ---------------------------------------------------------------------------------------------------------- the ascent


def test_the_plan_shares_steps_out_over_the_budgets():
    steps = plan(8, (2, 8, 16))
    assert [round(s.budget * 255) for s in steps] == [2, 2, 2, 8, 8, 8, 16, 16]
    assert [s.ends_budget for s in steps] == [False, False, True, False, False, True, False, True]
    # all steps of a budget together reach 2.5 times what it adds
    assert sum(s.size for s in steps[3:6]) == pytest.approx(2.5 * 6 / 255)
    with pytest.raises(RecipeError, match="needs a step for each"):
        plan(2, (2, 8, 16))
    for wrong in ((8, 2), (0, 2), (2, 300)):
        with pytest.raises(RecipeError, match="rising whole numbers"):
            plan(9, wrong)


@pytest.mark.parametrize(("name", "red", "green", "blue"), [("redness", 1, 0, -1), ("greenless", 0, -1, 0)])
def test_a_linear_reward_ends_in_the_corner_of_the_box(name, red, green, blue):
    start = torch.tensor([0.5, 0.5, 0.5]).view(1, 3, 1, 1).repeat(2, 1, 4, 4)
    start[1] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    seen: dict[int, torch.Tensor] = {}
    end = ascend(load_reward(name), start, [Prompt("")] * 2, plan(6, (4, 16)), seen.__setitem__)
    move = 16 / 255 * torch.tensor([red, green, blue]).view(1, 3, 1, 1)
    # also where the box of pixels ends before that of the budget
    assert torch.allclose(end, (start + move).clamp(0, 1), atol=1e-6)
    assert sorted(seen) == list(range(7)) and torch.equal(seen[0], start)
    assert (seen[3] - start).abs().max() == pytest.approx(4 / 255) and (rounded(end) - start).abs().max() <= 16.6 / 255


def test_rewards_that_cannot_be_climbed(pictures, tmp_path):
    with pytest.raises(RecipeError, match=r"'jpeg-size' returns no gradient.*--judge jpeg-size"):
        probe("jpeg-size", out=tmp_path / "out")
    with pytest.raises(RecipeError, match="'flat' has a gradient of zero"):
        probe("flat", images=pictures, out=tmp_path / "out")
    with pytest.raises(NoGraph, match="'cut': no gradient can be taken"):
        probe("cut", images=pictures, out=tmp_path / "out")
    with pytest.raises(RecipeError, match="none is given"):
        probe("zreward", images=pictures, out=tmp_path / "out")
    with pytest.raises(RecipeError, match="name each judge once"):
        probe("redness", images=pictures, judges=["redness"], out=tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        probe("redness", images=tmp_path / "nowhere", out=tmp_path / "out")
    with pytest.raises(ImportError, match="rednes"):
        probe("rednes", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_reward_that_is_fooled_by_pixels_and_one_that_agrees(pictures, tmp_path):
    found = probe("redness", images=pictures, judges=["evenness", "greenless"], steps=6, budgets=(8, 64),
                  out=tmp_path / "out").document  # fmt: skip
    last = found["budgets"][-1]
    # a: red and blue by 64 each; b: red by 5 up to 255, blue by 3 down to 0
    assert last["rewards"]["redness"]["change"] == pytest.approx((128 + 8) / 2 / 255, abs=1e-5)
    assert last["rewards"]["redness"]["of_range"] == pytest.approx((128 + 8) / 2 / 255 / 2, abs=1e-5)
    assert last["change"]["linf"] == pytest.approx(64 / 255) and last["rewards"]["greenless"]["change"] == 0
    assert found["verdict"]["outcome"] == "blind-spot" and found["verdict"]["budget"] == 64
    assert [s["name"] for s in found["starts"]] == ["a.png", "b.png", "noise"] and found["starts"][0]["size"] == [
        24,
        16,
    ]
    # what is on disk is what was judged
    start, end = (to_tensor([open_image(tmp_path / "out/images" / f"00-{name}.png")]) for name in ("start", "64"))
    assert load_reward("redness").score(end, [""]).value.item() == pytest.approx(
        found["looks"][-1]["values"]["redness"][0], abs=1e-6
    )
    assert (end - start).abs().max() == pytest.approx(64 / 255)
    alone = probe("redness", images=pictures / "a.png", steps=2, budgets=(2, 4), out=tmp_path / "alone").document
    assert alone["verdict"]["outcome"] == "resists" and alone["judges"] == {}


def test_a_rise_that_too_long_steps_lose_again_is_not_called_resistance(pictures, tmp_path):
    """Two steps of 10/255 within 8/255: over the peak, then back beyond where it began."""

    def probed(steps: int) -> dict[str, Any]:
        return probe("narrow", images=pictures / "a.png", steps=steps, budgets=(8,), out=tmp_path / "out").document

    short = probed(2)
    assert short["verdict"]["outcome"] == "unsettled" and "--steps" in short["verdict"]["headline"]
    assert short["budgets"][0]["highest"]["step"] == 1 and short["budgets"][0]["highest"]["gain"] > 0.7
    assert short["budgets"][0]["rewards"]["narrow"]["gain"] < 0.01
    assert "after step 1" in short["verdict"]["words"][0]
    assert "of 1 picture." in " ".join(short["verdict"]["words"])
    assert "1 picture and noise · 2 steps" in (tmp_path / "out/probe.html").read_text()
    assert probed(40)["verdict"]["outcome"] == "unjudged", "shorter steps stay up there"


def test_a_change_that_rounds_to_nothing_has_no_minus():
    assert (signed(-0.0004), signed(0.0004), signed(-0.2)) == ("+0.000", "+0.000", "-0.200")


def test_the_verdict_follows_its_rules():
    def card(label: str, band: float = 0.1, limits: list[float] | None = None) -> dict[str, Any]:
        return {"label": label, "range": limits, "scale": 2.0, "tie_band": band, "higher_is_better": True}

    def figures(change: float) -> dict[str, Any]:
        return {"before": 1.0, "after": 1 + change, "change": change, "gain": change, "in_scales": change / 2,
                "better": 1, "worse": 0, "pictures": 1}  # fmt: skip

    def document(rises: list[float], judged: list[float] | None) -> dict[str, Any]:
        entries = []
        for k, rise in enumerate(rises):
            rewards = {"it": figures(rise)} | ({"judge": figures(judged[k])} if judged else {})
            noise = {"it": {"before": 0.0, "after": rise}}
            entries.append({"budget": 2 ** (k + 1), "rewards": rewards, "noise": noise, "highest": {"gain": rise},
                            "change": {"rms": 0.01, "linf": 0.02}})  # fmt: skip
        return {"reward": card("it"), "judges": {"judge": card("judge")} if judged else {}, "budgets": entries,
                "rule": {"steps": 6}}  # fmt: skip

    told = {
        # unbounded: a rise of one scale, 2.0, counts
        ("resists", 4): document([1.0, 1.9], [0.0, 0.0]),
        ("unjudged", 4): document([1.0, 2.0], None),
        ("blind-spot", 2): document([2.0, 3.0], [0.1, 0.0]),
        ("blind-spot", 4): document([2.0, 3.0], [0.2, 0.0]),
        ("shared", 2): document([2.0, 3.0], [0.2, 0.3]),
    }
    for (outcome, budget), given in told.items():
        verdict = decide(given)
        assert (verdict["outcome"], verdict["budget"]) == (outcome, budget)
    assert "sees no difference" in " ".join(decide(told["blind-spot", 2])["words"])
    # one picture of four carries the judge's mean
    told["shared", 2]["budgets"][0]["rewards"]["judge"] |= {"better": 1, "pictures": 4}
    verdict = decide(told["shared", 2])
    assert verdict["outcome"] == "blind-spot" and "sees a gain on few pictures" in " ".join(verdict["words"])
    bounded = document([0.3, 0.5], None)
    bounded["reward"] = card("it", limits=[0.0, 4.0])
    assert decide(bounded)["budget"] == 4, "a tenth of the range"


# -------------------------------------------------------------------------------------------------------- real weights


def test_the_pocket_reward_under_the_pocket_judge(tmp_path, capsys):
    def run(folder: str) -> dict[str, Any]:
        words = ["rewards", "probe", "zreward", "--steps", "12", "--pictures", "4", "--budgets", "4,16", "--json"]
        with pytest.raises(SystemExit) as left:
            app([*words, "--out", str(tmp_path / folder)])
        assert not left.value.code
        return json.loads(capsys.readouterr().out)

    found, again = run("one"), run("two")
    assert found.pop("seconds") > 0 and again.pop("seconds") > 0
    assert found == again, "the same seed"
    # other test files may have registered held-out rewards of their own
    assert "pocket-oracle" in found["judges"], "the judge that is held out, unasked"
    assert [start["kind"] for start in found["starts"]] == ["drawn"] * 4 + ["noise"]
    first, last = found["budgets"]
    assert first["rewards"]["zreward"]["gain"] > 0.3 and last["rewards"]["zreward"]["better"] == 4
    # a fact that the judge was about to change its mind on may turn on one picture and carry the mean; not on half
    assert first["rewards"]["zreward"]["better"] == 4
    assert first["rewards"]["pocket-oracle"]["better"] < 2, "pixels are no facts"
    before, after = (next(look["values"] for look in looks if look["budget"] == budget)
                     for looks, budget in ((found["looks"], 0), (found["looks"][::-1], 4)))  # fmt: skip
    shares = {label: statistics.median(b - a for a, b in zip(before[label][:4], after[label][:4], strict=True)) / width
              for label, width in {"zreward": 4.0, "pocket-oracle": 1.0}.items()}  # fmt: skip
    assert shares["pocket-oracle"] < 0.5 * shares["zreward"]
    assert last["noise"]["zreward"]["after"] > last["noise"]["zreward"]["before"] + 0.3
    assert last["change"]["linf"] <= 16 / 255 + 1e-6
    assert found["verdict"]["outcome"] == "blind-spot"
    names = sorted(file.name for file in (tmp_path / "one/images").iterdir())
    assert names == [f"{i:02d}-{what}.png" for i in range(5) for what in ("16", "4", "start")]
    for name in names:
        assert (tmp_path / "one/images" / name).read_bytes() == (tmp_path / "two/images" / name).read_bytes()
    page = (tmp_path / "one/probe.html").read_text()
    assert page.count("<img") == 5 * 4 and found["starts"][0]["prompt"] in page


def test_prompts_cannot_run(pictures, tmp_path):
    rows = [{"image": "a.png", "prompt": text.replace("\x1b", "").replace("\x00", "").replace("\x9b", "")}
            for text in PAYLOADS]  # fmt: skip
    manifest = pictures / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = probe("redness", images=manifest, pictures=len(rows), steps=1, budgets=(8,), out=tmp_path / "out")
    page = found.page.read_text()
    assert len(found.document["starts"]) == len(rows) + 1
    tags = page.lower()
    assert "<script" not in tags and "<svg onload" not in tags and "<iframe" not in tags and "onerror=" not in (
        tags.replace("onerror=&#34;", "")
    )  # fmt: skip
    assert "{{ 7 * 7 }}" in page and "\u202e" not in page
    assert "default-src 'none'" in page and "script-src" not in page


def test_the_command_line_refuses_odd_budgets(capsys):
    with pytest.raises(SystemExit) as left:
        app(["rewards", "probe", "zreward", "--budgets", "2,many"])
    assert left.value.code == 2 and "whole numbers" in capsys.readouterr().err
