"""Rewards x contract: every reward of the table with its real classes and small random weights. Writes docs/rewards.md.

`python -m pytest tests/rewards/test_rewards.py --write-pages` renews the page.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backend import Backend, backends, prompt_file
from reference_numbers import uniform
from rewardtune.rewards import TABLE

import rewardtune
from rewardtune import registry
from rewardtune.errors import RecipeError
from rewardtune.plugins import RewardCard
from rewardtune.scoring.checks import SLOPE, Check, check_loaded
from rewardtune.scoring.reward_set import load_reward
from rewardtune.training.track import read_metrics

PAGE = Path(__file__).parents[2] / "docs/rewards.md"
HEAD = Path(__file__).with_name("rewards_head.md")
BACKENDS = backends()
RESULTS: dict[str, list[Check]] = {}
TINY = {
    "data.prompts": "pocket:prompts/train", "rollout.steps": 1, "gradient.last_steps": 1, "lora.rank": 2,
    "train.steps": 1, "train.batch_size": 2, "train.device": "cpu", "checkpoint.every": 1, "samples.prompts": [],
    "guard": None,
}  # fmt: skip


@pytest.fixture(params=BACKENDS)
def name(request):
    return request.param


@pytest.fixture
def backend(name) -> Backend:
    return BACKENDS[name]


def test_every_reward_of_the_table_is_tested():
    assert {backend.name for backend in BACKENDS.values()} == set(TABLE)


def test_it_keeps_the_contract(name, backend, made):
    prompts = backend.prompts() if backend.prompts else None
    images = backend.images() if backend.images else None
    checks = check_loaded(backend.name, made(name), prompts=prompts, images=images)
    failed = [f"{check.name}: {check.found}" for check in checks if not check.passed]
    assert not failed, "\n".join(failed)
    RESULTS[name] = checks


def test_its_options_are_told_and_its_card_is_whole(name, backend):
    plugin = registry.rewards.load_class(backend.name)
    assert plugin.card.name == backend.name
    assert plugin.card.summary and plugin.card.licence_code and plugin.card.licence_weights
    for option, field in plugin.Config.model_fields.items():
        assert field.description, f"{option} has no docstring"


def test_rounding_reads_what_a_file_would_hold(name, backend, made):
    """Where the reference sees bytes: at any size, and what is resized is rounded again. The gradient passes."""
    if "rounding" not in registry.rewards.load_class(backend.name).Config.model_fields:
        pytest.skip("no such option")
    options = made(name)
    plain, rounded = load_reward(backend.name, **options), load_reward(backend.name, **options, rounding=True)
    side = 2 * (plain.card.native_resolution or 32)
    images = uniform("images", (2, 3, side, side)).requires_grad_(True)
    prompts = (backend.prompts() if backend.prompts else ["a red fox", "two dogs"])[:2]
    values = [reward.score(images, prompts).value for reward in (plain, rounded)]
    assert not torch.equal(*values) and torch.allclose(*values, atol=0.02 * plain.card.scale)
    smooth, straight = (torch.autograd.grad(value.sum(), images)[0] for value in values)
    assert torch.cosine_similarity(smooth.flatten(), straight.flatten(), dim=0) > 0.9


def test_one_line_of_the_demo_recipe_trains_on_it(name, backend, made, tmp_path):
    """In place of the demo's own reward; or a refusal that says why and what to do instead."""
    given = dict(TINY)
    if backend.prompts:
        given["data.prompts"] = str(prompt_file(backend.prompts(), tmp_path))
    given["rewards"] = [{"name": backend.name, "options": made(name)}]
    if not registry.rewards.card(backend.name).differentiable:
        with pytest.raises(RecipeError, match=r"returns no gradient(.|\n)*compare\.rewards"):
            rewardtune.train("pocket/zreward", overrides=given, out=tmp_path / "run")
        return
    run = rewardtune.train("pocket/zreward", overrides=given, out=tmp_path / "run")
    (line,) = read_metrics(run / "metrics.jsonl")
    assert line["skipped"] == 0 and line["grad_norm"] > 0
    assert f"reward/{backend.logged or backend.name}" in line


def test_the_page_shows_these_results(request):
    """docs/rewards.md is what the cards say and what this run found."""
    if set(RESULTS) != set(BACKENDS):
        pytest.skip("not every reward was checked and passed")
    names = sorted(BACKENDS, key=lambda name: list(TABLE).index(BACKENDS[name].name))
    cards = {name: registry.rewards.card(BACKENDS[name].name) for name in names}
    text = HEAD.read_text()
    for title, columns in (("What each one is", IS), ("Models and licences", LICENCES)):
        text += f"\n## {title}\n\n" + table(["reward", *columns], [
            [f"`{shown(name)}`", *(cell(cards[name]) for cell in columns.values())] for name in names
        ])  # fmt: skip
    rows = [[f"`{shown(name)}`", *measured(RESULTS[name])] for name in names]
    text += f"\n## What the contract checks found\n\n{FOUND}\n\n" + table(["reward", *COLUMNS], rows)
    if request.config.getoption("--write-pages"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, "run with --write-pages and commit docs/rewards.md"


def shown(name: str) -> str:
    return BACKENDS[name].name if [BACKENDS[n].name for n in BACKENDS].count(BACKENDS[name].name) == 1 else name


def table(header: list[str], rows: list[list[str]]) -> str:
    assert all(cell.strip() for row in rows for cell in row), "an empty cell"
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, ["---"] * len(header), *escaped])


def _reads(card: RewardCard) -> str:
    needs = ["prompt"] if card.needs_prompt else []
    return " and ".join([*needs, *(f"`{key}`" for key in card.metadata)]) or "picture alone"


def _range(card: RewardCard) -> str:
    span = "unbounded" if card.range is None else f"{card.range[0]:g} to {card.range[1]:g}"
    return span + ("" if card.higher_is_better else ", lower is better")


IS = {
    "what it says": lambda card: card.summary,
    "trained on": lambda card: "a held-out judge" if card.held_out else "yes" if card.differentiable else "no gradient",
    "reads": _reads,
    "values": _range,
    "scale": lambda card: f"{card.scale:g}",
    "dimensions": lambda card: ", ".join(card.dimensions) or "one value",
    "sees": lambda card: (
        f"{card.native_resolution} x {card.native_resolution}" if card.native_resolution else "any size"
    ),
    "GPU memory": lambda card: f"{card.gpu_memory_gib:g} GiB" if card.gpu_memory_gib else "next to none",
    "needs": lambda card: f"`pip install 'rewardtune[{card.extra}]'`" if card.extra else "the base install",
}
LICENCES = {
    "models and versions": lambda card: ", ".join(f"{m} ({r[:7]})" for m, r in dict(card.models).items()) or "no model",
    "licence of the code": lambda card: card.licence_code,
    "of the weights": lambda card: card.licence_weights,
    "commercial use": lambda card: "allowed" if card.commercial_use else "**forbidden**",
    "source": lambda card: card.reference or "this repository",
}
COLUMNS = ["checks passed", "difference to Pillow, of the scale", "gradient", "weights in bfloat16"]
FOUND = f"""With small random weights of the real classes, loaded from files in the published layout, on a CPU;
`rewardtune rewards test NAME` runs the same with the real ones. *Difference to Pillow*: of the value, between float
pixels resized here and a file's bytes resized by Pillow. *Gradient*: not zero for each image, exactly zero across
images, and within {SLOPE:.0%} of finite differences."""


def measured(checks: list[Check]) -> list[str]:
    by_name = {check.name: check for check in checks}
    pillow = by_name["agrees with Pillow"].measured
    assert pillow is not None
    return [
        f"{sum(check.passed for check in checks)} of {len(checks)}",
        f"below {ladder(pillow)}",
        "all three hold" if "gradient equals finite differences" in by_name else "none, as the card says",
        "finite" if "weights in bfloat16" in by_name else "no such option",
    ]


def ladder(value: float) -> str:
    """The next of 1, 2 and 5 in its decade, so that the page is the same on every machine."""
    steps = [f"{digit}e-{decade}" for decade in range(7, 0, -1) for digit in (1, 2, 5)] + ["1"]
    return f"{float(next(step for step in steps if value < float(step))):g}" if value < 1 else "any"
