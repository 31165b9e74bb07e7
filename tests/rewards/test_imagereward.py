"""`imagereward` against figures recorded from the code of its authors, and what may be wrong with its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_numbers import uniform
from tiny_blip import RECORD, published, write_folder

from rewardtune.backbones.blip import BlipReward, find_med_config, load_blip, renamed
from rewardtune.backbones.frozen import freeze
from rewardtune.errors import RecipeError
from rewardtune.scoring.reward_set import load_reward

PROMPTS = ["a red fox", "two cats on a mat, one of them asleep, and a very long tail of words " * 3, ""]


def network(tmp_path: Path, dtype: torch.dtype = torch.float32) -> BlipReward:
    config = tmp_path / "med_config.json"
    config.write_text(json.dumps(RECORD["med_config"]))
    model = load_blip("imagereward", published(), med_config=config, dtype=dtype, source="a file")
    freeze(model)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = RECORD["lengths"]
    pixels = 4 * uniform("pixels", (len(lengths), 3, 32, 32)) - 2
    ids = (1 + (RECORD["med_config"]["vocab_size"] - 1) * uniform("ids", (len(lengths), 35))).long()
    mask = torch.tensor([[1] * n + [0] * (35 - n) for n in lengths])
    return pixels, ids * mask, mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("published"))


def test_it_scores_as_the_authors_code_does(tmp_path):
    from rewardtune.rewards.imagereward import MEAN, STD

    model, (pixels, ids, mask) = network(tmp_path), inputs()
    pixels.requires_grad_(True)
    seen = model.vision(pixels).last_hidden_state
    torch.testing.assert_close(seen[:, 0, :8], torch.tensor(RECORD["class_features"]), atol=1e-5, rtol=1e-5)
    scores = (model(pixels, ids, mask) - MEAN) / STD
    torch.testing.assert_close(scores, torch.tensor(RECORD["scores"]), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    torch.testing.assert_close(gradient[:, :, 3, 5], torch.tensor(RECORD["gradient"]), atol=1e-5, rtol=1e-4)
    norms = gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor(RECORD["gradient_norms"]), atol=1e-5, rtol=1e-4)


def test_every_published_name_but_blips_projections_finds_a_place(tmp_path):
    state = renamed(published())
    assert set(state) == set(network(tmp_path).state_dict())
    assert len(published()) - len(state) == 5  # two projections of two tensors, and the positions


def test_it_is_causal_nowhere(tmp_path):
    # transformers' config says decoder; a later word must still change what the first token reads
    model, (pixels, ids, mask) = network(tmp_path), inputs()
    changed = ids.clone()
    changed[0, 34] = ids[0, 34] % 100 + 1
    assert not torch.equal(model(pixels, ids, mask)[0], model(pixels, changed, mask)[0])


def test_the_reward_reads_the_published_file(folder):
    reward: Any = load_reward("imagereward", checkpoint=str(folder), tokenizer=str(folder))
    assert reward.card.native_resolution == 32
    images = uniform("images", (3, 3, 40, 48)).requires_grad_(True)
    score = reward.score(images, PROMPTS)
    assert score.value.shape == (3,) and score.value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(score.value[1], images)
    assert gradient[1].abs().max() > 0 and gradient[[0, 2]].abs().max() == 0
    alone = torch.cat([reward.score(images[i : i + 1], PROMPTS[i : i + 1]).value for i in range(3)])
    torch.testing.assert_close(alone, score.value, atol=1e-4, rtol=1e-5)
    # what stands behind the 35th token is not read
    same = reward.score(images[1:2], [PROMPTS[1] + "and more"]).value
    torch.testing.assert_close(same, score.value[1:2], atol=1e-4, rtol=1e-5)


def test_bf16_weights_and_recomputing_keep_the_value(folder):
    options = {"checkpoint": str(folder), "tokenizer": str(folder)}
    plain, short, again = (
        load_reward("imagereward", **options, **more)
        for more in ({}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True})
    )
    images = uniform("images", (2, 3, 32, 32)).requires_grad_(True)
    value = plain.score(images, PROMPTS[:2]).value
    assert short.score(images, PROMPTS[:2]).value.dtype == torch.float32
    torch.testing.assert_close(short.score(images, PROMPTS[:2]).value, value, atol=0.5, rtol=0.1)
    kept = {}
    for name, reward in (("plain", plain), ("again", again)):
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            found = reward.score(images, PROMPTS[:2]).value
        torch.testing.assert_close(found, value)
        kept[name] = saved, torch.autograd.grad(found.sum(), images)[0]
    assert kept["again"][0] < kept["plain"][0] / 2
    torch.testing.assert_close(kept["again"][1], kept["plain"][1])


def test_files_that_are_not_its_own_are_refused(folder, tmp_path):
    def load(path: Path) -> Any:
        return load_reward("imagereward", checkpoint=str(path), tokenizer=str(folder))

    broken = tmp_path / "ImageReward.pt"
    broken.write_bytes((folder / "ImageReward.pt").read_bytes()[:5000])
    with pytest.raises(
        RecipeError, match=r"'imagereward'.*ImageReward.pt cannot be read.*damaged.*rewards convert imagereward"
    ):
        load(broken)
    torch.save({"layers.0.weight": torch.zeros(2, 2)}, broken)
    with pytest.raises(
        RecipeError, match=r"weights of another model: 5 missing \(vision.*1 left over \(layers.0.weight"
    ):
        load(broken)
    state = published()
    state["blip.text_encoder.encoder.layer.0.output.dense.weight"] = torch.zeros(64, 95)
    torch.save(state, broken)
    (tmp_path / "med_config.json").write_text(json.dumps(RECORD["med_config"]))
    with pytest.raises(
        RecipeError, match=r"1 of another shape \(text\.encoder\.layer\.0\.output\.dense\.weight \(64, 95\)"
    ):
        load(broken)
    with pytest.raises(RecipeError, match=r"holds no ImageReward.pt"):
        load(tmp_path / "..")
    with pytest.raises(RecipeError, match="does not load"):
        load_reward("imagereward", checkpoint=str(folder), tokenizer=str(tmp_path))


def test_rounding_sees_what_a_file_would_hold_and_passes_the_gradient(folder):
    """At the tower's own size nothing is resized, so a picture of whole bytes is the same with it and without."""
    options = {"checkpoint": str(folder), "tokenizer": str(folder)}
    plain, rounded = load_reward("imagereward", **options), load_reward("imagereward", **options, rounding=True)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    whole = (images * 255).round() / 255
    expected = plain.score(whole, PROMPTS[:2]).value
    torch.testing.assert_close(rounded.score(images, PROMPTS[:2]).value, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(plain.score(images, PROMPTS[:2]).value, expected, rtol=0, atol=1e-5)
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(rounded.score(images, PROMPTS[:2]).value.sum(), images)
    whole.requires_grad_(True)
    (same,) = torch.autograd.grad(plain.score(whole, PROMPTS[:2]).value.sum(), whole)
    torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-7)


def test_a_config_that_nobody_could_ask_the_hub_for_is_not_guessed(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    weights = tmp_path / "ImageReward.pt"
    weights.touch()
    with pytest.raises(RecipeError, match=r"med_config\.json of checkpoint 'nobody/nothing'.*HF_HUB_OFFLINE is set"):
        find_med_config(weights, "nobody/nothing", revision=None)
    assert find_med_config(weights, str(weights), revision=None) is None
