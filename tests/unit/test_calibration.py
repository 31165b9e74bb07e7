"""`rewards calibrate`: figures against numbers counted by hand, real pocket weights, bad input, a safe page."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import TOKEN, serving

from rewardtune.calibration.comparison import against_people, between_rewards, differences, lead
from rewardtune.calibration.labels import Labels, read_labels
from rewardtune.calibration.readings import Reading
from rewardtune.calibration.run import calibrate
from rewardtune.calibration.temperature import cross_entropy, fit, reliability, tempered
from rewardtune.calibration.verdict import decide
from rewardtune.cli.app import app
from rewardtune.data.records import read_records
from rewardtune.errors import DataError, RecipeError
from rewardtune.registry import load_plugin
from rewardtune.scoring.reward_set import load_reward
from rewardtune.scoring.score import ImageScore, parse_spec

HERE = Path(__file__).parent
LEVELS = [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.fixture(autouse=True, scope="module")
def plugins():
    for name in ("redness", "fussy"):
        load_plugin(str(HERE / f"{name}.py"))


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A record file; every picture that it names is a patch whose red says how good it is."""
    for row in rows:
        for name in (row.get("image"), row.get("chosen"), row.get("rejected")):
            if name and not (folder / name).exists():
                red = int(Path(name).stem.split("-")[-1])
                Image.new("RGB", (16, 16), (red, 40, 100)).save(folder / name)
    file = folder / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rated(group: int, red: int, **scores: float) -> dict[str, Any]:
    return {"group": f"g{group}", "prompt": f"prompt {group}", "image": f"{group}-{red}.png", "scores": scores}


def six_prompts() -> list[dict[str, Any]]:
    """Three pictures of each of six prompts; people like red, except in the last prompt."""
    return [rated(g, red, look=s if g < 5 else 6 - s) for g in range(6) for red, s in ((10, 1), (100, 3), (200, 3.5))]


def labels_of(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Labels:
    return read_labels(read_records(write(folder, rows)), **settings)


def reading(label: str, values: list[float], *, differentiable: bool = True, **parts: list[float]) -> Reading:
    card = {"higher_is_better": True, "differentiable": differentiable}
    said = [ImageScore(v, {name: column[i] for name, column in parts.items()}) for i, v in enumerate(values)]
    return Reading(label, card, {}, said, 1.0, len(values), 4)


# ------------------------------------------------------------------------------------------------------------- figures


def test_pairs_come_from_scores_and_choices(tmp_path):
    rows = [
        rated(0, 10, look=1, text=5), rated(0, 20, look=3, text=3.5), rated(0, 30, look=4, text=2),
        {"group": "g0", "prompt": "prompt 0", "chosen": "0-10.png", "rejected": "0-20.png"},
        {"prompt": "prompt 0", "chosen": "0-30.png", "rejected": "0-40.png"},
        rated(1, 10, look=2, text=2),
    ]  # fmt: skip
    labels = labels_of(tmp_path, rows)
    # (10, 20): the choice counts, not the means 3 and 3.25; (10, 30) are equal; (20, 30): 3.25 against 3
    assert labels.overall.human.tolist() == [np.inf, 0.25, np.inf]
    assert labels.dropped == {"groups without an ordered pair": 1, "pairs that people find equal": 1,
                              "pairs that nobody judged": 0}  # fmt: skip
    # one picture under one prompt is scored once, and both groups are of one prompt
    assert len(labels.pictures) == 5 and labels.prompts == 1
    assert len(labels.each["look"]) == 3 and labels.each["text"].human.tolist() == [1.5, 3.0, 1.5]
    by_look = labels_of(tmp_path, rows, dimension="look")
    assert by_look.overall.human.tolist() == [-2.0, -3.0, -1.0], "choices are about whole pictures"
    with pytest.raises(DataError, match=r"--dimension 'looks'.*they rate: look, text"):
        labels_of(tmp_path, rows, dimension="looks")


def test_accuracies_of_a_reward_and_its_parts_by_hand(tmp_path):
    labels = labels_of(tmp_path, six_prompts())
    red = [10.0, 100.0, 200.0] * 6
    found = against_people(reading("red", red, coarse=[0.0, 1.0, 1.0] * 6), labels)
    # three pairs a prompt (gaps 2, 2.5, 0.5): right in five prompts, wrong in the sixth
    assert (found["pairs"], found["margin_pairs"], found["near_pairs"]) == (18, 12, 6)
    assert found["hpa"] == found["margin_hpa"] == found["near_hpa"] == pytest.approx(5 / 6)
    assert found["ci95"]["hpa"][0] < 5 / 6 <= found["ci95"]["hpa"][1] == 1.0
    assert found["dimensions"]["look"]["hpa"] == pytest.approx(5 / 6)
    # the part cannot tell the last two apart: those pairs are left out, not wrong
    part = found["parts"]["coarse"]["overall"]
    assert (part["pairs"], part["tied"]) == (12, pytest.approx(1 / 3)) and part["hpa"] == pytest.approx(5 / 6)


def test_differences_are_paired_and_errors_are_counted(tmp_path):
    labels = labels_of(tmp_path, six_prompts())
    red = [10.0, 100.0, 200.0] * 6
    fixed = red[:15] + [-v for v in red[15:]]
    rows = [reading("red", red), reading("same", [v / 7 for v in red]), reading("best", fixed),
            reading("worst", [-v for v in red])]  # fmt: skip
    found = differences(rows, labels)
    same = next(e for e in found if (e["a"], e["b"]) == ("red", "same"))["hpa"]
    assert same == {"difference": 0.0, "ci95": [0.0, 0.0], "resolved": False}
    gap, (low, high), resolved = lead(found, "worst", "red")
    assert gap == pytest.approx(1 / 6 - 5 / 6) and low < gap < high and not resolved, "six prompts, one against"
    gap, (low, high), resolved = lead(found, "worst", "best")
    assert gap == pytest.approx(1 / 6 - 1) and high < 0 and resolved
    between = between_rewards(rows, labels)
    assert between["spearman"]["red"]["same"] == pytest.approx(1.0)
    assert between["pair_agreement"]["red"]["best"] == pytest.approx(5 / 6)
    assert between["error_correlation"]["red"]["same"] == pytest.approx(1.0)
    assert between["error_correlation"]["red"]["worst"] == pytest.approx(-1.0)
    assert between["error_correlation"]["red"]["best"] is None, "never wrong has no correlation"
    assert between["catches"]["red"]["best"]["share"] == 1.0 and between["catches"]["red"]["best"]["pairs"] == 3
    assert between["catches"]["red"]["same"]["share"] == 0.0


def test_the_verdict_follows_its_rules():
    def reward(hpa: float, low: float, *, differentiable: bool = True) -> dict[str, Any]:
        return {"hpa": hpa, "ci95": {"hpa": [low, min(1.0, 2 * hpa - low)]}, "differentiable": differentiable,
                "caught_by": {}}  # fmt: skip

    def gap(a: str, b: str, value: float, resolved: bool) -> dict[str, Any]:
        return {"a": a, "b": b, "hpa": {"difference": value, "ci95": [value - 0.1, value + 0.1], "resolved": resolved}}

    rewards = {"fast": reward(0.80, 0.7), "slow": reward(0.78, 0.7), "chance": reward(0.5, 0.4),
               "people": reward(0.95, 0.9, differentiable=False)}  # fmt: skip
    gaps = [
        gap("fast", "slow", 0.02, False),
        gap("fast", "chance", 0.3, True),
        gap("fast", "people", -0.15, True),
        gap("slow", "chance", 0.28, True),
        gap("slow", "people", -0.17, True),
        gap("chance", "people", -0.45, True),
    ]
    errors = {a: dict.fromkeys(rewards, 0.5) for a in rewards}
    found = decide(rewards, gaps, errors)
    assert found["train"]["reward"] == "fast" and found["train"]["not_told_apart"] == ["slow"]
    assert "do not resolve" in found["train"]["words"]
    assert found["judge"]["reward"] == "people" and found["judge"]["not_told_apart"] == []
    # as accurate as the best as far as the labels tell: then the errors decide
    errors["fast"]["slow"] = 0.1
    gaps[4] = gap("slow", "people", -0.17, False)
    assert decide(rewards, gaps, errors)["judge"]["reward"] == "people", "17 points are too many all the same"
    gaps[4] = gap("slow", "people", -0.04, False)
    assert decide(rewards, gaps, errors)["judge"]["reward"] == "slow"
    alone = decide({"chance": rewards["chance"]}, [], errors)
    assert alone["train"]["reward"] is None and "better than chance" in alone["train"]["words"]
    assert alone["judge"]["reward"] is None
    assert "none of them gives a gradient" in decide({"people": rewards["people"]}, [], errors)["train"]["words"]


# --------------------------------------------------------------------------------------------------------- temperature


def test_a_known_temperature_is_found_again():
    rng = np.random.default_rng(0)
    honest = rng.dirichlet(np.ones(5), 400)
    # a reward that is too sure by T = 2 says honest^2; the truth is that at temperature 2
    sure = tempered(honest, 0.5)
    assert fit(sure, honest) == pytest.approx(2.0, rel=1e-2)
    assert cross_entropy(tempered(sure, 2.0), honest) < cross_entropy(sure, honest)
    assert tempered(honest, 1.0) == pytest.approx(honest)


def distributional(labels: Labels, levels: list[float]) -> Reading:
    """All but certain of the middle level, always."""
    row = [0.01, 0.01, 0.96, 0.01, 0.01]
    said = [ImageScore(3.0, {}, levels, [row], {"look": 3.0}) for _ in labels.pictures]
    return Reading("sure", {"higher_is_better": True, "differentiable": True}, {}, said, 1.0, 1, 1)


def test_reliability_is_fitted_on_one_half_and_reported_on_the_other(tmp_path):
    rows = [
        {**rated(g, red), "annotations": [{"annotator": str(a), "look": s} for a, s in enumerate((1, 3, 3, 5))]}
        for g in range(8) for red in (10, 100)
    ]  # fmt: skip
    for row in rows:
        del row["scores"]
    labels = labels_of(tmp_path, rows)
    found = reliability(distributional(labels, LEVELS), labels)
    assert isinstance(found, dict)
    before = found["reported_on"]["before"]
    # 96 % sure of a level that half of the annotators chose
    assert before["ece"] == pytest.approx(0.46) and before["agreed"] == pytest.approx(0.5)
    assert found["temperature"] > 1 and found["helps"] and found["reported_on"]["after"]["ece"] < before["ece"]
    assert [found[half]["before"]["prompts"] for half in ("fitted_on", "reported_on")] == [4, 4]
    assert before["bins"] == [{"from": 0.9, "to": 1.0, "ratings": 8, "confidence": pytest.approx(0.96),
                               "agreed": pytest.approx(0.5)}]  # fmt: skip
    # the halves are the prompts', whatever the order of the rows
    again = labels_of(tmp_path, rows[::-1])
    assert reliability(distributional(again, LEVELS), again) == found
    # levels of 0 to 1: people's 1 to 5 are laid over them
    spread = reliability(distributional(labels, [0.0, 0.25, 0.5, 0.75, 1.0]), labels)
    assert isinstance(spread, dict) and spread["all"] == found["all"]
    assert "gives no distribution" in reliability(reading("plain", [0.0] * 16), labels)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_labels_that_say_too_little(tmp_path):
    with pytest.raises(DataError, match="no usable pair"):
        calibrate(write(tmp_path, [rated(g, 10, look=2) for g in range(9)]), ["redness"], out=tmp_path / "out")
    with pytest.raises(DataError, match=r"only 2 prompts have a pair.*intervals need 5"):
        calibrate(write(tmp_path, six_prompts()[:6]), ["redness"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rewards_that_do_not_fit_the_data(tmp_path):
    data = write(tmp_path, six_prompts())
    with pytest.raises(DataError, match=r"'tagged' reads 'tag' beside a prompt, and 18 of 18.*\"metadata\": {\"tag\""):
        calibrate(data, ["tagged"], out=tmp_path / "out")
    data = write(tmp_path, [{**row, "metadata": {"facts": []}} for row in six_prompts()])
    with pytest.raises(DataError, match=r"'pocket-oracle' fails on .*0-10.png \(prompt 'prompt 0'\).*no facts.*--skip"):
        calibrate(data, ["redness", "pocket-oracle"], out=tmp_path / "out")
    with pytest.raises(DataError, match=r"'pocket-oracle' scores none of the 18 pictures.*no facts"):
        calibrate(data, ["redness", "pocket-oracle"], out=tmp_path / "out", skip_failed=True)
    with pytest.raises(ImportError, match="rednes"):
        calibrate(data, ["rednes"], out=tmp_path / "out")
    with pytest.raises(RecipeError, match="'redness': key 'power' unknown in options, which takes no keys"):
        calibrate(data, ["redness:power=2"], out=tmp_path / "out")
    with pytest.raises(RecipeError, match="needs a reward"):
        calibrate(data, [], out=tmp_path / "out")


def test_a_reward_that_fails_on_one_picture_names_it_or_leaves_it_out_for_all(tmp_path):
    rows = six_prompts()
    rows.append(rated(0, 255, look=5))
    rows.append(rated(0, 0, look=2))
    data = write(tmp_path, rows)
    with pytest.raises(DataError, match=r"'fragile' fails on .*0-255.png .*ValueError: too red.*rewards test fragile"):
        calibrate(data, ["redness", "fragile"], out=tmp_path / "out")
    found = calibrate(data, ["redness", "fragile"], out=tmp_path / "out", skip_failed=True)
    failed = found.document["skipped"]["failed"]
    assert [(row["reward"], Path(row["image"]).name) for row in failed] == [("fragile", "0-255.png")]
    # 18 pairs, and the three of the added dark picture with its equals; none of the skipped one's, for either reward
    assert found.document["pairs"] == 21
    assert [r["pairs"] for r in found.document["rewards"].values()] == [21, 21]
    page = found.page.read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "default-src 'none'" in page
    # a picture that nobody can open is the picture's fault
    (tmp_path / "1-10.png").write_bytes(b"no picture")
    found = calibrate(data, ["redness"], out=tmp_path / "out", skip_failed=True)
    assert [row["reward"] for row in found.document["skipped"]["failed"]] == [None]


def test_lower_is_better_counts(tmp_path):
    rows = six_prompts()
    data = write(tmp_path, rows)
    for row in rows:
        good = int(row["scores"]["look"] * 40)
        Image.new("RGB", (8, 8), (0, 255 - good, 0)).save(tmp_path / row["image"])
    found = calibrate(data, ["greenless"], out=tmp_path / "out").document
    assert found["rewards"]["greenless"]["hpa"] == 1.0


def test_a_reward_over_http_beside_its_own_self(tmp_path, monkeypatch):
    with serving(load_reward("redness")) as served:
        monkeypatch.setenv("REWARDTUNE_TOKEN", TOKEN)
        data = write(tmp_path, six_prompts())
        found = calibrate(data, ["redness", f"remote:url={served.url}"], out=tmp_path / "out").document
    here, there = found["rewards"].values()
    assert there["name"] == "redness" and there["hpa"] == here["hpa"] == pytest.approx(5 / 6)
    assert found["between_rewards"]["spearman"]["redness"]["remote"] == pytest.approx(1.0)
    assert TOKEN not in (tmp_path / "out/calibration.json").read_text()


def test_a_reward_that_tells_nothing_apart_says_so(tmp_path):
    rows = [row for row in six_prompts() if row["group"] != "g5"]
    found = calibrate(write(tmp_path, rows), ["flat", "greenless", "redness"], out=tmp_path / "out").document
    assert found["rewards"]["flat"]["hpa"] == 0.0 and found["rewards"]["flat"]["tied"] == 1.0
    assert any("flat gives both pictures the same value in 100.0 %" in text for text in found["warnings"])
    assert found["between_rewards"]["spearman"]["flat"]["redness"] is None
    assert found["verdict"]["train"]["reward"] == "redness" and found["verdict"]["judge"]["reward"] is None


def test_options_may_be_json():
    assert parse_spec('zreward:{"checkpoint": "a,b=c"}') == ("zreward", {"checkpoint": "a,b=c"})
    with pytest.raises(RecipeError, match="not a JSON object"):
        parse_spec('zreward:{"checkpoint": }')


# -------------------------------------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def pocket(tmp_path_factory) -> Path:
    """Eight prompts of the pocket world, each rendered well, with a fault and misread, and rated by the panel."""
    from rewardtune.pocket import panel
    from rewardtune.pocket.faults import misread
    from rewardtune.pocket.scenes import place, render, sample_scene

    folder = tmp_path_factory.mktemp("pocket")
    rng = random.Random(0)
    rows = []
    for g in range(8):
        asked = place(sample_scene(rng, "heldout"), rng)
        wrong = misread(asked, rng)
        # one makes files smaller, the other larger
        spoilt, fault = panel.apply_fault(render(asked), ("blur", "grain")[g % 2], 0.8, rng)
        for k, (picture, drawn, faults) in enumerate(
            ((render(asked), asked, []), (spoilt, asked, [fault]), (render(wrong), wrong, []))
        ):
            picture.save(folder / f"{g}-{k}.png")
            annotations = panel.rate(panel.judge_recipe(asked, drawn, faults), rng)
            rows.append({"group": str(g), "prompt": asked.caption, "image": f"{g}-{k}.png",
                         "annotations": annotations, "metadata": {"facts": asked.facts()}})  # fmt: skip
    file = folder / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_real_rewards_on_a_small_labelled_set(pocket, tmp_path, capsys):
    words = ["rewards", "calibrate", "--data", str(pocket), "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as left:
        app([*words, *(w for name in ("zreward", "pocket-oracle", "jpeg-size") for w in ("--reward", name))])
    assert not left.value.code
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out/calibration.json").read_text())
    rewards = document["rewards"]
    assert list(rewards) == ["zreward", "pocket-oracle", "jpeg-size"] and document["prompts"] == 8
    # both know the world; the size of a file does not
    assert rewards["zreward"]["hpa"] > 0.7 and rewards["pocket-oracle"]["hpa"] > 0.7
    assert rewards["zreward"]["parts"]["alignment"]["alignment"]["hpa"] > 0.7
    assert rewards["jpeg-size"]["hpa"] < rewards["zreward"]["hpa"]
    assert document["verdict"]["train"]["reward"] == "zreward"
    assert document["verdict"]["judge"]["reward"] == "pocket-oracle"
    assert rewards["zreward"]["reliability"]["dimensions"] == ["alignment", "realism", "aesthetics", "plausibility"]
    assert rewards["jpeg-size"]["reliability"] == "gives no distribution"
    assert 0 < rewards["jpeg-size"]["cost"]["seconds_per_image"] < rewards["zreward"]["cost"]["seconds_per_image"]
    assert any("Only 8 prompts" in warning for warning in document["warnings"])
    page = (tmp_path / "out/calibration.html").read_text()
    assert "Train on zreward" in page and "http" not in page.replace("http-equiv", "")


def test_choices_alone_are_enough(pocket, tmp_path):
    rows = [json.loads(line) for line in pocket.read_text().splitlines()]
    pairs = [{"prompt": rows[i]["prompt"], "chosen": rows[i]["image"], "rejected": rows[i + 1]["image"],
              "metadata": rows[i]["metadata"]} for i in range(0, len(rows), 3)]  # fmt: skip
    file = pocket.parent / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    document = calibrate(file, ["zreward", "pocket-oracle"], out=tmp_path).document
    assert document["stated_pairs"] == document["pairs"] == 8 and document["dimensions"] == []
    found = document["rewards"]["zreward"]
    assert found["hpa"] > 0.8 and found["margin_hpa"] is None and found["plcc"] is None
    assert "choices only" in found["reliability"]
