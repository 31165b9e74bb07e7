"""The shipped rubric is written in ChatML by hand: it must be what Qwen's own chat templates make of its texts."""

from __future__ import annotations

from qwen_chats import ANSWERED, ASKED, COMPARED, OPENS, REASONED

from rewardtune.scorer.rubric import chat, filled, load_rubric
from rewardtune.scorer.server import TEMPLATE
from rewardtune.scorer.teacher import conversation

RUBRIC = load_rubric()
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def texts(template: str) -> tuple[str, str]:
    """System text and question of a template with one picture, the picture left out."""
    system, question = chat(template, name="template")
    assert system is not None and question.count("<|vision_start|>{image}<|vision_end|>") == 1
    return system, question.replace("<|vision_start|>{image}<|vision_end|>", "")


def say(shape: str, system: str, question: str) -> str:
    # the templates take white space off both ends of a turn's text
    assert system == system.strip() and (IMAGE + question) == (IMAGE + question).strip()
    return shape.replace("SYSTEM", system).replace("QUESTION", question)


def test_the_one_pass_question_is_qwen3_5s_with_thinking_off():
    system, question = texts(RUBRIC.template)
    wanted = {say(ASKED, system, question) + OPENS[name][False] for name in OPENS if name.startswith("qwen3_5")}
    assert wanted == {RUBRIC.template.replace("{image}", "<|image_pad|>")}


def test_the_reasoned_question_is_qwen3_5s_with_thinking_on():
    assert RUBRIC.thinking is not None
    system, question = texts(RUBRIC.thinking.template)
    wanted = {say(ASKED, system, question) + OPENS[name][True] for name in OPENS if name.startswith("qwen3_5")}
    assert wanted == {RUBRIC.thinking.template.replace("{image}", "<|image_pad|>")}


def test_the_comparison_is_qwen3_5s_with_thinking_off():
    assert RUBRIC.comparison is not None
    template = RUBRIC.comparison.template
    system, question = chat(template, name="comparison.template")
    pictures = COMPARED[COMPARED.index("Image 1") : COMPARED.index("QUESTION")]
    question = question.replace("{reference}", "<|image_pad|>").replace("{image}", "<|image_pad|>")
    assert system is not None and question.startswith(pictures)
    wanted = say(COMPARED, system, question.removeprefix(pictures)) + OPENS["qwen3_5_think"][False]
    assert wanted == template.replace("{reference}", "<|image_pad|>").replace("{image}", "<|image_pad|>")


def test_what_stands_behind_a_question_is_what_the_model_would_write():
    thinking = RUBRIC.thinking
    assert thinking is not None
    # in a turn of the model's own a line break comes before the closing tag; it is part of the sampled trace
    whole = thinking.template + "REASONING\n" + thinking.close + thinking.reads[2] + "9<|im_end|>\n"
    reasoned = say(ASKED, *texts(thinking.template)) + REASONED.replace("ANSWER", thinking.reads[2] + "9")
    assert whole.replace("{image}", "<|image_pad|>") == reasoned
    scores = "".join(f"{read}9" for read in RUBRIC.reads)
    answered = say(ASKED, *texts(RUBRIC.template)) + ANSWERED.replace("ANSWER", scores)
    assert (RUBRIC.template + scores + "<|im_end|>\n").replace("{image}", "<|image_pad|>") == answered


def test_a_server_is_given_the_same_text():
    assert RUBRIC.thinking is not None and TEMPLATE == {"enable_thinking": True}
    asked = conversation(RUBRIC)
    for d, name in enumerate(RUBRIC.dimensions):
        before, after = asked.question("a red {fox}", d)
        assert before == "" and asked.system is not None
        served = say(ASKED, asked.system, after) + OPENS["qwen3_5_think"][TEMPLATE["enable_thinking"]]
        here = filled(RUBRIC, RUBRIC.thinking.template, [name]).replace("{prompt}", "a red {fox}")
        assert served == here.replace("{image}", "<|image_pad|>")


def test_for_qwen3_vl_the_thinking_block_comes_off():
    """docs/train-a-reward.md, 2: its Instruct checkpoints do not know one."""
    block = OPENS["qwen3_5_think"][False]
    assert RUBRIC.template.endswith(block) and set(OPENS["qwen3_vl"].values()) == {""}
    changed = RUBRIC.template.removesuffix(block)
    assert changed.replace("{image}", "<|image_pad|>") == say(ASKED, *texts(RUBRIC.template)) + OPENS["qwen3_vl"][None]
