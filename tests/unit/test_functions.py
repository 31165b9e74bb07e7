"""Rewards from plain functions: what the card says, what is called with what, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rewardtune import load_reward, register_reward_function, registry
from rewardtune.errors import NonFiniteError, PluginError
from rewardtune.scoring.checked import NoGraph
from rewardtune.scoring.checks import check_reward

IMAGES = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.6)])
PROMPTS = ["a fox", "a key"]


@pytest.fixture
def made():
    """Registers functions under names of their own, and forgets them."""
    names = []

    def make(function, **card):
        names.append(f"function-{len(names)}")
        returned = register_reward_function(names[-1], **card)(function)
        assert returned is function
        return names[-1]

    yield make
    for name in names:
        del registry.rewards._decorated[name]


@pytest.mark.parametrize(
    "answer",
    [
        lambda images, prompts: images.mean((1, 2, 3)),
        lambda images, prompts: images.mean((1, 2, 3)).double().numpy(),
        lambda images, prompts: [float(image.mean()) for image in images],
        lambda images, prompts: tuple(np.float64(image.mean()) for image in images),
    ],
)
def test_a_number_an_image_however_it_comes(made, answer):
    score = load_reward(made(answer)).score(IMAGES, PROMPTS)
    assert score.value.dtype == torch.float32
    assert score.value.tolist() == pytest.approx([0.2, 0.6])


def test_without_a_word_it_has_no_gradient_and_sees_none(made):
    seen = []

    def bright(images, prompts):
        """How bright it is.

        More that no card needs.
        """
        seen.append((images.requires_grad, torch.is_grad_enabled(), prompts))
        return images.mean((1, 2, 3))

    name = made(bright)
    card = registry.rewards.card(name)
    assert (card.summary, card.differentiable, card.needs_prompt, card.range) == (
        "How bright it is.",
        False,
        True,
        None,
    )
    value = load_reward(name).score(IMAGES.clone().requires_grad_(), PROMPTS).value
    assert seen == [(False, False, PROMPTS)] and not value.requires_grad
    assert registry.rewards.source(name) == __file__


def test_with_gradient_it_keeps_the_whole_contract(made):
    name = made(lambda images, prompts: images.square().mean((1, 2, 3)), differentiable=True, needs_prompt=False,
                range=(0.0, 1.0), licence_code="MIT")  # fmt: skip
    checks = check_reward(load_reward(name))
    assert [check.found for check in checks if not check.passed] == []
    assert "gradient equals finite differences" in [check.name for check in checks]
    assert registry.rewards.card(name).licence_code == "MIT"
    assert registry.rewards.card(made(lambda images, prompts: [0.0])).licence_code == "not stated"


def test_a_function_that_cuts_the_gradient_fails_the_checks(made):
    name = made(lambda images, prompts: images.detach().mean((1, 2, 3)), differentiable=True, needs_prompt=False)
    failed = [check.name for check in check_reward(load_reward(name)) if not check.passed]
    assert "gradient reaches every image" in failed
    assert load_reward(name).score(IMAGES, PROMPTS).value.shape == (2,)
    with pytest.raises(NoGraph, match=rf"reward '{name}': no gradient can be taken.*detach"):
        load_reward(name).score(IMAGES.clone().requires_grad_(), PROMPTS)


def test_any_callable_will_do(made):
    class Judge:
        def __init__(self, bias):
            self.bias = bias

        def __call__(self, images, prompts):
            return [len(prompt) + self.bias for prompt in prompts]

        def ask(self, images, prompts):
            return self(images, prompts)

    for callable_ in (Judge(1), Judge(1).ask):
        assert load_reward(made(callable_)).score(IMAGES, PROMPTS).value.tolist() == [6.0, 6.0]


@pytest.mark.parametrize(
    ("answer", "card", "said"),
    [
        (lambda i, p: [0.1], {}, r"must return 2 numbers, one an image; it returned the shape \(1,\)"),
        (lambda i, p: 0.5, {}, r"returned the shape \(\)"),
        (lambda i, p: i, {}, r"returned the shape \(2, 3, 4, 4\)"),
        (lambda i, p: None, {}, r"returned 'None' \(NoneType\)"),
        (lambda i, p: ["good", "bad"], {}, r"returned \"\['good', 'bad'\]\" \(list\)"),
        (lambda i, p: [0.1, float("nan")], {}, r"not finite for image\(s\) \[1\]"),
        (lambda i, p: [0.1, 0.2], {"differentiable": True}, "as a tensor with graph since it is registered as differ"),
    ],
)
def test_anything_else_is_no_number_and_never_becomes_one(made, answer, card, said):
    name = made(answer, **card)
    # the wrong kind of answer is the function's mistake at every step, a missing number this step's
    error = NonFiniteError if "not finite" in said else PluginError
    with pytest.raises(error, match=rf"reward '{name}'.*{said}"):
        load_reward(name).score(IMAGES, PROMPTS)


def test_a_card_has_no_field_of_that_name():
    with pytest.raises(PluginError, match=r"'mine'.*a card has no licence; its fields"):
        register_reward_function("mine", licence="MIT")
    assert registry.rewards.registrations("mine") == []


def test_two_functions_of_one_name_clash_as_classes_do(made):
    name = made(lambda i, p: [0.0, 0.0])
    register_reward_function(name)(lambda i, p: [1.0, 1.0])
    with pytest.raises(PluginError, match="claimed more than once"):
        registry.rewards.load_class(name)
    register_reward_function("zreward")(lambda i, p: [1.0, 1.0])
    try:
        with pytest.raises(PluginError, match="claimed more than once"):
            registry.rewards.load_class("zreward")
    finally:
        del registry.rewards._decorated["zreward"]


def test_the_commands_take_it_as_any_other(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import rewardtune as rt\n\n\n"
        "@rt.register_reward_function('words-and-light', higher_is_better=False)\n"
        "def judge(images, prompts):\n"
        "    'Length of the prompt, and the light.'\n"
        "    return [len(p) + float(i.mean()) for i, p in zip(images, prompts)]\n"
    )
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8), "white").save(tmp_path / "pictures/a.png")
    Image.new("RGB", (9, 8), "black").save(tmp_path / "pictures/b.png")
    (tmp_path / "prompts.txt").write_text("a fox\nthe key\n")
    recipe = (
        "task: direct_reward\npipeline: {model: pocket:pipeline}\nlora: {}\ndata: {prompts: prompts.txt}\n"
        "gradient: {method: refl}\nrewards: [{name: REWARD}]\ntrain: {steps: 1}\n"
        "compare: {prompts: prompts.txt, rewards: [{name: words-and-light}]}\n"
        "guard: {prompts: prompts.txt, rewards: [{name: words-and-light}]}\n"
    )
    (tmp_path / "judged.yaml").write_text(recipe.replace("REWARD", "zreward"))
    (tmp_path / "trained.yaml").write_text(recipe.replace("REWARD", "words-and-light"))

    def run(*words, code=0):
        command = [sys.executable, "-m", "rewardtune", *words, "--plugin", "mine.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    (row,) = (row for row in json.loads(run("rewards", "list", "--json")) if row["name"] == "words-and-light")
    assert row["source"] == str(tmp_path / "mine.py") and row["available"] is True
    assert (row["differentiable"], row["needs_prompt"], row["higher_is_better"]) == (False, True, False)
    assert "FAIL" not in run("rewards", "test", "words-and-light")
    scored = json.loads(run("score", "--reward", "words-and-light", "--images", "pictures", "--prompts", "prompts.txt",
                            "--json"))  # fmt: skip
    assert [line["value"] for line in scored["rows"]] == [6.0, 7.0]
    run("validate", "judged.yaml")
    assert "'words-and-light' returns no gradient" in run("validate", "trained.yaml", code=2)
