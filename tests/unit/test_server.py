"""The judge on a server against a stub that speaks vLLM's protocol and takes nothing that is not in it."""

from __future__ import annotations

import base64
import email.utils
import io
import json
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rewardtune.data.images import to_pil
from rewardtune.errors import DataError, NonFiniteError, RecipeError
from rewardtune.scorer import server
from rewardtune.scorer.rubric import load_rubric
from rewardtune.scorer.server import Conversation, Judgement, ServerJudge, Unscorable

LEVELS = (*"123456789",)
READS = ("alignment=", "realism=")
CLOSE = "\n</think>\n\n"
THINKING = Conversation(
    question=lambda prompt, dimension: ("Look.", f"Made for: {prompt}. Rate {('alignment', 'realism')[dimension]}."),
    close=CLOSE, reads=READS, levels=LEVELS, system="You are strict.",
)  # fmt: skip

torch.manual_seed(0)
TENSOR = torch.rand(3, 5, 7)
PICTURE = to_pil(torch.rand(1, 3, 6, 4))[0]
ITEMS: list[server.Item] = [(TENSOR, "a fox", 0), (PICTURE, "two keys", 1)]
PIXELS = {np.asarray(p).tobytes(): i for i, p in enumerate([to_pil(TENSOR[None])[0], PICTURE])}

TRACE_FIELDS = {"model", "messages", "temperature", "max_tokens", "seed", "stop", "include_stop_str_in_output",
                "chat_template_kwargs", *server.UNFILTERED}  # fmt: skip
SCORE_FIELDS = (TRACE_FIELDS - {"seed", "stop", "include_stop_str_in_output"}) | {
    "continue_final_message", "add_generation_prompt", "logprobs", "top_logprobs"}  # fmt: skip

Fault = Callable[["Handler", dict[str, Any]], "dict[str, Any] | None"]
"""Changes the good answer, or answers by itself and returns None."""


class Stub(ThreadingHTTPServer):
    """plan: faults of the first requests of either kind, as they arrive; None is no fault."""

    daemon_threads = True
    allow_reuse_address = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: dict[str, list[Fault | None]] = {"trace": [], "score": []}
        self.always: dict[str, Fault] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answered: list[int] = []
        self.keys: list[str | None] = []
        self.unmet: list[str] = []
        self.lock = threading.Lock()
        self.let_go = threading.Event()
        self.read = READS
        self.close_text = CLOSE

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def seeds(self) -> list[int]:
        return [body["seed"] for kind, body in self.asked if kind == "trace"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the tests


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.send(200, {"object": "list", "data": [{"id": "teacher", "object": "model"}, {"id": "lora"}]})
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.keys.append(self.headers["Authorization"])
        if self.path != "/v1/chat/completions":
            return self.send(404, {"detail": "Not Found"})
        if body["model"] != "teacher":
            return self.send(404, refusal(404, f"The model `{body['model']}` does not exist."))
        try:
            kind, good = self.understand(body)
        except (AssertionError, KeyError, TypeError) as error:
            self.server.unmet.append(repr(error))
            return self.send(400, refusal(400, repr(error)))
        with self.server.lock:
            self.server.asked.append((kind, body))
            planned = self.server.plan[kind]
            fault = planned.pop(0) if planned else self.server.always.get(kind)
        answer = fault(self, good) if fault else good
        if answer is not None:
            self.send(200, answer)

    def understand(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        messages = body["messages"]
        system, user, *assistant = messages
        assert system == {"role": "system", "content": "You are strict."}
        assert user["role"] == "user"
        before, image, after = user["content"]
        assert before == {"type": "text", "text": "Look."}
        assert (
            set(image) == {"type", "image_url"} and image["type"] == "image_url" and set(image["image_url"]) == {"url"}
        )
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert picture.format == "PNG" and picture.mode == "RGB"
        item = PIXELS[np.asarray(picture).tobytes()]
        name, prompt = ("alignment", "realism")[item], ("a fox", "two keys")[item]
        assert after == {"type": "text", "text": f"Made for: {prompt}. Rate {name}."}
        assert all(body[field] == value for field, value in server.UNFILTERED.items())
        assert body["chat_template_kwargs"] == {"enable_thinking": True}
        if not assistant:
            assert set(body) == TRACE_FIELDS, set(body) ^ TRACE_FIELDS
            assert body["temperature"] == 0.8 and body["max_tokens"] == 40
            assert body["stop"] == [self.server.close_text.strip()]
            assert isinstance(body["seed"], int) and 0 <= body["seed"] < 2**31
            return "trace", trace_answer(f"seed {body['seed']}\n\nitem {item}")
        assert set(body) == SCORE_FIELDS, set(body) ^ SCORE_FIELDS
        assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
        assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["temperature"] == 0
        (last,) = assistant
        assert set(last) == {"role", "content"} and last["role"] == "assistant"
        text, read = last["content"], self.server.read[item]
        assert body["max_tokens"] == (2 if read.endswith(" ") else 1)
        assert text.startswith("<think>\n") and text.endswith(self.server.close_text + read)
        trace = text.removeprefix("<think>\n").removesuffix(self.server.close_text + read)
        return "score", score_answer(odds(trace))

    def send(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def refusal(code: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "Error", "param": None, "code": code}}


def trace_answer(text: str, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """As vLLM without a reasoning parser answers: the stop string is kept, as was asked."""
    content = text + (CLOSE.rstrip() if finish == "stop" else "")
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "teacher",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content, "reasoning": None, **message},
                     "logprobs": None, "finish_reason": finish,
                     "stop_reason": CLOSE.strip() if finish == "stop" else None}],
        "usage": {"prompt_tokens": 30, "completion_tokens": 12, "total_tokens": 42},
    }  # fmt: skip


def odds(trace: str) -> dict[str, float]:
    """Eight levels hold 0.9 together, the ninth nothing worth listing; the weights differ from trace to trace."""
    weights = [1 + (sum(trace.encode()) * (k + 3)) % 17 for k in range(8)]
    return {level: 0.9 * w / sum(weights) for level, w in zip(LEVELS, weights, strict=False)} | {"the": 0.09, "x": 1e-6}


def score_answer(*places: dict[str, float]) -> dict[str, Any]:
    """Sampled greedily: the first of each list is the most probable."""
    content = []
    for place in places:
        top = [{"token": token, "logprob": max(math.log(p), -9999.0), "bytes": list(token.encode())}
               for token, p in sorted(place.items(), key=lambda pair: -pair[1])[:20]]  # fmt: skip
        content.append({**top[0], "top_logprobs": top})
    return {
        "id": "chatcmpl-2", "object": "chat.completion", "created": 1, "model": "teacher",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content[0]["token"], "reasoning": None},
                     "logprobs": {"content": content}, "finish_reason": "length", "stop_reason": None}],
        "usage": {"prompt_tokens": 50, "completion_tokens": len(content), "total_tokens": 51},
    }  # fmt: skip


def status(code: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, good: handler.send(code, refusal(code, f"fault {code}"), named)


def instead(answer: Any) -> Fault:
    return lambda handler, good: handler.send(200, answer)


def changed(**choice: Any) -> Fault:
    """Fields of the choice replaced; None leaves the field out."""

    def fault(handler: Handler, good: dict[str, Any]) -> dict[str, Any]:
        new = good["choices"][0] | choice
        return good | {"choices": [{name: value for name, value in new.items() if value is not None}]}

    return fault


def silent(handler: Handler, good: dict[str, Any]) -> None:
    handler.server.let_go.wait(20)


def hang_up(handler: Handler, good: dict[str, Any]) -> None:
    handler.close_connection = True


def cut(handler: Handler, good: dict[str, Any]) -> None:
    handler.send(200, json.dumps(good).encode()[:-20])


def dripping(handler: Handler, good: dict[str, Any]) -> None:
    """A byte now and then: no single wait is long."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.let_go.wait(0.02):
        handler.wfile.write(b" ")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("no_proxy", "*")
    with Stub() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.let_go.set()
        running.shutdown()
        assert not running.unmet, running.unmet


def judge(stub: Stub, **settings: Any) -> ServerJudge:
    defaults: dict[str, Any] = {
        "url": stub.url(), "model": "teacher", "thinking": THINKING, "timeout": 30.0, "retries": 2, "concurrency": 1,
        "temperature": 0.8, "max_tokens": 40, "sleep": lambda seconds: None,
    }  # fmt: skip
    return ServerJudge(**defaults | settings)


def expected(trace: str) -> tuple[float, ...]:
    found = odds(trace)
    return tuple(found.get(level, 0.0) / sum(found[known] for known in LEVELS[:8]) for level in LEVELS)


def test_every_item_gets_its_traces_and_their_distributions(stub: Stub) -> None:
    answers = judge(stub).judge(ITEMS, traces=3, seed=1)
    assert [len(row) for row in answers] == [3, 3]
    assert len(set(stub.seeds())) == 6
    seeds = iter(stub.seeds())
    for i, row in enumerate(answers):
        for one in row:
            assert isinstance(one, Judgement)
            assert one.trace == f"seed {next(seeds)}\n\nitem {i}"
            assert one.ended and one.tokens == 12
            assert one.probabilities == pytest.approx(expected(one.trace), abs=1e-12)
            assert one.probabilities[8] == 0 and sum(one.probabilities) == pytest.approx(1, abs=1e-12)
    assert stub.keys == [None] * 12


def test_seeds_hang_on_the_call_and_the_item_alone(stub: Stub) -> None:
    both = judge(stub).judge(ITEMS, traces=2, seed=1)
    assert judge(stub).judge(ITEMS[1:], traces=2, seed=1) == both[1:]
    other = judge(stub).judge(ITEMS, traces=2, seed=2)
    assert not {one.trace for row in both for one in row} & {one.trace for row in other for one in row}  # type: ignore[union-attr]


def test_the_order_of_the_answers_does_not_matter(stub: Stub) -> None:
    alone = judge(stub).judge(ITEMS, traces=4, seed=3)
    order: list[str] = []
    enough = threading.Event()

    def first_is_last(handler: Handler, good: dict[str, Any]) -> dict[str, Any]:
        assert enough.wait(20)
        order.append("first")
        return good

    def note(handler: Handler, good: dict[str, Any]) -> dict[str, Any]:
        order.append("later")
        if len(order) == 6:
            enough.set()
        return good

    stub.plan["trace"] = [first_is_last]
    stub.always["trace"] = note
    assert judge(stub, concurrency=4).judge(ITEMS, traces=4, seed=3) == alone
    assert order.index("first") >= 6


@pytest.mark.parametrize("kind", ["trace", "score"])
@pytest.mark.parametrize(
    "fault",
    [status(503), status(500), status(429), status(408), hang_up, cut, instead([1]), instead({"choices": []}),
     instead(b"[" * 100_000), instead({"choices": [7]})],
    ids=["503", "500", "429", "408", "hang up", "cut", "list", "no choices", "nested", "no choice"],
)  # fmt: skip
def test_a_passing_fault_changes_nothing(stub: Stub, kind: str, fault: Fault) -> None:
    well = judge(stub).judge(ITEMS[:1], traces=1, seed=1)
    stub.asked.clear()
    stub.plan[kind] = [fault, fault]
    assert judge(stub).judge(ITEMS[:1], traces=1, seed=1) == well
    assert Counter(name for name, _ in stub.asked)[kind] == 3
    assert len(set(stub.seeds())) == 1


@pytest.mark.parametrize("fault", [silent, dripping])
def test_a_time_out_is_tried_again(stub: Stub, fault: Fault) -> None:
    stub.plan["trace"] = [fault]
    started = time.monotonic()
    (row,) = judge(stub, timeout=2.0).judge(ITEMS[:1], traces=1, seed=1)
    assert isinstance(row[0], Judgement) and len(stub.seeds()) >= 2
    assert 2 <= time.monotonic() - started < 15


def test_pauses_grow_within_bounds_and_are_the_same_again(stub: Stub) -> None:
    stub.always["trace"] = status(500)
    runs = []
    for _ in range(2):
        pauses: list[float] = []
        patient = judge(stub, retries=7, unscorable_share=1.0, sleep=pauses.append)
        assert patient.judge(ITEMS[:1], traces=1, seed=1) == [[Unscorable("the server answered 500: fault 500")]]
        runs.append(pauses)
    assert runs[0] == runs[1] and len(runs[0]) == 7
    for attempt, pause in enumerate(runs[0]):
        assert 0.5 <= pause / min(30, 2**attempt) < 1.5
    assert len({round(pause / min(30, 2**n), 6) for n, pause in enumerate(runs[0])}) == 7


def test_retry_after_is_honoured_up_to_a_bound(stub: Stub) -> None:
    date = email.utils.formatdate(time.time() + 45, usegmt=True)
    stub.plan["trace"] = [status(429, Retry_After=after) for after in ("17", "86400", date, "soon", "nan")]
    pauses: list[float] = []
    (row,) = judge(stub, retries=5, sleep=pauses.append).judge(ITEMS[:1], traces=1, seed=1)
    assert isinstance(row[0], Judgement)
    assert pauses[:2] == [17, 60]
    assert 30 < pauses[2] <= 45
    assert 4 <= pauses[3] < 12 and 8 <= pauses[4] < 24


def test_one_lost_row_leaves_the_others(stub: Stub) -> None:
    stub.plan["score"] = [None, status(500), status(500), status(500)]
    rows = judge(stub, unscorable_share=0.25).judge(ITEMS, traces=2, seed=1)
    kinds = [type(one) for row in rows for one in row]
    assert kinds == [Judgement, Unscorable, Judgement, Judgement]


def test_too_many_lost_rows_end_the_call_at_once(stub: Stub) -> None:
    stub.plan["trace"] = [None] + [status(500)] * 3 + [cut] * 6
    with pytest.raises(
        DataError, match=r"(?s)3 of the first 4 .*20 were asked .*10%.*cut off \(2 times\); .*500.*\(1 t"
    ):
        judge(stub, unscorable_share=0.1).judge(ITEMS, traces=10, seed=1)
    time.sleep(0.1)
    assert len(stub.seeds()) <= 11  # 10 for four rows; one row at most had been handed out behind them
    assert judge(stub).unscorable_share == 0.05


def test_a_server_that_is_not_there(stub: Stub) -> None:
    stub.shutdown()
    stub.server_close()
    pauses: list[float] = []
    with pytest.raises(DataError, match=r"1 of the first 1 .*the connection failed"):
        judge(stub, sleep=pauses.append).judge(ITEMS, traces=1, seed=1)
    assert len(pauses) >= 2


TEXT = "I see a fox.\n\nIt is red."


@pytest.mark.parametrize(
    ("message", "finish", "ended"),
    [
        ({"content": f"{TEXT}\n</think>"}, "stop", True),
        ({"content": f"{TEXT}\n"}, "stop", True),  # the stop string is not kept
        ({"content": f"<think>\n{TEXT}\n</think>\n\nalignment=7"}, "stop", True),
        ({"content": f"<think>\n{TEXT}\n</think>\n\nalignment=7 and so"}, "length", True),  # `stop` is not heeded
        ({"content": f"{TEXT}\n"}, "length", False),
        ({"content": None, "reasoning": f"{TEXT}\n"}, "stop", True),
        ({"content": None, "reasoning": f"{TEXT}\n"}, "length", False),
        ({"content": "alignment=7", "reasoning": f"\n{TEXT}\n"}, "length", True),
        ({"content": "", "reasoning_content": f"{TEXT}\n"}, "stop", True),
        ({"content": "alignment=7", "reasoning": "", "reasoning_content": TEXT}, "stop", True),
    ],
)
def test_where_servers_put_the_reasoning(stub: Stub, message: dict[str, Any], finish: str, ended: bool) -> None:
    stub.always["trace"] = changed(message={"role": "assistant", **message}, finish_reason=finish)
    ((one,),) = judge(stub).judge(ITEMS[:1], traces=1, seed=1)
    assert isinstance(one, Judgement)
    assert (one.trace, one.ended) == (TEXT, ended)
    assert one.probabilities == pytest.approx(expected(TEXT))


@pytest.mark.parametrize(
    ("fault", "reason", "attempts"),
    [
        # twelve tokens were sampled, and the server shows none of them
        (changed(message={"content": None, "reasoning": None}), "the answer has no text", 3),
        (changed(message={"content": ""}, finish_reason="length"), "the answer has no text", 3),
        (changed(message={"content": [1]}), "not text", 3),
        (changed(message=None), "no message", 3),
        (changed(finish_reason="abort"), "finished with 'abort'", 3),
        (changed(message={"content": "so <think> again"}), "writes <think> again", 1),
    ],
)
def test_a_trace_that_is_none(stub: Stub, fault: Fault, reason: str, attempts: int) -> None:
    stub.always["trace"] = fault
    ((one,),) = judge(stub, unscorable_share=1.0).judge(ITEMS[:1], traces=1, seed=1)
    assert isinstance(one, Unscorable) and reason in one.reason and "\n" not in one.reason
    assert len(stub.asked) == attempts


@pytest.mark.parametrize(("finish", "tokens", "content"), [
    ("stop", 12, " \n</think>"), ("stop", 2, None), ("length", 40, "\n \n"), ("stop", 2, "</think>"),
])  # fmt: skip
def test_an_empty_trace_is_closed_and_judged(stub: Stub, finish: str, tokens: int, content: str | None) -> None:
    def empty(handler: Handler, good: dict[str, Any]) -> dict[str, Any]:
        answer = changed(message={"content": content, "reasoning": None}, finish_reason=finish)(handler, good)
        assert answer is not None
        return answer | {"usage": {"completion_tokens": tokens}}

    stub.always["trace"] = empty
    ((one,),) = judge(stub).judge(ITEMS[:1], traces=1, seed=1)
    assert isinstance(one, Judgement)
    assert (one.trace, one.ended, one.tokens) == ("", finish == "stop", tokens)
    assert one.probabilities == pytest.approx(expected(""))


def test_no_text_and_no_count_is_no_empty_trace(stub: Stub) -> None:
    def hidden(handler: Handler, good: dict[str, Any]) -> dict[str, Any]:
        answer = changed(message={"content": None})(handler, good)
        assert answer is not None
        return {"choices": answer["choices"]}

    stub.always["trace"] = hidden
    ((one,),) = judge(stub, unscorable_share=1.0).judge(ITEMS[:1], traces=1, seed=1)
    assert isinstance(one, Unscorable) and "no text" in one.reason


@pytest.mark.parametrize("trace", ["it has a dog", ""])
def test_qwens_templates_find_the_message_to_continue(stub: Stub, trace: str) -> None:
    """The shipped rubric's closing text through a template that splits reasoning off as Qwen3.5's does, rendered by
    transformers, as vLLM does it: a message that is not found again is refused."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{% for m in messages %}{% set told, said = '', m.content %}{% if '</think>' in said %}"
        "{% set told = said.split('</think>')[0].split('<think>')[-1]|trim %}"
        "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "<|im_start|>{{ m.role }}\n<think>\n{{ told }}\n</think>\n\n{{ said }}<|im_end|>\n{% endfor %}"
    )
    close = load_rubric().thinking.close  # type: ignore[union-attr]
    stub.close_text = f"\n{close}"
    stub.always["trace"] = changed(message={"content": f"{trace}\n</think>"})
    thinking = Conversation(THINKING.question, close, READS, LEVELS, THINKING.system)
    ((one,),) = judge(stub, thinking=thinking).judge(ITEMS[:1], traces=1, seed=1)
    assert isinstance(one, Judgement) and one.trace == trace
    message = stub.asked[-1][1]["messages"][-1]
    ((text,), _) = render_jinja_template([[message]], chat_template=template, continue_final_message=True)
    assert text == f"<|im_start|>assistant\n<think>\n{trace}\n</think>\n\n{READS[0]}"


def test_a_server_that_counts_no_tokens(stub: Stub) -> None:
    stub.always["trace"] = lambda handler, good: {name: good[name] for name in ("choices",)}
    ((one,),) = judge(stub).judge(ITEMS[:1], traces=1, seed=1)
    assert isinstance(one, Judgement) and one.tokens is None


def scored(stub: Stub, *places: dict[str, float], reads: tuple[str, ...] = READS) -> Judgement | Unscorable:
    stub.read = reads
    stub.always["score"] = lambda handler, good: score_answer(*places)
    conversation = Conversation(THINKING.question, CLOSE, reads, LEVELS, THINKING.system)
    ((one,),) = judge(stub, thinking=conversation, unscorable_share=1.0).judge(ITEMS[:1], traces=1, seed=1)
    return one


def test_levels_that_are_not_listed(stub: Stub) -> None:
    """Two are missing, each at most as probable as the last that is listed."""
    seven = dict.fromkeys(LEVELS[:7], 0.1)
    one = scored(stub, seven | {"the": 0.25, "x": 0.0035})
    assert isinstance(one, Judgement)  # 0.007 of 0.707 may be lost
    assert one.probabilities == pytest.approx((*[1 / 7] * 7, 0, 0))
    assert scored(stub, seven | {"the": 0.25, "x": 0.0036}) == Unscorable(
        "levels that the server does not list may hold more than 1% of the probability"
    )


def test_the_levels_as_servers_print_them(stub: Stub) -> None:
    plain = {level: 0.02 * k for k, level in enumerate(LEVELS, 1)}
    want = tuple(k / 45 for k in range(1, 10))
    for mark in ("", " ", "\u2581"):
        one = scored(stub, {mark + level: p for level, p in plain.items()} | {"x": 0.001})
        assert isinstance(one, Judgement) and one.probabilities == pytest.approx(want), mark
    # the token right behind the prefix is the level, whatever " 9" means
    one = scored(stub, plain | {" 9": 0.05})
    assert isinstance(one, Judgement) and one.probabilities == pytest.approx(want)


def test_a_template_that_trims_the_prefix(stub: Stub) -> None:
    """The model writes the space that is missing, and the level is read behind it; behind no other space."""
    plain = {level: 0.02 * k for k, level in enumerate(LEVELS, 1)}
    reads = ("alignment: ", "realism: ")
    for places in ([{" ": 0.99}, plain], [plain, {"x": 0.9}]):
        one = scored(stub, *places, reads=reads)
        assert isinstance(one, Judgement) and one.probabilities == pytest.approx(tuple(k / 45 for k in range(1, 10)))
    assert isinstance(scored(stub, {"\n": 0.99}, plain, reads=reads), Unscorable)
    assert isinstance(scored(stub, {" ": 0.99}, plain, reads=READS), Unscorable)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"The": 0.95, **dict.fromkeys(LEVELS, 0.004)}, "less than 10% of the probability"),
        ({"The": 0.95, "I": 0.02}, "less than 10% of the probability"),
        ({level: math.exp(4) for level in LEVELS}, "not log-probabilities"),
    ],
)
def test_a_place_where_no_level_stands(stub: Stub, place: dict[str, float], reason: str) -> None:
    one = scored(stub, place)
    assert isinstance(one, Unscorable) and reason in one.reason


@pytest.mark.parametrize(
    "logprobs",
    [None, {"content": []}, {"content": [{"token": "5"}]}, {"content": [{"token": "5", "logprob": math.nan}]},
     {"content": [{"token": 5, "logprob": 0.0}]}, {"content": [{"token": "5", "logprob": 1e9}]}],
)  # fmt: skip
def test_an_answer_without_log_probabilities(stub: Stub, logprobs: Any) -> None:
    stub.always["score"] = changed(logprobs=logprobs)
    ((one,),) = judge(stub, unscorable_share=1.0).judge(ITEMS[:1], traces=1, seed=1)
    assert isinstance(one, Unscorable) and "log-probabilities" in one.reason
    assert Counter(kind for kind, _ in stub.asked) == {"trace": 1, "score": 3}


def test_a_wrong_model_name(stub: Stub) -> None:
    with pytest.raises(RecipeError, match="serves no model 'taecher'; it serves teacher, lora"):
        judge(stub, model="taecher").judge(ITEMS, traces=2, seed=1)
    assert len(stub.keys) == 1


def test_the_key(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", " sesame\n")
    keyed = judge(stub, key_variable="TEACHER_KEY", concurrency=2)
    keyed.judge(ITEMS, traces=1, seed=1)
    assert set(stub.keys) == {"Bearer sesame"} and "sesame" not in repr(keyed)
    stub.plan["trace"] = [status(401)]
    with pytest.raises(RecipeError, match=r"401: fault 401.*environment variable TEACHER_KEY") as caught:
        judge(stub, key_variable="TEACHER_KEY").judge(ITEMS, traces=1, seed=1)
    assert "sesame" not in str(caught.value)
    stub.plan["trace"] = [status(401)]
    with pytest.raises(RecipeError, match="give the variable's name as key_variable"):
        judge(stub).judge(ITEMS, traces=1, seed=1)
    for value, wrong in (("", "not set"), ("two\nlines", "no key"), ("schlüssel", "no key")):
        monkeypatch.setenv("TEACHER_KEY", value)
        with pytest.raises(RecipeError, match=f"TEACHER_KEY.* is {wrong}"):
            keyed.judge(ITEMS, traces=1, seed=1)


def test_refusals_are_mistakes_of_the_recipe(stub: Stub) -> None:
    stub.plan["trace"] = [None, status(400)]
    with pytest.raises(RecipeError, match=r"item 1 \(400: fault 400"):
        judge(stub).judge(ITEMS, traces=1, seed=1)
    assert len(stub.seeds()) == 2
    with pytest.raises(RecipeError, match=r"no /chat/completions \(Not Found"):
        judge(stub, url=stub.url().replace("/v1", "/api")).judge(ITEMS, traces=1, seed=1)


def test_the_key_does_not_follow_a_redirect(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    for code in (302, 307, 308):
        stub.keys.clear()
        stub.plan["trace"] = [status(code, Location=stub.url() + "/elsewhere")]
        with pytest.raises(RecipeError, match=r"redirects to .*/elsewhere; give the address itself"):
            judge(stub, key_variable="TEACHER_KEY").judge(ITEMS, traces=1, seed=1)
        assert len(stub.keys) == 1


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_url_as_people_write_it(stub: Stub, end: str) -> None:
    one = judge(stub, url=stub.url().removesuffix("/v1") + end)
    assert isinstance(one.judge(ITEMS[:1], traces=1, seed=1)[0][0], Judgement)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"url": "localhost:8000/v1"}, "url"), ({"url": "http://"}, "url"), ({"url": "http://h/v1?key=1"}, "url"),
        ({"url": "http://h:port/v1"}, "url"), ({"url": "http://h\u00f6st"}, "url"), ({"url": "http://[::1/"}, "url"),
        ({"url": "http://me:secret@h/v1"}, "without user or password"), ({"url": "http://h /v1"}, "url"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": math.nan}, "timeout"), ({"retries": -1}, "retries"), ({"concurrency": 0}, "concurrency"),
        ({"temperature": -1}, "temperature"), ({"max_tokens": 0}, "max_tokens"), ({"unscorable_share": 5}, "share"),
        ({"thinking": Conversation(THINKING.question, "\n", READS, LEVELS)}, "close"),
        ({"thinking": Conversation(THINKING.question, CLOSE, READS, ("1", "2", "1"))}, "levels"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(settings: dict[str, Any], named: str) -> None:
    defaults = {"url": "http://localhost:8000/v1", "model": "teacher", "thinking": THINKING}
    with pytest.raises(RecipeError, match=named) as caught:
        ServerJudge(**defaults | settings)
    assert "secret" not in str(caught.value)


def test_a_picture_without_colours(stub: Stub) -> None:
    with pytest.raises(NonFiniteError):
        judge(stub).judge([(torch.full((3, 4, 4), math.nan), "a fox", 0)], traces=1, seed=1)
    assert judge(stub).judge([], traces=1, seed=1) == []


def test_requests_under_way_at_once(stub: Stub) -> None:
    """As many as `concurrency`, and never more."""
    under_way: dict[str, int] = defaultdict(int)
    lock, full = threading.Lock(), threading.Event()

    def count(handler: Handler, good: dict[str, Any]) -> dict[str, Any]:
        with lock:
            under_way["now"] += 1
            under_way["most"] = max(under_way["most"], under_way["now"])
            if under_way["now"] == 3:
                full.set()
        assert full.wait(20)
        with lock:
            under_way["now"] -= 1
        return good

    stub.always["trace"] = count
    judge(stub, concurrency=3).judge(ITEMS, traces=6, seed=1)
    assert under_way["most"] == 3


def test_pictures_are_prepared_only_a_little_ahead(stub: Stub) -> None:
    prepared: list[int] = []

    def question(prompt: str, dimension: int) -> tuple[str, str]:
        prepared.append(dimension)
        return THINKING.question(prompt, dimension)

    def wait(handler: Handler, good: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.3)
        seen.append(len(prepared))
        return good

    seen: list[int] = []
    stub.plan["trace"] = [wait]
    watched = Conversation(question, CLOSE, READS, LEVELS, THINKING.system)
    judge(stub, thinking=watched).judge(ITEMS[:1] * 30, traces=1, seed=1)
    assert seen[0] <= 3 and len(prepared) == 30  # two handed out, the third in hand
