"""A judge behind an OpenAI-compatible server, against a stub that takes OpenAI's own fields and nothing else."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from judge_stub import Stub, said, shares

from rewardtune import load_reward
from rewardtune.errors import DataError, RecipeError
from rewardtune.scorer import text_scores
from rewardtune.scorer.rubric import load_rubric
from rewardtune.scorer.text_scores import Unreadable
from rewardtune.serving import connection

NAMES = ("alignment", "realism", "aesthetics", "plausibility")
PROMPTS = ["a red fox", "two {image} keys"]


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.001)
    found = Stub()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def judge(stub, **options):
    return load_reward("http-judge", url=stub.url, served_model="judge", **options)


def pictures():
    return torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(3))


def dimension(text):
    (found,) = [name for name in NAMES if f"Answer for {name} with one of 1, 2, 3" in text]
    return found


@pytest.mark.parametrize("space", [False, True])
def test_log_probabilities_become_the_distribution(stub, space):
    table = {name: torch.softmax(torch.randn(9, generator=torch.Generator().manual_seed(d)), 0)
             for d, name in enumerate(NAMES)}  # fmt: skip
    stub.say = lambda body, text, pixels: shares(table[dimension(text)].tolist(), space=space)
    reward = judge(stub, concurrency=3)
    score = reward.score(pictures(), PROMPTS)
    wanted = torch.stack(list(table.values())).expand(2, -1, -1)
    assert score.distribution.shape == (2, 4, 9) and torch.allclose(score.distribution, wanted, atol=1e-6)
    assert score.dimensions == NAMES == reward.card.dimensions and reward.card.range == (1.0, 5.0)
    levels = torch.arange(1, 5.5, 0.5)
    assert torch.equal(score.levels, levels) and torch.allclose(score.value, (wanted @ levels).mean(-1))
    assert torch.allclose(score.parts["realism"], wanted[:, 1] @ levels) and not score.parts["asked_again"].any()
    assert len(stub.asked) == 8 and stub.most <= 3
    for body, text in stub.asked:
        assert body["temperature"] == 0 and body["logprobs"] and body["top_logprobs"] == 20 and body["max_tokens"] == 2
        assert text.startswith("<image>This image was made for the prompt below.") and "<|" not in text
        assert load_rubric().criteria[dimension(text)].judges in text
        assert body["messages"][0]["role"] == "system"
    assert sum(PROMPTS[1] in text for _, text in stub.asked) == 4


def test_each_image_goes_with_its_own_prompt_and_pixels(stub):
    images = pictures()
    bytes_of = (images * 255).round() / 255

    def say(body, text, pixels):
        (place,) = [i for i in range(2) if torch.allclose(bytes_of[i], pixels, atol=1e-6)]
        assert PROMPTS[place] in text
        return said(str(place + 4))

    stub.say = say
    score = judge(stub, answer="level").score(images, PROMPTS)
    assert score.value.tolist() == [2.5, 3.0] and score.distribution is None
    assert score.parts["alignment"].tolist() == [2.5, 3.0] and not score.value.requires_grad


@pytest.mark.parametrize(
    ("answer", "text", "value", "parts"),
    [
        ("final-score", "Nice.\n**Final Score: 3.694700002670288**", 3.694700002670288, {}),
        ("unified-reward", "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 1.5", 3.0,
         {"alignment": 4.0, "coherence": 3.5, "style": 1.5}),
        ("rational-rewards", "# Detailed Judgement\n1. Text Faithfulness:\n## Justification: good 4\n## Score: 3.5\n"
         "2. Physical and Visual Quality:\n## Score: 2.5\n3. Text Rendering:\n## Score: N/A\n# Summary:\n## Score: 1",
         2 / 3, {"text_faithfulness": 3.5, "physical_quality": 2.5, "text_rendering": math.nan}),
    ],
)  # fmt: skip
def test_formats_of_scores_in_text(stub, answer, text, value, parts):
    stub.say = lambda body, question, pixels: said(text)
    reward = judge(stub, answer=answer, request={"chat_template_kwargs": {"enable_thinking": False}})
    score = reward.score(pictures(), PROMPTS)
    assert torch.allclose(score.value, torch.full((2,), value)) and score.distribution is None
    found = {name: part[0].item() for name, part in score.parts.items() if name != "asked_again"}
    assert found == pytest.approx(parts, nan_ok=True)
    low, high = reward.card.range
    assert low <= value <= high and not reward.card.differentiable
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body, _ in stub.asked)
    assert sorted(prompt for _, text in stub.asked for prompt in PROMPTS if prompt in text) == sorted(PROMPTS)


def test_a_question_of_ones_own(stub, tmp_path):
    (tmp_path / "q.txt").write_text("Caption: [{prompt}]. End with 'Final Score:'.")
    stub.say = lambda body, text, pixels: said("Final Score: 4")
    judge(stub, answer="final-score", question=str(tmp_path / "q.txt")).score(pictures(), PROMPTS)
    assert {text for _, text in stub.asked} == {f"<image>Caption: [{p}]. End with 'Final Score:'." for p in PROMPTS}
    (tmp_path / "q.txt").write_text("no slot")
    with pytest.raises(RecipeError, match="exactly once"):
        judge(stub, answer="final-score", question=str(tmp_path / "q.txt"))
    with pytest.raises(RecipeError, match="leave `question` out"):
        judge(stub, question=str(tmp_path / "q.txt"))
    with pytest.raises(RecipeError, match="leave `rubric` out"):
        judge(stub, answer="final-score", rubric="rubric.json")


def test_prose_is_asked_again_counted_and_then_an_error(stub):
    def say(body, text, pixels):
        return said("Final Score: 3") if body["temperature"] else said("I would rather not say.")

    stub.say = say
    score = judge(stub, answer="final-score").score(pictures(), PROMPTS)
    assert score.value.tolist() == [3.0, 3.0] and score.parts["asked_again"].tolist() == [1.0, 1.0]
    assert sorted("seed" in body for body, _ in stub.asked) == [False, False, True, True]
    stub.say = lambda body, text, pixels: said("I would rather not say.")
    with pytest.raises(DataError, match=r"I would rather not say\.' cannot be read as final-score: no line says"):
        judge(stub, answer="final-score", repeats=1, concurrency=1).score(pictures(), PROMPTS)
    stub.say = lambda body, text, pixels: said(None, "length")
    with pytest.raises(DataError, match=r"no text .*max_tokens may be too few"):
        judge(stub, answer="level", repeats=0).score(pictures(), PROMPTS)


def test_servers_without_what_is_asked_for(stub):
    stub.say = lambda body, text, pixels: said("7")
    with pytest.raises(DataError, match=r"no log-probabilities.*answer: level"):
        judge(stub, concurrency=1).score(pictures(), PROMPTS)
    stub.say = lambda body, text, pixels: shares([1 / 9] * 9, mass=0.01)
    with pytest.raises(DataError, match="enable_thinking"):
        judge(stub).score(pictures(), PROMPTS)
    stub.say = lambda body, text, pixels: (404, {"error": {"message": "unknown model"}})
    with pytest.raises(RecipeError, match="serves no model 'another'; it serves judge"):
        load_reward("http-judge", url=stub.url, served_model="another").score(pictures(), PROMPTS)
    stub.say = lambda body, text, pixels: (401, {"error": {"message": "who are you"}})
    with pytest.raises(RecipeError, match="refuses access"):
        judge(stub).score(pictures(), PROMPTS)
    stub.say = lambda body, text, pixels: (400, {"error": {"message": "pictures are not supported"}})
    with pytest.raises(RecipeError, match="pictures are not supported"):
        judge(stub).score(pictures(), PROMPTS)
    stub.say = lambda body, text, pixels: (503, {"error": {"message": "busy"}})
    with pytest.raises(DataError, match=r"the server answered 503: busy"):
        judge(stub, retries=1, concurrency=1).score(pictures(), PROMPTS)
    with pytest.raises(RecipeError, match="NO_SUCH_KEY"):
        judge(stub, key_variable="NO_SUCH_KEY")
    with pytest.raises(DataError, match="2 images came with 1 prompts"):
        judge(stub).score(pictures(), PROMPTS[:1])


@pytest.mark.parametrize(
    ("read", "text", "why"),
    [
        (text_scores.final_score, "The score is 4.", "no line says"),
        (text_scores.final_score, "Final Score: 4/5", "not by one number"),
        (text_scores.final_score, "Final Score: four", "not by one number"),
        (text_scores.final_score, "Final Score: 7", "not from 1 to 5"),
        (text_scores.final_score, "Final Score: -3", "not by one number"),
        (text_scores.final_score, "Final Score: 3\nFinal Score: 4", "not by one number"),
        (text_scores.final_score, "Final Score: NaN", "not by one number"),
        (text_scores.unified_reward, "Alignment Score (1-5): 4\nStyle Score (1-5): 3", "Coherence Score"),
        (text_scores.unified_reward, "Alignment: 4\nCoherence: 3\nStyle: 2", "Alignment Score"),
        (text_scores.rational_rewards, "Score: 4", "headings"),
        (text_scores.rational_rewards, "1. Text Faithfulness:\n## Score: N/A\n2. Physical and Visual Quality:\n"
         "## Score: 2\n3. Text Rendering:\n## Score: 2", "Text Faithfulness: 'Score:' is followed by 'N/A'"),
        (text_scores.rational_rewards, "1. Text Faithfulness:\n## Score: 4.5\n2. Physical and Visual Quality:\n"
         "## Score: 2\n3. Text Rendering:\n## Score: 2", "not from 1 to 4"),
        (lambda text: text_scores.level(text, ["1", "2"]), "12", "none of 1, 2"),
        (lambda text: text_scores.level(text, ["1", "2"]), "1 because", "none of 1, 2"),
    ],
)  # fmt: skip
def test_what_is_not_in_the_format_is_no_number(read, text, why):
    with pytest.raises(Unreadable, match=why.replace("(", r"\(").replace(")", r"\)").replace("/", "/")):
        read(text)


def test_the_same_score_twice_is_one():
    assert text_scores.final_score("Final Score: 3.5\nthus\nFinal Score: 3.5").value == 3.5


def test_validate_refuses_to_train_on_it(tmp_path):
    from rewardtune.recipe.file import load_recipe

    (tmp_path / "r.yaml").write_text(
        "task: direct_reward\npipeline: {model: some/hub-id}\nlora: {}\ndata: {prompts: pocket:prompts/train}\n"
        "gradient: {method: refl}\nrewards: [{name: http-judge, options: {url: 'http://h/v1', served_model: m}}]\n"
        "train: {steps: 1}\n"
    )
    with pytest.raises(RecipeError, match="returns no gradient"):
        load_recipe(str(tmp_path / "r.yaml"), (), files=True)
