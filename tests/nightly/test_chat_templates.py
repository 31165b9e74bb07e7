"""`qwen_chats.py` beside Qwen's own chat templates, of which trl carries the originals."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
from qwen_chats import ANSWERED, ASKED, COMPARED, OPENS, REASONED
from transformers.utils.chat_template_utils import render_jinja_template

pytestmark = pytest.mark.nightly

SYSTEM = {"role": "system", "content": "SYSTEM"}
ONE = [SYSTEM, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "QUESTION"}]}]
TWO = [SYSTEM, {"role": "user", "content": [
    {"type": "text", "text": "Image 1: "}, {"type": "image"}, {"type": "text", "text": "\nImage 2: "},
    {"type": "image"}, {"type": "text", "text": "\nQUESTION"},
]}]  # fmt: skip


def rendered(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    (found,), _ = render_jinja_template([messages], chat_template=template, **options)
    return str(found)


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("name", OPENS)
def test_questions_are_rendered_as_noted(name: str, thinking: bool | None):
    options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    for messages, text in ((ONE, ASKED), (TWO, COMPARED)):
        found = rendered(name, messages, add_generation_prompt=True, **options)
        assert found == text + OPENS[name][thinking]


@pytest.mark.parametrize("name", [name for name in OPENS if name != "qwen3_vl"])
def test_answers_are_rendered_as_noted(name: str):
    for reasoning, text in (("REASONING", REASONED), ("", ANSWERED)):
        answer = {"role": "assistant", "content": "ANSWER", "reasoning_content": reasoning}
        assert rendered(name, [*ONE, answer]) == ASKED + text
        # as one text, which is how a trace goes back to a server
        whole = f"<think>\n{reasoning}</think>\n\nANSWER"
        assert rendered(name, [*ONE, {"role": "assistant", "content": whole}]) == ASKED + text


@pytest.mark.parametrize("name", [name for name in OPENS if name != "qwen3_vl"])
@pytest.mark.parametrize("trace", ["it has a dog", "", "it has\n\na dog, and"])
def test_a_trace_goes_back_to_a_server_as_it_was_written(name: str, trace: str):
    """What `scorer/server.py` sends to be continued, which vLLM refuses where the template changes it."""
    back = {"role": "assistant", "content": f"<think>\n{trace}\n</think>\n\nalignment="}
    found = rendered(name, [*ONE, back], continue_final_message=True, enable_thinking=True)
    assert found == f"{ASKED}<think>\n{trace}\n</think>\n\nalignment="
    # without the line break, which the template writes by itself, it is not found again
    joined = {"role": "assistant", "content": f"<think>\n{trace}</think>\n\nalignment="}
    if trace:
        with pytest.raises(ValueError, match="does not appear in the chat"):
            rendered(name, [*ONE, joined], continue_final_message=True, enable_thinking=True)
