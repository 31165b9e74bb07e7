"""Judgements of a teacher behind an OpenAI-compatible server: a reasoning trace, then the probabilities of the levels.

For distillation (RISD, Z-Reward, arXiv 2606.09076, section 5), where the teacher is frozen and may run elsewhere. The
local counterpart reads the same place with `model.py`. Written against vLLM's `/v1/chat/completions` as of its main
branch in autumn 2026 (vllm/entrypoints/openai/chat_completion/protocol.py). Beyond OpenAI's own fields it uses
`continue_final_message`, `add_generation_prompt`, `include_stop_str_in_output`, `chat_template_kwargs`, `top_k`,
`min_p` and `repetition_penalty`; a server that does not continue the assistant's message is noticed by `LEAST_MASS`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from rewardtune.data.images import data_url, to_pil
from rewardtune.errors import RecipeError
from rewardtune.randomness import key
from rewardtune.serving import connection
from rewardtune.serving.connection import (
    Connection,
    Dropped,
    Fault,
    Refused,
    Unscorable,
    ask_each,
    first_choice,
    in_order,
    json_object,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

T = TypeVar("T")
Item = tuple["Image.Image | Tensor", str, int]
"""Image, prompt, index of the dimension."""

LOST_MASS = 0.01
"""Largest share of the closed set that unlisted levels may hold. Ours, like the two below."""
LEAST_MASS = 0.1
"""Least probability of all levels together: below, the server did not read where it was asked to."""
UNSCORABLE_SHARE = 0.05

OPEN = "<think>\n"
SHUT = "</think>"
SILENT = 8
"""Ours: sampled tokens up to which an answer without any text is a model that closed at once; the closing text itself
takes two or three. With more, the server keeps the trace to itself."""
TOP = 20
"""Tokens listed a place: OpenAI's most, and what a vLLM server allows by default (`--max-logprobs`)."""

# vLLM fills what a request leaves out from the model's generation_config.json (for Qwen's models top_k 20 and top_p
# 0.95), unless started with `--generation-config vllm`. The traces are to come from the model's own distribution.
UNFILTERED = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
              "repetition_penalty": 1.0}  # fmt: skip
# Qwen3.5's small checkpoints do not think unless told to; templates without this variable ignore it.
TEMPLATE = {"enable_thinking": True}


@dataclass(frozen=True)
class Conversation:
    """What is asked, how the reasoning is closed, and where the level stands. The chat template is the server's.

    question: (prompt, dimension) -> text before and text after the image, either may be empty. close: ends the
    reasoning, such as "\\n</think>\\n\\n". reads: for each dimension the text after `close` whose next token is the
    level. levels: the level tokens, lowest first. system: text of a system message.
    """

    question: Callable[[str, int], tuple[str, str]]
    close: str
    reads: tuple[str, ...]
    levels: tuple[str, ...]
    system: str | None = None


@dataclass(frozen=True)
class Judgement:
    """One reasoning trace and the distribution read after it.

    trace: as text, empty where the model closed its reasoning at once, which is a judgement like any other (see
    `reasoning.py`). ended: whether the model closed its reasoning; False when it was cut at `max_tokens`.
    probabilities: one per level, their sum is 1. tokens: sampled for the trace, None when the server does not say.
    """

    trace: str
    ended: bool
    probabilities: tuple[float, ...]
    tokens: int | None


@dataclass(frozen=True)
class ServerJudge:
    """A teacher on a server.

    url: up to and including `/v1`. key_variable: name of the environment variable that holds the key, None for a
    server without one. timeout: seconds for one request, the whole trace included. retries: further attempts after a
    failed one. concurrency: requests under way at once. temperature, max_tokens: of the traces. unscorable_share:
    most that a call may lose. sleep: waits the given seconds. Raises RecipeError for settings that cannot work.
    """

    url: str
    model: str
    thinking: Conversation
    key_variable: str | None = None
    timeout: float = 600.0
    retries: int = 5
    concurrency: int = 16
    temperature: float = 1.0
    max_tokens: int = 1024
    unscorable_share: float = UNSCORABLE_SHARE
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        levels = self.thinking.levels
        wrong = [
            (not connection.is_address(self.url), f"url: {connection.ADDRESS}"),
            (not 0 < self.timeout < math.inf, "timeout: more than 0 seconds"),
            (self.retries < 0, "retries: 0 or more"),
            (self.concurrency < 1, "concurrency: 1 or more"),
            (not 0 <= self.temperature < math.inf, "temperature: 0 or more"),
            (self.max_tokens < 1, "max_tokens: 1 or more"),
            (not 0 <= self.unscorable_share <= 1, "unscorable_share: from 0 to 1"),
            (not self.thinking.close.strip(), "thinking.close: more than white space"),
            (len(levels) < 2 or len(set(levels)) < len(levels), "thinking.levels: two or more, all different"),
        ]
        if any(is_so for is_so, _ in wrong):
            raise RecipeError(f"judge on a server: {'; '.join(text for is_so, text in wrong if is_so)}.")

    @property
    def base(self) -> str:
        """The url with one `/v1` at its end."""
        return connection.base(self.url)

    def judge(self, items: Sequence[Item], *, traces: int, seed: int) -> list[list[Judgement | Unscorable]]:
        """`traces` judgements of every item, in the order of the items.

        items: (image, prompt, dimension); the image an RGB picture or (3, H, W) in [0, 1]. A trace's seed depends on
        `seed`, the item's own content and the trace's number: not on other items, so a long list may be judged in
        parts; the same item twice gets the same seeds. Whether the server then repeats itself is its own affair (vLLM
        does with VLLM_BATCH_INVARIANT=1).

        Raises RecipeError when the server refuses the request, and DataError as soon as more than `unscorable_share`
        of all rows are unscorable.
        """
        return in_order(self.judge_each(items, traces=traces, seed=seed))

    def judge_each(
        self, items: Sequence[Item], *, traces: int, seed: int
    ) -> Iterator[tuple[int, list[Judgement | Unscorable]]]:
        """As `judge`: an item's place and its judgements as soon as all of these are there, whatever the order."""
        assert traces >= 1, "a judgement needs a trace"
        secret = connection.key_from_environment(self.key_variable)
        line = Connection(
            connection.base(self.url), key=secret, timeout=self.timeout, retries=self.retries, sleep=self.sleep
        )
        # pictures are encoded on the way, once an item and only a few ahead: all of them may not fit in memory
        found = ask_each(
            line, self._rows(items, traces, seed), lambda row: self._judgement(line, row), total=len(items) * traces,
            concurrency=self.concurrency, share=self.unscorable_share, noun="judgements",
            hint="Look at the server's log, or allow more with unscorable_share.",
        )  # fmt: skip
        said: dict[int, dict[int, Judgement | Unscorable]] = {}
        for number, answer in found:
            item, trace = divmod(number, traces)
            said.setdefault(item, {})[trace] = answer
            if len(said[item]) == traces:
                whole = said.pop(item)
                yield item, [whole[t] for t in range(traces)]

    def _rows(self, items: Sequence[Item], traces: int, seed: int) -> Iterator[_Row]:
        for i, (image, prompt, dimension) in enumerate(items):
            picture = as_picture(image)
            content = repr((picture.size, str(prompt), dimension)).encode() + picture.tobytes()
            name = hashlib.sha256(content).hexdigest()
            messages = self._messages(picture, str(prompt), dimension)
            for t in range(traces):
                # 31 bits: servers differ in what they take for a seed
                yield _Row(i, dimension, key(seed, f"server/{name}", t) % 2**31, messages)

    def _messages(self, picture: Image.Image, prompt: str, dimension: int) -> list[dict[str, Any]]:
        before, after = self.thinking.question(prompt, dimension)
        content: list[dict[str, Any]] = [
            *([{"type": "text", "text": before}] if before else []),
            {"type": "image_url", "image_url": {"url": data_url(picture)}},
            *([{"type": "text", "text": after}] if after else []),
        ]
        system = [{"role": "system", "content": self.thinking.system}] if self.thinking.system else []
        return [*system, {"role": "user", "content": content}]

    def _judgement(self, line: Connection, row: _Row) -> Judgement | Unscorable:
        thinking = self.thinking
        shared = {"model": self.model, "chat_template_kwargs": TEMPLATE, **UNFILTERED}
        asked = shared | {
            "messages": row.messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": row.seed,
            # without the white space, which tokenizers join with what stands before and after
            "stop": [thinking.close.strip()],
            # a server's reasoning parser looks for it
            "include_stop_str_in_output": True,
        }
        try:
            trace, ended, tokens = self._ask(line, row, "trace", asked, lambda answer: _trace(answer, thinking.close))
            if OPEN.strip() in trace:
                # Qwen's templates keep only what stands behind the last one, and the server would refuse the rest
                raise Dropped(f"the trace writes {OPEN.strip()} again")
            read = thinking.reads[row.dimension]
            # Qwen's templates write a line break here, as the model does; `_trace` has taken it off with the outer
            # white space, and without it the server would not find the message to continue
            line_break = "\n" if thinking.close.startswith(SHUT) else ""
            continued = {"role": "assistant", "content": f"{OPEN}{trace}{line_break}{thinking.close}{read}"}
            score = shared | {
                "messages": [*row.messages, continued],
                "continue_final_message": True,
                "add_generation_prompt": False,
                # Greedy: a sampled token from outside the list would take the last place in it. The listed values are
                # those before temperature and filters (vLLM's default, `--logprobs-mode raw_logprobs`).
                "temperature": 0.0,
                # Templates that trim (Qwen3.5's) take the space off the end of "alignment: "; the model writes it
                "max_tokens": 2 if read != read.rstrip() else 1,
                "logprobs": True,
                "top_logprobs": TOP,
                # No `structured_outputs`: vLLM masks the logits before it takes the log-probabilities, so a place where
                # no level stands would look like one. `allowed_token_ids`, and `logprob_token_ids` of newer releases,
                # want ids of the server's tokenizer.
            }
            levels = self._ask(line, row, "score", score, lambda answer: read_levels(answer, read, thinking.levels))
        except Dropped as error:
            return Unscorable(" ".join(str(error).split()))
        return Judgement(trace, ended, levels, tokens)

    def _ask(
        self, line: Connection, row: _Row, step: str, body: dict[str, Any], read: Callable[[dict[str, Any]], T]
    ) -> T:
        try:
            return line.ask(
                f"{line.base}/chat/completions", body, lambda raw: read(json_object(raw)), seed=row.seed, step=step
            )  # fmt: skip
        except Refused as refused:
            raise self._mistake(line, row, refused) from None

    def _mistake(self, line: Connection, row: _Row, refused: Refused) -> RecipeError:
        if refused.status in (401, 403):
            return line.no_access(refused)
        models = line.models()
        if models is not None and self.model not in models:
            return RecipeError(
                f"{line.base} serves no model {self.model!r}; it serves {', '.join(models) or 'none'}. Give one of "
                "these as model."
            )
        if refused.status == 404:
            return RecipeError(
                f"{line.base} has no /chat/completions ({refused.said}). Give the address up to /v1 as url."
            )
        return RecipeError(
            f"{line.base} refuses the request for item {row.item} ({refused}). Check max_tokens against the server's "
            "longest context, and that it takes pictures, log-probabilities and continue_final_message."
        )


@dataclass(frozen=True)
class _Row:
    item: int
    dimension: int
    seed: int
    messages: list[dict[str, Any]]


# -------------------------------------------------------------------------------------------------------- the answers


def _trace(answer: dict[str, Any], close: str) -> tuple[str, bool, int | None]:
    """Text of the trace without its frame and outer white space, whether it ended, tokens sampled.

    The outer white space goes because chat templates take it off too, and then do not find the message to continue.
    """
    found = first_choice(answer)
    message, finish = found.get("message"), found.get("finish_reason")
    if not isinstance(message, dict):
        raise Fault("the answer has no message")
    if finish not in ("stop", "length"):
        # vLLM also has abort, error and repetition
        raise Fault(f"the trace finished with {finish!r}")
    # Where a reasoning parser runs: `reasoning` (vLLM's pull request 27752, November 2025) or, before it and on other
    # servers, `reasoning_content`. Some parsers leave a trace without its closing text in `content`.
    texts = [message.get(name) for name in ("reasoning", "reasoning_content", "content")]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise Fault("the answer's message is not text")
    reasoning, content = texts[0] or texts[1] or "", texts[2] or ""
    usage = answer.get("usage")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens = counted if isinstance(counted, int) else None
    if not (reasoning or content) and (finish != "stop" or tokens is None or tokens > SILENT):
        # not even the closing text that was asked for: nothing says that the model closed at once
        raise Fault("the answer has no text")
    whole = (reasoning or content).strip().removeprefix(OPEN.strip())
    trace, closed, _ = whole.partition(close.strip())
    ended = finish == "stop" or bool(closed) or bool(reasoning and content)
    return trace.strip(), ended, tokens


def read_levels(
    answer: dict[str, Any], read: str, levels: Sequence[str], *,
    hint: str = "does the server continue the assistant's message?",
) -> tuple[float, ...]:  # fmt: skip
    """Probabilities of the levels, renormalised over them: softmax over the closed set (Z-Reward, section 3).

    read: the text before the level, which is the answer's first token, or its second where `read` ends with a space and
    the first token is that. hint: what may be wrong where no level stands. Raises Fault for an answer of another form,
    Dropped where another attempt would say the same.
    """
    logprobs = first_choice(answer).get("logprobs")
    places = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(places, list) or not places:
        raise Fault("the answer has no log-probabilities (does the server offer logprobs and top_logprobs?)")
    space = read[len(read.rstrip()) :]
    first, *others = [_listed(place) for place in places]
    # The template has trimmed the score prefix and the model has written the space: the level stands behind it. Any
    # other space would not be what was asked.
    _, listed = others[0] if space and others and first[0] == space else first
    if sum(listed.values()) > 1.01:
        raise Dropped("the listed values are not log-probabilities (is the server's --logprobs-mode raw_logits?)")
    # the token after the prefix, as `rubric.py` has it; or as tokenizers print it that keep the space with the word
    found = {k: listed[level] for k, level in enumerate(levels) if level in listed} or {
        k: listed[f" {level}"] for k, level in enumerate(levels) if f" {level}" in listed
    }
    mass = sum(found.values())
    if mass < LEAST_MASS:
        raise Dropped(f"the levels hold less than {LEAST_MASS:.0%} of the probability after the score prefix ({hint})")
    # a token that is not listed is at most as probable as the last one that is
    lost = (len(levels) - len(found)) * min(listed.values())
    if lost > LOST_MASS * (mass + lost):
        raise Dropped(f"levels that the server does not list may hold more than {LOST_MASS:.0%} of the probability")
    return tuple(found.get(k, 0.0) / mass for k in range(len(levels)))


def _listed(place: Any) -> tuple[str, dict[str, float]]:
    """The token that was sampled, and the probability of each that is listed."""
    try:
        entries = [(entry["token"].replace("\u2581", " "), float(entry["logprob"])) for entry in
                   [place, *(place.get("top_logprobs") or [])]]  # fmt: skip
        # two tokens may print alike (half a character each); a level never does, so the first is as good as the second
        listed = {token: math.exp(value) for token, value in reversed(entries)}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise Fault("the answer's log-probabilities are malformed") from None
    if not all(map(math.isfinite, listed.values())):
        raise Fault("the answer's log-probabilities are not numbers")
    return entries[0][0], listed


def as_picture(image: Image.Image | Tensor) -> Image.Image:
    """RGB, of 8 bits; a tensor is (3, H, W) in [0, 1]."""
    from PIL import Image

    return image.convert("RGB") if isinstance(image, Image.Image) else to_pil(image[None])[0]
