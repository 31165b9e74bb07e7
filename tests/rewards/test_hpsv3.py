"""`hpsv3` against figures recorded from the code of its authors, its distribution, and files that do not fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_numbers import uniform, weights
from rewardtune.rewards.hpsv3 import LEVELS, SAID, HPSv3, Network, build, renamed
from safetensors.torch import save_file
from tiny_hpsv3 import write_files
from transformers import AutoTokenizer, Qwen2VLConfig

from rewardtune.backbones.discrete_normal import discrete_normal
from rewardtune.errors import RecipeError
from rewardtune.scorer.model import pad_left
from rewardtune.scoring.reward_set import load_reward

RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "reference/hpsv3.json").read_text())


def base_config() -> Qwen2VLConfig:
    """The recorded sizes as a config.json of transformers 4 has them: flat."""
    rope = {"type": "mrope", "mrope_section": RECORD["mrope_section"]}
    vision = RECORD["vision"]
    return Qwen2VLConfig.from_dict(
        {**RECORD["text"], "vision_config": vision, "rope_scaling": rope, "image_token_id": RECORD["image_token_id"],
         "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96, "tie_word_embeddings": False}
    )  # fmt: skip


def network(**options: Any) -> Network:
    config = HPSv3.Config(dtype="float32", **options)
    state = renamed(weights(RECORD["keys"], spread=RECORD["spread"]))
    return build(base_config(), state, file="a file", config=config, device="cpu")


def inputs() -> dict[str, torch.Tensor]:
    """The recorded rows up to the added token, padded on the left where the reference pads on the right."""
    rows = [row[: row.index(RECORD["reward_token_id"]) + 1] for row in RECORD["rows"]]
    ids, mask = pad_left(rows, filler=0, device=torch.device("cpu"))
    count = sum(t * h * w for t, h, w in RECORD["grids"])
    return {
        "input_ids": ids, "attention_mask": mask, "pixel_values": 4 * uniform("patches", (count, 1176)) - 2,
        "image_grid_thw": torch.tensor(RECORD["grids"]),
        "mm_token_type_ids": (ids == RECORD["image_token_id"]).int(),
    }  # fmt: skip


def test_it_reads_as_the_authors_code_does():
    given = inputs()
    given["pixel_values"].requires_grad_(True)
    read = network().read(given)
    torch.testing.assert_close(read, torch.tensor(RECORD["read"]), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(read[:, 0].sum(), given["pixel_values"])
    torch.testing.assert_close(gradient[[0, 9, 20], :6], torch.tensor(RECORD["gradient"]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient.norm().item(), RECORD["gradient_norm"], atol=1e-4, rtol=1e-4)


def test_positions_in_the_picture_would_give_other_values():
    # what transformers does when left alone, and ports of HPSv3 with it
    given, made = inputs(), network()
    hidden = made.asked.model(**given, use_cache=False).last_hidden_state[:, -1]
    read = made.head[2](made.head[1](made.head[0](hidden).relu()).relu())
    assert (read - torch.tensor(RECORD["read"])).abs().max() > 1e-3


def test_names_of_transformers_5_find_the_same_places():
    old = weights(RECORD["keys"], spread=RECORD["spread"])
    new = {}
    for name, value in old.items():
        name = f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
        new[name] = value
    assert set(renamed(new)) == set(renamed(old))
    assert not [name for name in renamed(new) if name.startswith("lm_head")]


def test_it_says_what_the_authors_code_says():
    # theirs goes on behind the added token
    said = SAID.replace("{prompt}", "a red fox") + "<|Reward|>\n\nEND\n"
    assert hashlib.sha256(said.encode()).hexdigest() == RECORD["said_sha256"]


def test_recomputing_keeps_values_and_saves_memory():
    plain, again = network(), network(gradient_checkpointing=True)
    kept = []
    for made in (plain, again):
        given, saved = inputs(), 0
        given["pixel_values"].requires_grad_(True)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            read = made.read(given)
        kept.append((read.detach(), saved, torch.autograd.grad(read.sum(), given["pixel_values"])[0]))
    torch.testing.assert_close(kept[0][0], kept[1][0])
    torch.testing.assert_close(kept[0][2], kept[1][2])
    assert kept[1][1] < 0.6 * kept[0][1]


@pytest.mark.parametrize("deviation", [1e-3, 0.1, 0.7, 3.0])
def test_the_distribution_keeps_mean_and_deviation(deviation):
    mean = torch.tensor([-3.0, 0.13, 7.249, 15.5], requires_grad=True)
    first, last, step = LEVELS
    levels = torch.arange(first, last + step / 2, step)
    spread = torch.full((4,), deviation)
    found = discrete_normal(mean, spread, levels)
    torch.testing.assert_close(found.sum(-1), torch.ones(4))
    assert bool((found >= 0).all())
    expected = found @ levels
    torch.testing.assert_close(expected, mean.detach(), atol=1e-4, rtol=0)
    variance = found @ levels**2 - expected**2
    assert bool(((variance - deviation**2) > -1e-3).all()) and bool(
        (variance < deviation**2 + step**2 / 4 + 1e-3).all()
    )
    (slope,) = torch.autograd.grad(expected.sum(), mean)
    torch.testing.assert_close(slope, torch.ones(4), atol=1e-3, rtol=0)


def test_scores_beyond_the_grid_stay_a_distribution():
    found = discrete_normal(torch.tensor([-80.0, 80.0]), torch.tensor([1.0, 2.0]), torch.arange(-5.0, 5.5, 0.5))
    torch.testing.assert_close(found.sum(-1), torch.ones(2))
    assert found[0, 0] == 1 and found[1, -1] == 1


def test_files_that_do_not_fit_are_refused(tmp_path):
    given = write_files(tmp_path)
    reward = load_reward("hpsv3", **given)
    score = reward.score(uniform("images", (1, 3, 64, 96)), ["a fox"])
    assert score.distribution is not None and score.levels is not None
    torch.testing.assert_close((score.distribution @ score.levels)[:, 0], score.value, atol=1e-4, rtol=1e-4)
    words = AutoTokenizer.from_pretrained(given["base"])
    words.add_tokens(["<|one more|>"])
    words.save_pretrained(tmp_path / "other")
    (tmp_path / "other/config.json").write_text((tmp_path / "base/config.json").read_text())
    with pytest.raises(RecipeError, match=r"<\|Reward\|> would be token .* Give the base"):
        load_reward("hpsv3", **(given | {"base": str(tmp_path / "other")}))
    other = tmp_path / "other.safetensors"
    save_file({"layers.0.weight": torch.zeros(2, 2)}, other)
    with pytest.raises(
        RecipeError, match=r"'hpsv3': .*other\.safetensors holds the weights of another model: .* missing"
    ):
        load_reward("hpsv3", **(given | {"checkpoint": str(other)}))
    other.write_bytes(b"nothing of the kind")
    with pytest.raises(RecipeError, match=r"'hpsv3': the weights .*other\.safetensors cannot be read"):
        load_reward("hpsv3", **(given | {"checkpoint": str(other)}))
    with pytest.raises(RecipeError, match=r"config of .* does not load.*option `base`"):
        load_reward("hpsv3", **(given | {"base": str(tmp_path)}))
