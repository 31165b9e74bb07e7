"""compare.json, samples.csv and report.html from pictures on disk: figures, warnings, and text that must not run."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny_comparison as tiny
from PIL import Image

from rewardtune.compare.page import bars, render
from rewardtune.compare.report import headline, pairs_of, percent, signed
from rewardtune.compare.scores import samples_csv
from rewardtune.errors import DiskError
from rewardtune.pages.files import csv_cell, plain, write_bytes
from rewardtune.pages.html import number
from rewardtune.recipe.sections import DirectRewardRecipe

PAYLOADS = [
    "<script>document.documentElement.dataset.ran='1'</script>",
    "</script><script>document.documentElement.dataset.ran='2'</script>",
    '"><img src=x onerror="document.documentElement.dataset.ran=\'3\'">',
    "' onmouseover='document.documentElement.dataset.ran=4' autofocus onfocus='document.documentElement.dataset.ran=4",
    "<svg onload=document.documentElement.dataset.ran='5'>",
    "javascript:document.documentElement.dataset.ran='6'",
    "<iframe srcdoc=\"<script>parent.document.documentElement.dataset.ran='7'</script>\"></iframe>",
    "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "<!--<script>-->document.documentElement.dataset.ran='9'",
    "</title></style></textarea><body onload=document.documentElement.dataset.ran='10'>",
    '<meta http-equiv=refresh content="0;url=data:text/html,<script>1</script>"><base href=//evil.example/>',
    "a\u2028b\u202e<details open ontoggle=document.documentElement.dataset.ran='12'>\x1b[31m\x00\x9b31m",
]


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))


def build(folder: Path, *, judge: str | None = "oracle", **settings: Any) -> tuple[dict[str, Any], str]:
    world = tiny.make(folder, **settings)
    document = world.document(judge=judge)
    return document, render(folder, document, world.scored, world.plan)


def test_document_has_the_keys_that_scripts_read(tmp_path: Path) -> None:
    document, _ = build(tmp_path, prompts=6, seeds=2)
    assert document["sides"] == ["base", "tuned"]
    assert (document["prompts"], document["seeds"]) == (6, 2)
    (pair,) = document["pairs"]
    assert {"a", "b", "judge", "wins", "ties", "losses", "net", "net_ci95", "p_value"} <= pair.keys()
    assert (pair["a"], pair["b"], pair["judge"]) == ("tuned", "base", "oracle")
    assert pair["wins"] + pair["ties"] + pair["losses"] == 12
    assert pair["net"] == (pair["wins"] - pair["losses"]) / 12
    assert pair["net_ci95"][0] <= pair["net"] <= pair["net_ci95"][1]
    assert set(pair["parts"]) == {"facts", "cleanliness"}, "a part that says nothing has no net"
    assert document["rewards"]["tuned"]["student"].keys() >= {"mean", "ci95"}
    assert set(document["diversity"]) == {"base", "tuned"}
    assert all(isinstance(value, float) for value in document["diversity"].values())
    json.dumps(document, allow_nan=False)


def test_figures_by_hand(tmp_path: Path) -> None:
    def rewards(count: int, names: list[str]) -> list[Any]:
        # differences tuned - base: +0.10, +0.01 (a tie within 0.02), -0.30, +0.20
        return [tiny.scalar("oracle", {"base": [0.5, 0.5, 0.5, 0.5], "tuned": [0.6, 0.51, 0.2, 0.7]})]

    document, html = build(tmp_path, prompts=2, seeds=2, rewards=rewards)
    (pair,) = document["pairs"]
    assert (pair["wins"], pair["ties"], pair["losses"], pair["net"]) == (2, 1, 1, 0.25)
    assert document["rewards"]["tuned"]["oracle"]["mean"] == pytest.approx(0.5025)
    assert document["rewards"]["tuned"]["oracle"]["delta"] == pytest.approx(0.0025)
    # prompt 0 has net (1 + 0) / 2, prompt 1 (-1 + 1) / 2: resampled nets are 0, 1/4, 1/2
    assert pair["net_ci95"] == [0.0, 0.5]
    assert "No clear difference" in document["headline"]
    assert "+25.0 %" in html


def test_lower_is_better_turns_the_verdict(tmp_path: Path) -> None:
    def rewards(count: int, names: list[str]) -> list[Any]:
        reward = tiny.scalar("oracle", {"base": [0.9] * count, "tuned": [0.1] * count})
        reward.card["higher_is_better"] = False
        return [reward]

    document, html = build(tmp_path, rewards=rewards)
    assert document["pairs"][0]["net"] == 1.0
    assert "tuned is better than base." in html
    assert "▲ -0.800" in html


def test_what_rounds_to_zero_has_no_sign(tmp_path: Path) -> None:
    def rewards(count: int, names: list[str]) -> list[Any]:
        # the last image alone differs, by less than is shown
        rest = [0.0] * (count - 1)
        return [tiny.scalar("oracle", {"base": [*rest, 0.0], "tuned": [*rest, -0.0004]})]

    _, html = build(tmp_path, rewards=rewards)
    assert "≈ 0.000" in html and ">tie 0.000<" in html, "the difference, and its verdict on an image"
    shown = " ".join(text for where, text in Page(html).texts if where not in ("script", "style"))
    assert not re.search(r"[-+]0\.0+(?!\d)", shown)
    assert (signed(-0.0004), signed(0.0), signed(-0.0006), signed(0.5)) == ("0.000", "0.000", "-0.001", "+0.500")
    assert (percent(-0.0004), number(-0.0004), number(-0.2)) == ("0.0 %", "0.000", "-0.200")


def test_the_reference_is_base_wherever_it_stands(tmp_path: Path) -> None:
    document, _ = build(tmp_path, names=("tuned", "base", "longer"))
    assert document["reference"] == "base"
    assert [(p["a"], p["b"]) for p in document["pairs"]] == [("tuned", "base"), ("longer", "base"), ("longer", "tuned")]
    assert pairs_of(["x", "y"], "x") == [("y", "x")]


def test_warns_when_the_trained_reward_rises_and_a_held_out_one_falls(tmp_path: Path) -> None:
    def rewards(count: int, names: list[str]) -> list[Any]:
        return [
            tiny.scalar("oracle", {"base": [0.7] * count, "tuned": [0.5] * count}),
            tiny.distributional("student", {"base": [3.0] * count, "tuned": [4.0] * count}),
        ]

    document, html = build(tmp_path, rewards=rewards)
    assert any("reward exploitation" in w and "student rose" in w and "oracle" in w for w in document["warnings"])
    assert "reward exploitation" in html


def test_warns_about_collapse_judge_and_sample(tmp_path: Path) -> None:
    world = tiny.make(tmp_path, prompts=["same", "same", "other"], seeds=2, known=False)
    for file in (tmp_path / "images" / "tuned").iterdir():
        tiny.picture(0, 0, 1).save(file)
    warnings = " ".join(world.document(judge="student")["warnings"])
    assert "0% of the diversity of base" in warnings
    assert "The judge student is a reward that a side was trained on" in warnings
    assert "Only 2 different prompts" in warnings
    assert "1 prompts are repeats" in warnings
    assert "not known which rewards base and tuned was trained on" in warnings


def test_warns_when_one_part_of_the_judge_carries_the_win(tmp_path: Path) -> None:
    def rewards(count: int, names: list[str]) -> list[Any]:
        facts = {"base": [0.8] * count, "tuned": [0.8] * count}
        return [tiny.oracle(facts, {"base": [0.2] * count, "tuned": [0.9] * count})]

    document, html = build(tmp_path, prompts=60, seeds=1, rewards=rewards)
    assert document["pairs"][0]["net"] == 1.0
    assert any("not clearly on its part facts" in w for w in document["warnings"])
    assert "On facts alone the net is <b>0.0 %</b>" in html
    assert "On facts alone 0.0 %" in headline(document)


def test_without_a_judge_there_is_a_page_and_no_verdict(tmp_path: Path) -> None:
    document, html = build(tmp_path, judge=None, rewards=lambda count, names: [])
    assert document["pairs"] == [] and document["judge"] is None
    assert "No judge" in document["warnings"][0]
    assert html.count("<article") == 12


def test_one_seed_has_no_diversity_within(tmp_path: Path) -> None:
    document, _ = build(tmp_path, seeds=1)
    assert document["diversity_details"]["tuned"]["within"] is None
    assert any("One seed a prompt" in w for w in document["warnings"])


def test_page_is_one_file_with_one_style_and_one_script_named_by_hash(tmp_path: Path) -> None:
    _, html = build(tmp_path, prompts=PAYLOADS, seeds=1)
    page = Page(html)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [attributes.get("type") for attributes in scripts] == ["application/json", None]
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy and "http" not in policy
    for tag in ("script", "style"):
        text = next(text for where, text in page.texts if where == tag and not text.startswith("{"))
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("src", "href", "action", "srcdoc"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value[:60])
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "base", "object", "embed", "link")]


def test_prompts_come_through_as_text(tmp_path: Path) -> None:
    _, html = build(tmp_path, prompts=PAYLOADS, seeds=1)
    page = Page(html)
    shown = [text for where, text in page.texts if where == "h3"]
    assert shown == [plain(payload) for payload in PAYLOADS]
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u202e]", html)


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(_chromium() is None, reason="needs a Chromium browser")
def test_no_payload_runs_in_a_browser(tmp_path: Path) -> None:
    _, html = build(tmp_path, prompts=PAYLOADS, seeds=1, names=("base", "tuned<script>x"[:5]))
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    # the same page with the policy taken out: escaping alone must hold too
    weak = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    assert weak != html
    (tmp_path / "weak.html").write_text(weak, encoding="utf-8")
    for name in ("report.html", "weak.html"):
        done = subprocess.run(
            [str(_chromium()), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=2000", "--dump-dom", (tmp_path / name).as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert "data-ran" not in re.sub(r"<h3>.*?</h3>|alt=\"[^\"]*\"", "", done.stdout, flags=re.S)
        assert re.search(r"<html[^>]*>", done.stdout).group() == '<html lang="en">'  # type: ignore[union-attr]
        assert "12 of 12" in done.stdout, "the page's own script ran"


def test_rows_carry_what_the_script_filters_and_sorts_by(tmp_path: Path) -> None:
    document, html = build(tmp_path, names=("base", "tuned", "longer"), prompts=3, seeds=2)
    rows = [attributes for tag, attributes in Page(html).tags if tag == "article"]
    assert [(r["data-prompt"], r["data-seed"]) for r in rows] == [(str(p), str(k)) for p in range(3) for k in range(2)]
    for j, pair in enumerate(document["pairs"]):
        verdicts = [(r["data-verdicts"] or "").split()[j] for r in rows]
        assert verdicts.count("win") == pair["wins"] and verdicts.count("loss") == pair["losses"]
        for row, verdict in zip(rows, verdicts, strict=True):
            margin = float((row["data-margins"] or "").split()[j])
            assert verdict == ("win" if margin > 0.02 else "loss" if margin < -0.02 else "tie")


def test_small_pictures_are_exact_and_large_ones_scaled(tmp_path: Path) -> None:
    def sources(folder: Path, size: int) -> list[Image.Image]:
        _, html = build(folder, prompts=1, seeds=2, size=size)
        found = [a["src"] for tag, a in Page(html).tags if tag == "img" and a.get("src")]
        return [Image.open(io.BytesIO(base64.b64decode(str(source).split(",")[1]))) for source in found]

    small = sources(tmp_path / "small", 32)
    assert len(small) == 4
    original = Image.open(tmp_path / "small" / "images" / "base" / "0000-0.png")
    assert small[0].convert("RGB").tobytes() == original.tobytes()
    assert [image.size for image in sources(tmp_path / "large", 1024)] == [(768, 768)] * 4


def test_distributions_are_drawn_to_scale() -> None:
    path = bars([0.0, 0.25, 1.0], height=16)
    assert path == "M0 16v-0.5h4V16zM5 16v-8h4V16zM10 16v-16h4V16z"


def test_a_page_of_five_hundred_images_stays_small(tmp_path: Path) -> None:
    _, html = build(tmp_path, prompts=125, seeds=2)
    assert html.count("<figure") == 500
    assert len(html) < 2_500_000


def test_csv_has_a_row_an_image_and_no_formulas(tmp_path: Path) -> None:
    prompts = ["=cmd|' /C calc'!A0", "+1", "-1", "@x", "  =1", "fine, with a comma"]
    world = tiny.make(tmp_path, prompts=prompts, seeds=2)
    rows = list(csv.DictReader(io.StringIO(samples_csv(["base", "tuned"], world.plan, world.scored))))
    assert len(rows) == 24
    assert [row["prompt"] for row in rows[:12:2]] == [f"'{p}" for p in prompts[:4]] + ["'  =1", "fine, with a comma"]
    assert float(rows[3]["oracle"]) == world.scored[0].images["base"][3].value
    assert float(rows[3]["student/realism"]) == world.scored[1].images["base"][3].dimensions["realism"]
    assert rows[3]["oracle/facts/size"] == "", "a part that says nothing is an empty cell"
    assert rows[13]["image"] == "images/tuned/0000-1.png"
    assert csv_cell("plain") == "plain"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_bytes(target, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskError, match=r"report\.html: cannot be written"):
            write_bytes(target, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert target.read_bytes() == b"old"


def test_text_for_a_terminal_holds_no_controls() -> None:
    assert plain("a\x1b[31mb\x07\x9bc\nd\te\u202ef\u2028g") == "a[31mbc d efg"


def guarded(folder: Path, world: tiny.Comparison, values: Sequence[float], *, exported: int, **limits: Any) -> None:
    """Make the second side a run whose guard, with these limits, saw these means of two images' scores."""
    run = folder / "run"
    (run / "guard").mkdir(parents=True)
    looks = [
        {"step": 10 * i, "values": {"oracle": [v - 1, v + 1]}, "diversity": 2.0 - 0.1 * i, "drift": 0.1 * i,
         "trained": float(i)}
        for i, v in enumerate(values)
    ]  # fmt: skip
    (run / "guard" / "looks.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    outcome = {"exported_step": exported, "reasons": ["the held-out score <b>fell</b>"]}
    (run / "finished.json").write_text(json.dumps({"guard": outcome}))
    recipe = {
        "task": "direct_reward", "pipeline": {"model": "pocket:pipeline"}, "data": {"prompts": "pocket:prompts/train"},
        "rewards": [{"name": "zreward"}], "gradient": {"method": "refl"},
        "lora": {"rank": 2}, "train": {"steps": 1},
        "guard": {"prompts": "pocket:prompts/validation", "seeds": 1, "rewards": [{"name": "oracle"}],
                  **limits},
    }  # fmt: skip
    made = DirectRewardRecipe.model_validate(recipe)
    world.sides[1] = replace(world.sides[1], recipe=made, run=run)


def test_the_page_draws_what_the_guard_saw(tmp_path: Path) -> None:
    world = tiny.make(tmp_path / "report")
    assert world.document()["guards"] == {}
    guarded(tmp_path, world, [5.0, 7.0, 6.0], exported=10)
    document = world.document()
    curve = document["guards"]["tuned"]
    assert [look["step"] for look in curve["looks"]] == [0, 10, 20]
    # gains of 0, 2 and 1 over the standard deviation of 4 and 6, which is 1
    assert [look["score"] for look in curve["looks"]] == pytest.approx([0.0, 2.0, 1.0])
    assert [look["diversity"] for look in curve["looks"]] == pytest.approx([1.0, 0.95, 0.9])
    assert curve["exported_step"] == 10
    html = render(world.folder, document, world.scored, world.plan)
    assert html.count('class="curve"') == 4 and "&lt;b&gt;fell" in html
    score = html[html.index("held-out score from") :]
    # the best look is at the top of the frame, in its middle, and it is the one that was exported
    assert 'points="8.0,82.0 120.0,8.0 232.0,45.0 "' in score and 'class="chosen" cx="120.0" cy="8.0"' in score


def test_what_a_guard_limits_is_drawn_with_its_limit(tmp_path: Path) -> None:
    world = tiny.make(tmp_path / "report")
    guarded(tmp_path, world, [5.0, 7.0, 6.0], exported=10, min_diversity=0.5, max_drift=0.1)
    document = world.document()
    seen = document["guards"]["tuned"]
    assert (seen["min_diversity"], seen["max_drift"]) == (0.5, 0.1)
    html = render(world.folder, document, world.scored, world.plan)
    assert html.count('class="limit"') == 2 and "tuned: a guard looked 3 times" in html
    diversity, drift = (html[html.index(f'aria-label="{title}') :] for title in ("diversity, of", "drift from"))
    # diversity falls from 1 to 0.9 in a frame that goes down to the limit: 74 units for 0.5
    assert 'points="8.0,8.0 120.0,15.4 232.0,22.8 "' in diversity
    assert diversity.index('class="limit" d="M2 82.0H238"') < diversity.index(">min_diversity 0.500</text>")
    # drift rises from 0 to 0.2, twice its limit
    assert 'points="8.0,82.0 120.0,45.0 232.0,8.0 "' in drift
    assert 'class="limit" d="M2 45.0H238"' in drift and ">max_drift 0.100</text>" in drift
    # as of a report that was written before limits were kept, into which votes are merged
    for key in ("min_diversity", "max_drift"):
        del seen[key]
    html = render(world.folder, document, world.scored, world.plan)
    assert html.count('class="limit"') == 0 and html.count('class="curve"') == 4
