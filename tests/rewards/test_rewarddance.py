"""`rewarddance`: what the pairwise task trains is asked again, once a dimension, each picture seen once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference_numbers import uniform
from tiny_scorer import NAMES, write_comparer, write_scorer

from rewardtune.data.images import read_tensors, to_pil
from rewardtune.errors import DataError, RecipeError
from rewardtune.scorer.comparison import Comparer, load_comparer
from rewardtune.scorer.export import export_scorer
from rewardtune.scorer.model import load_scorer
from rewardtune.scoring.reward_set import load_reward
from rewardtune.types import Prompt


@pytest.fixture(scope="module")
def comparer(tmp_path_factory: pytest.TempPathFactory) -> Comparer:
    folder = write_comparer(tmp_path_factory.mktemp("scorer"), layers=["linear_attention", "full_attention"])
    return load_comparer(load_scorer(folder))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("references")
    files = [folder / "square.png", folder / "wide.png"]
    for file, size in zip(files, ((16, 16), (8, 32)), strict=True):
        to_pil(uniform(file.name, (1, 3, *size)))[0].save(file)
    return files


@pytest.fixture(scope="module")
def export(comparer: Comparer, references: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the task writes at its end."""
    folder = tmp_path_factory.mktemp("run") / "export"
    probe = [(references[0], Prompt("a dog"))]
    export_scorer(comparer.scorer, folder, {"name": "tiny"}, base="tiny", task="reward_dance", trained_on="2 pairs",
                  probe=probe, compares=True)  # fmt: skip
    return folder


def asked(references: list[Path]) -> list[Prompt]:
    places = (references[0], references[1], references[0])
    texts = ("a red dog", "two cats and a dog on the left of a red dog", "")
    return [Prompt(text, {"reference": str(place)}) for text, place in zip(texts, places, strict=True)]


def test_an_export_of_the_task_answers_as_the_comparer_does(comparer, export, references):
    reward = load_reward("rewarddance", checkpoint=str(export))
    images, prompts = uniform("images", (3, 3, 16, 16)), asked(references)
    score = reward.score(images, prompts)
    assert score.dimensions == tuple(NAMES) and score.levels.tolist() == [0.0, 1.0]
    others = read_tensors([Path(prompt.metadata["reference"]) for prompt in prompts])
    for dimension, name in enumerate(NAMES):
        expected = comparer.probability(images, others, prompts, [dimension] * 3)
        torch.testing.assert_close(score.parts[name], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(score.distribution[:, dimension, 1], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(score.value, torch.stack(list(score.parts.values())).mean(0))


def test_gradient_goes_to_the_candidate(export, references):
    reward = load_reward("rewarddance", checkpoint=str(export))
    images = uniform("images", (3, 3, 16, 16)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward.score(images, asked(references)).value[2], images)
    assert (gradient[2] != 0).all() and gradient[:2].abs().max() == 0


def test_a_picture_is_seen_once_however_many_dimensions_ask(export, references, monkeypatch):
    reward = load_reward("rewarddance", checkpoint=str(export))
    model: Any = reward.comparer.scorer.model
    seen: list[int] = []
    real = model.get_image_features

    def count(rows: torch.Tensor, **more: Any) -> Any:
        seen.append(len(more["image_grid_thw"]))
        return real(rows, **more)

    monkeypatch.setattr(model, "get_image_features", count)
    reward.score(uniform("images", (3, 3, 16, 16)), asked(references))
    assert seen == [5]  # three candidates, two references


def test_what_it_cannot_compare_is_refused(export, references, tmp_path):
    with pytest.raises(RecipeError, match="key 'checkpoint' is missing"):
        load_reward("rewarddance")
    with pytest.raises(RecipeError, match="no `comparison` part"):
        load_reward("rewarddance", checkpoint=str(write_scorer(tmp_path, layers=["full_attention"])))
    reward = load_reward("rewarddance", checkpoint=str(export))
    image = uniform("images", (1, 3, 16, 16))
    with pytest.raises(DataError, match="'reference'"):
        reward.score(image, ["a dog"])
    with pytest.raises(DataError, match="names no reference picture"):
        reward.score(image, [Prompt("a dog", {"reference": 3})])
    with pytest.raises(DataError, match=r"nothing\.png: the picture cannot be opened"):
        reward.score(image, [Prompt("a dog", {"reference": str(tmp_path / "nothing.png")})])
