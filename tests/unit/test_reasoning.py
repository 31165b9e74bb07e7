"""Reasoned judgements on tiny Qwen3.5 and Qwen3-VL models: sampling, closing, reading, and what is one forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_scorer import PROMPTS, RUBRIC, THINKING, as_qwen3_vl, pictures, tokenizer, write_reasoner

from rewardtune.errors import RecipeError
from rewardtune.scorer.model import load_scorer
from rewardtune.scorer.reasoning import Question, Reasoner, Trace, load_reasoner, token_log_probs
from rewardtune.scorer.rubric import Rubric, thinking_reading


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_vl"])
def reasoner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen3_vl":
        as_qwen3_vl(write_reasoner(folder, layers=["full_attention"]))
    else:
        write_reasoner(folder, layers=["linear_attention", "full_attention"])
    return load_reasoner(load_scorer(folder))


QUESTIONS = [Question(0, PROMPTS[0], 0), Question(1, PROMPTS[1], 2), Question(0, PROMPTS[0], 3), Question(1, "", 1)]
KEYS = [(0, "test", i) for i in range(len(QUESTIONS))]


def by_hand(reasoner: Reasoner, image: torch.Tensor, question: Question, ids: list[int]) -> torch.Tensor:
    """(L, V) logits of one row alone, without padding, its image given as pixels."""
    from rewardtune.scorer.patches import patchify

    scorer = reasoner.scorer
    rows, grid = patchify(image[None], scorer.geometry)
    frame = scorer.tokens(reasoner.reading.frames[question.dimension], question.prompt, 4)
    whole = torch.tensor([[*frame, *ids]])
    logits = scorer.model(
        input_ids=whole, mm_token_type_ids=(whole == scorer.image_token).int(), pixel_values=rows,
        image_grid_thw=grid, use_cache=False,
    ).logits[0]  # fmt: skip
    return logits.index_fill(1, torch.tensor(reasoner.unsayable), -torch.inf)


def test_sampling_draws_from_the_models_own_next_token_probabilities(reasoner: Reasoner):
    images = pictures(2)
    traces = reasoner.sample(images, QUESTIONS, KEYS)
    for trace, question, key in zip(traces, QUESTIONS, KEYS, strict=True):
        from rewardtune.randomness import generator

        chances = torch.rand(6, generator=generator(*key))
        said = [*trace.ids, *([reasoner.reading.stop] if trace.ended else [])]
        logits = by_hand(reasoner, images[question.image], question, list(trace.ids))
        for k, token in enumerate(said):
            share = logits[len(logits) - len(trace.ids) - 1 + k].softmax(-1).cumsum(-1)
            low = float(share[token - 1]) if token else 0.0
            assert low - 1e-5 <= float(chances[k]) <= float(share[token]) + 1e-5
        assert len(said) == 6 or trace.ended


def test_a_trace_does_not_depend_on_batch_mates(reasoner: Reasoner):
    images = pictures(2)
    together = reasoner.sample(images, QUESTIONS, KEYS)
    alone = [reasoner.sample(images, [q], [k])[0] for q, k in zip(QUESTIONS, KEYS, strict=True)]
    assert together == alone
    other = reasoner.sample(images, QUESTIONS, [(1, "test", i) for i in range(len(QUESTIONS))])
    assert other != together


@pytest.mark.parametrize("most", [1, 3, None])
def test_judging_equals_sampling_and_reading(reasoner: Reasoner, most: int | None):
    images = pictures(2)
    traces, logits = reasoner.judge(images, QUESTIONS, KEYS, max_tokens=most)
    assert traces == reasoner.sample(images, QUESTIONS, KEYS, max_tokens=most)
    if most == 1:
        assert not all(trace.ended for trace in traces)
    torch.testing.assert_close(logits, reasoner.read(images, QUESTIONS, traces).logits, rtol=1e-4, atol=1e-4)


def test_prompts_are_read_once_for_all_their_traces(reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch):
    images, prompts, sizes = pictures(2), [PROMPTS[0], PROMPTS[1]], []
    inner = reasoner.scorer.model.model
    forward = inner.forward
    monkeypatch.setattr(inner, "forward", lambda **k: (sizes.append(k["input_ids"].shape), forward(**k))[1])
    reasoner.every_dimension(images, prompts, traces=3, stream=(0, "test"), places=[0, 1])
    tails = reasoner.reading.tails
    assert sizes[0][0] == 2 and min(tails) > 1, "the pictures"
    assert [size for size in sizes[1:] if size[1] > 1] == [(2, tail) for tail in sorted(tails)], "then each dimension"
    assert sizes[2] == (6, 1), "then tokens of all traces"
    assert min(size[0] for size in sizes[1:]) < 3, "rows that are finished leave the batch"


def test_frames_that_differ_before_the_image_share_nothing_but_samples(reasoner: Reasoner, tmp_path: Path):
    rubric, words = reasoner.scorer.rubric, reasoner.scorer.tokenizer
    assert rubric.thinking is not None
    template = rubric.thinking.template.replace("<|im_start|>user", "<|im_start|>user {dimension}", 1)
    other = rubric.model_copy(update={"thinking": rubric.thinking.model_copy(update={"template": template})})
    found = replace(reasoner, scorer=replace(reasoner.scorer, rubric=other), reading=thinking_reading(other, words))
    assert set(found.reading.tails) == {1}
    traces, logits = found.judge(pictures(2), QUESTIONS, KEYS)
    torch.testing.assert_close(logits, found.read(pictures(2), QUESTIONS, traces).logits, rtol=1e-4, atol=1e-4)


def test_every_dimension_gives_its_judgements_in_order(reasoner: Reasoner):
    images, prompts = pictures(2), [PROMPTS[0], PROMPTS[1]]
    drawn, shares = reasoner.every_dimension(images, prompts, traces=2, stream=(3, "test"), places=[7, 9])
    assert shares.shape == (2, 4, 2, 9) and len(drawn) == 16
    question, key = Question(1, prompts[1], 2), (3, "test", 9, 2, 1)
    (trace,), logits = reasoner.judge(images, [question], [key])
    assert drawn[8 + 2 * 2 + 1] == trace
    torch.testing.assert_close(shares[1, 2, 1], logits[0].softmax(-1), rtol=1e-4, atol=1e-5)


def test_reading_equals_each_row_alone(reasoner: Reasoner):
    images = pictures(2)
    traces = [Trace((), True), Trace((70, 71, 72, 73, 74), False), Trace((80,), True), Trace((90, 91), False)]
    read = reasoner.read(images, QUESTIONS, traces, tokens=True)
    assert read.log_probs is not None and read.mask is not None
    for n, (trace, question) in enumerate(zip(traces, QUESTIONS, strict=True)):
        closing = reasoner.reading.closings[question.dimension]
        logits = by_hand(reasoner, images[question.image], question, [*trace.ids, *closing])
        torch.testing.assert_close(read.logits[n], logits[-1, list(reasoner.scorer.reading.level_ids)],
                                   atol=2e-5, rtol=1e-4)  # fmt: skip
        sampled = [*trace.ids, *([reasoner.reading.stop] if trace.ended else [])]
        before = logits[len(logits) - len(closing) - len(trace.ids) - 1 :]
        wanted = [float(before[k].log_softmax(-1)[token]) for k, token in enumerate(sampled)]
        assert int(read.mask[n].sum()) == len(sampled)  # the forced closing text is not the policy's
        torch.testing.assert_close(read.log_probs[n][read.mask[n]], torch.tensor(wanted), atol=2e-5, rtol=1e-4)


def test_each_image_is_encoded_once(reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch):
    model, seen = reasoner.scorer.model, []
    real = model.model.visual.forward
    monkeypatch.setattr(model.model.visual, "forward", lambda x, **kw: (seen.append(len(x)), real(x, **kw))[1])
    reasoner.read(pictures(2), QUESTIONS, [Trace((70,), True)] * 4, tokens=True)
    assert seen == [2 * 16]


def test_gradients_reach_pixels_and_weights_through_a_shared_image(reasoner: Reasoner):
    images = pictures(2).requires_grad_(True)
    weight = reasoner.scorer.model.get_input_embeddings().weight.requires_grad_(True)
    read = reasoner.read(images, QUESTIONS, [Trace((70, 71), True)] * 4, tokens=True)
    (read.logits.sum() + read.log_probs.sum()).backward()
    assert images.grad[0].abs().max() > 0 and images.grad[1].abs().max() > 0
    assert weight.grad.abs().max() > 0
    weight.requires_grad_(False).grad = None


def test_the_chunked_output_layer_equals_one_pass(monkeypatch: pytest.MonkeyPatch):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=g, dtype=torch.float64, requires_grad=True)
    aims = torch.arange(7)
    whole = (hidden @ weight.T / 0.7).log_softmax(-1)[range(7), aims]
    wanted = torch.autograd.grad(whole.square().sum(), (hidden, weight))
    monkeypatch.setattr("rewardtune.scorer.reasoning.CHUNK", 3)
    found = token_log_probs(hidden, aims, weight, temperature=0.7)
    torch.testing.assert_close(found, whole)
    for a, b in zip(torch.autograd.grad(found.square().sum(), (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_temperature_zero_is_greedy(reasoner: Reasoner):
    images = pictures(2)
    first = reasoner.sample(images, QUESTIONS, KEYS, temperature=0.0)
    assert first == reasoner.sample(images, QUESTIONS, [(9, "x", i) for i in range(4)], temperature=0.0)
    logits = by_hand(reasoner, images[0], QUESTIONS[0], [])
    token = int(logits[-1].argmax())
    assert first[0].ids[:1] == (token,) or (first[0] == Trace((), True) and token == reasoner.reading.stop)


def test_a_rubric_without_thinking_says_so(reasoner: Reasoner):
    plain = replace(reasoner.scorer, rubric=Rubric.model_validate(RUBRIC))
    with pytest.raises(RecipeError, match="no `thinking` part"):
        load_reasoner(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reads": ["a:"]}, "one text for each dimension"),
        ({"template": "no slots"}, "must hold {image} exactly once"),
        ({"template": "{image} {prompt} {criteria}"}, "every dimension needs an entry in criteria"),
    ],
)
def test_a_thinking_part_that_does_not_fit_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Rubric.model_validate({**RUBRIC, "thinking": {**THINKING, **change}})


def test_levels_after_reasoning_must_be_the_one_pass_levels():
    # with the space the levels would be two tokens
    rubric = Rubric.model_validate({**RUBRIC, "levels": [{"token": "a1", "value": 1}, {"token": "b", "value": 2}],
                                    "thinking": THINKING})  # fmt: skip
    with pytest.raises(RecipeError, match="not one token"):
        thinking_reading(rubric, tokenizer())
