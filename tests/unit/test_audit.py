"""`rewardtune audit`: cosines and norms against the exact gradient, live memory, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from torch.utils.checkpoint import checkpoint

from rewardtune import registry
from rewardtune.audit import audit, compare, default_methods
from rewardtune.errors import RecipeError
from rewardtune.gradients import METHODS
from rewardtune.recipe.file import load_recipe
from rewardtune.training.live_bytes import peak_live_bytes


def test_live_bytes_are_those_of_tensors_that_live_together():
    x, size = torch.randn(1000), 4000

    def chain():
        a = x + 1
        b = a + 1
        del a
        c = b + 1
        b[:10].add_(0), c.view(10, 100).add_(0)  # views own nothing

    assert peak_live_bytes(chain) == 2 * size
    weight = torch.randn(1000, requires_grad=True)

    def block(h):
        for _ in range(8):
            h = torch.tanh(h * weight)
        return h

    def run(recompute):
        h = x
        for _ in range(6):
            h = checkpoint(block, h, use_reentrant=False) if recompute else block(h)
        h.sum().backward()
        weight.grad = None

    kept, again = peak_live_bytes(lambda: run(False)), peak_live_bytes(lambda: run(True))
    assert kept >= 48 * size and again <= 20 * size


def test_cosines_and_norms_are_those_of_the_mean_gradients():
    exact = [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])]
    found = compare([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])], exact)
    assert found["cosine"] == pytest.approx(math.sqrt(0.5))
    assert found["norm_ratio"] == pytest.approx(0.5 / math.sqrt(2))
    assert math.isnan(found["batch_cosine"])
    assert compare(exact, exact) == pytest.approx({"cosine": 1.0, "batch_cosine": 1.0, "norm_ratio": 1.0})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    registry.load_plugin(str(Path(__file__).with_name("redness.py")))
    root = tmp_path_factory.mktemp("audit")
    tiny.z_image().save_pretrained(root / "pipeline")
    (root / "prompts.txt").write_text("a dog\nred cat\ntwo birds\n")
    document = {
        "task": "direct_reward", "pipeline": {"model": str(root / "pipeline")}, "lora": {"rank": 2},
        "data": {"prompts": str(root / "prompts.txt")}, "rollout": {"steps": 5, "guidance_scale": 2.0},
        "gradient": {"method": "draft"}, "rewards": [{"name": "redness"}],
        "regularise": {"velocity": 1.0}, "train": {"steps": 1, "batch_size": 2, "device": "cpu"},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(document))
    return root / "recipe.yaml"


@pytest.fixture(scope="module")
def document(recipe):
    loaded = load_recipe(str(recipe))
    # guidance through the positive branch only: the exact gradient is of the same policy
    return audit(loaded.recipe, batches=2, device="cpu")


def test_every_method_is_held_against_the_exact_gradient(document):
    rows = {(row["method"], row["precision"]): row for row in document["rows"]}
    assert {spec.partition(":")[0] for spec, _ in rows} == set(METHODS)
    for memory in ("fast", "flat"):
        row = rows[f"draft:last_steps=all,memory={memory}", "fp32"]
        assert row["cosine"] == pytest.approx(1, abs=1e-4) and row["norm_ratio"] == pytest.approx(1, abs=1e-3)
    cosines = [rows[f"draft:last_steps={k}", "fp32"]["cosine"] for k in (1, 2, 4)]
    assert all(c < 0.9999 for c in cosines[:2]) and cosines[0] < cosines[2]
    rounded = rows["draft:last_steps=all,memory=flat", "bf16"]
    assert 0.9 < rounded["cosine"] < 1
    assert all(row["seconds"] > 0 for row in rows.values())


def test_flat_memory_does_not_grow_with_the_steps(document):
    """settled: peak live bytes of the full chain at most 1.2 times those of one step."""
    peak = {row["method"]: row["peak_live_bytes"] for row in document["rows"] if row["precision"] == "fp32"}
    one, flat, fast = (peak[f"draft:last_steps={k}"] for k in ("1", "all,memory=flat", "all,memory=fast"))
    assert flat <= 1.2 * one
    assert fast > 1.2 * flat


def test_the_command_prints_a_table_or_json(recipe, capsys, monkeypatch):
    from rewardtune.cli.app import main

    def run(*more):
        words = ["audit", str(recipe), "--batches", "1", "--methods", "draft:last_steps=1,refl", *more]
        monkeypatch.setattr(sys, "argv", ["rewardtune", *words])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, capsys.readouterr()

    code, said = run("--json")
    assert code == 0
    assert [row["method"] for row in json.loads(said.out)["rows"][::2]] == ["draft:last_steps=1", "refl"]
    code, said = run()
    assert code == 0 and "norm ratio" in said.out


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("draff", r"no method 'draff' \(there are refl, draft, .*; did you mean 'draft'\?$"),
        ("draft:steps=2", r"^--methods draft:steps=2: key 'steps' unknown in options; did you mean 'last_steps'\?$"),
        ("draft:last_steps=x", "options.last_steps is the text 'x'; expected a whole number or 'all'.$"),
        ("draft:last_steps=9", "needs 9 steps"),
    ],
)
def test_methods_that_do_not_fit_are_refused(recipe, spec, words):
    with pytest.raises(RecipeError, match=words):
        audit(load_recipe(str(recipe)).recipe, methods=[spec], device="cpu")


def test_the_usual_methods_fit_the_rollout():
    assert default_methods(1) == ["draft:last_steps=all,memory=fast", "draft:last_steps=all,memory=flat",
                                  "refl", "refl:earliest=0", "draft_lv", "alignprop"]  # fmt: skip
