"""`http-judge`: any vision-language model behind an OpenAI-compatible server, asked by a rubric or in a known format.

No gradient: for `compare`, `guard` and `score`. An answer that cannot be read is asked for again, then an error; it is
never a number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator

from rewardtune.errors import DataError, RecipeError
from rewardtune.plugins import Options, RewardCard
from rewardtune.randomness import key
from rewardtune.scorer.rubric import Rubric, around_image, chat, filled, load_rubric
from rewardtune.scorer.text_scores import FORMATS, Unreadable, level, shown
from rewardtune.serving import connection
from rewardtune.serving.connection import Connection, Dropped, Fault, Refused, Unscorable, ask_each, in_order

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.types import Score

TOP = 20
"""Most tokens that OpenAI lists at a place."""
NO_LEVEL = (
    "does the model answer at once with a level? To one that thinks first, vLLM passes on "
    "request: {chat_template_kwargs: {enable_thinking: false}}"
)


class HttpJudge:
    """The judge, with the questions it asks."""

    card = RewardCard(
        name="http-judge",
        summary="a vision-language model behind an OpenAI-compatible server, asked by a rubric (level probabilities, "
        "or the level as text) or in the text formats of UnifiedReward and RationalRewards",
        differentiable=False,
        needs_prompt=True,
        range=None,
        licence_code="Apache-2.0",
        licence_weights="the served model's",
        known_when_loaded=True,
    )

    class Config(Options):
        """Options of `http-judge`."""

        url: str
        """Up to and including /v1."""
        served_model: str
        """The model's name on the server."""
        answer: Literal["probabilities", "level", "final-score", "unified-reward", "rational-rewards"] = "probabilities"
        """What is read: log-probabilities of the rubric's levels, the level as text, or a format of scores in text."""
        rubric: str | None = None
        """A rubric.json for `probabilities` and `level`; the shipped one when left out."""
        question: str | None = None
        """For the formats: a text file with {prompt}, best the wording that the model was trained with; else ours."""
        key_variable: str | None = None
        """Environment variable that holds the server's key; none is sent when left out."""
        temperature: Annotated[float, Field(ge=0.0)] = 0.0
        """Of the model's answers in text; at 0 the same question gets the same answer (ours)."""
        max_tokens: Annotated[int, Field(gt=0)] = 2048
        """Most tokens of an answer in text (ours, like the next four)."""
        repeats: Annotated[int, Field(ge=0)] = 2
        """Further answers asked for where one cannot be read, each with another seed and at temperature 1."""
        timeout: Annotated[float, Field(gt=0.0)] = 300.0
        """Seconds for one request."""
        retries: Annotated[int, Field(ge=0)] = 5
        """Further attempts after a dropped connection or a fault of the server."""
        concurrency: Annotated[int, Field(gt=0)] = 16
        """Requests under way at once."""
        request: dict[str, Any] = Field(default_factory=dict)
        """Further fields of each request that this server knows: {chat_template_kwargs: {enable_thinking: false}}."""

        @field_validator("url")
        @classmethod
        def _is_address(cls, url: str) -> str:
            if not connection.is_address(url):
                raise ValueError(connection.ADDRESS)
            return url

    def __init__(self, config: Config, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config, self._sleep = config, sleep
        self._rubric: Rubric | None = None
        names: tuple[str, ...] = ()
        if config.answer in FORMATS:
            self._question = _question(config)
            limits, scale = FORMATS[config.answer].range, FORMATS[config.answer].scale
        else:
            if config.question is not None:
                raise RecipeError(f"http-judge: answer {config.answer} is asked by `rubric`; leave `question` out.")
            self._rubric = load_rubric(config.rubric)
            self._system, self._question = chat(self._rubric.template, name="template")
            limits, scale = (self._rubric.values[0], self._rubric.values[-1]), 1.0
            names = self._rubric.dimensions if config.answer == "probabilities" else ()
        self.card = replace(
            type(self).card,
            summary=f"{config.served_model} at {config.url}, read as {config.answer}",
            range=limits,
            scale=scale,
            dimensions=names,
            models={config.served_model: "as served"},
            known_when_loaded=False,
        )

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Nothing is asked yet. RecipeError for a rubric or question that does not fit, or a missing key."""
        connection.key_from_environment(config.key_variable)
        return cls(config)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`; images are sent as PNG. Parts: each dimension's score, and `asked_again`, how many
        answers of an image could not be read.

        Raises RecipeError when the server refuses, DataError when it is gone or an answer cannot be read in the end.
        """
        import torch

        from rewardtune.data.images import data_url, to_pil
        from rewardtune.types import Score

        if len(prompts) != len(images):
            raise DataError(f"http-judge: {len(images)} images came with {len(prompts)} prompts; give one an image.")
        config, rubric = self.config, self._rubric
        line = Connection(
            connection.base(config.url), key=connection.key_from_environment(config.key_variable),
            timeout=config.timeout, retries=config.retries, sleep=self._sleep,
        )  # fmt: skip
        names = rubric.dimensions if rubric else ("",)
        rows = (
            _Row(i, self._messages(data_url(picture), str(prompt), name))
            for i, (picture, prompt) in enumerate(zip(to_pil(images), prompts, strict=True)) for name in names
        )  # fmt: skip
        found = in_order(ask_each(
            line, rows, lambda row: self._answer(line, row), total=len(prompts) * len(names),
            concurrency=config.concurrency, share=0.0, noun="answers",
            hint=f"Look at what {config.served_model} writes and at the server's log; `answer` says how it is read, "
            "`repeats` how often it is asked again.",
        ))  # fmt: skip
        answers = [answer for answer in found if isinstance(answer, _Answer)]
        again = torch.tensor([float(answer.again) for answer in answers]).view(len(prompts), -1).sum(1)
        if rubric is None:
            parts = (
                {name: torch.tensor([a.parts[name] for a in answers]) for name in answers[0].parts} if answers else {}
            )
            return _on(images, Score(torch.tensor([a.value for a in answers]), parts=parts | {"asked_again": again}))
        table, levels = torch.tensor([a.shares for a in answers]), torch.tensor(rubric.values)
        table = table.pow(1 / rubric.temperature).view(len(prompts), len(names), -1)
        table = table / table.sum(-1, keepdim=True)
        means = table @ levels
        parts = {name: means[:, d] for d, name in enumerate(names)} | {"asked_again": again}
        if config.answer == "level":
            return _on(images, Score(means.mean(-1), parts=parts))
        return _on(images, Score(means.mean(-1), table, levels, names, parts))

    def _messages(self, picture: str, prompt: str, dimension: str) -> list[dict[str, Any]]:
        image = {"type": "image_url", "image_url": {"url": picture}}
        if self._rubric is None:
            text = {"type": "text", "text": self._question.replace("{prompt}", prompt)}
            return [{"role": "user", "content": [image, text]}]
        before, after = around_image(filled(self._rubric, self._question, [dimension]), prompt)
        tokens = ", ".join(one.token for one in self._rubric.levels)
        after += f"\n\nAnswer for {dimension} with one of {tokens} and nothing else."
        content = [*([{"type": "text", "text": before}] if before else []), image, {"type": "text", "text": after}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, {"role": "user", "content": content}]

    def _answer(self, line: Connection, row: _Row) -> _Answer | Unscorable:
        reason = ""
        for again in range(self.config.repeats + 1):
            try:
                answer = line.ask(
                    f"{line.base}/chat/completions", self._body(row, again), self._read, seed=row.image, step="judge"
                )
                return replace(answer, again=again)
            except Unreadable as error:
                reason = str(error)
            except Dropped as error:
                return Unscorable(" ".join(str(error).split()))
            except Refused as refused:
                raise self._mistake(line, refused) from None
        return Unscorable(reason)

    def _body(self, row: _Row, again: int) -> dict[str, Any]:
        config = self.config
        # at temperature 0 the same request would be answered alike
        sampling = {"temperature": 1.0, "seed": key(row.image, "http-judge", again) % 2**31} if again else {
            "temperature": config.temperature}  # fmt: skip
        if config.answer == "probabilities":
            # a space or line break may come before the level
            read = {"max_tokens": 2, "logprobs": True, "top_logprobs": TOP}
        else:
            read = {"max_tokens": 8 if self._rubric else config.max_tokens}
        return {"model": config.served_model, "messages": row.messages, **sampling, **read, **config.request}

    def _read(self, raw: bytes) -> _Answer:
        """Raises Unreadable; Fault and Dropped as `Connection.ask` knows them."""
        found = connection.json_object(raw)
        rubric = self._rubric
        if rubric and self.config.answer == "probabilities":
            from rewardtune.scorer.server import read_levels

            tokens = [one.token for one in rubric.levels]
            try:
                return _Answer(shares=read_levels(found, " ", tokens, hint=NO_LEVEL))
            except Fault as fault:
                # asking again does not teach a server log-probabilities
                raise Dropped(f"{fault}. Where it has none, write answer: level") from None
        choice = connection.first_choice(found)
        message, finish = choice.get("message"), choice.get("finish_reason")
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise Unreadable(f"the answer has no text (it finished with {finish!r}; max_tokens may be too few)")
        try:
            if rubric:
                place = level(text, [one.token for one in rubric.levels])
                return _Answer(shares=tuple(float(k == place) for k in range(len(rubric.levels))))
            scores = FORMATS[self.config.answer].read(text)
        except Unreadable as error:
            cut = ", cut off at max_tokens" if finish == "length" else ""
            raise Unreadable(f"the answer {shown(text)}{cut} cannot be read as {self.config.answer}: {error}") from None
        return _Answer(value=scores.value, parts=scores.parts)

    def _mistake(self, line: Connection, refused: Refused) -> RecipeError:
        if refused.status in (401, 403):
            return line.no_access(refused)
        models = line.models()
        if models is not None and self.config.served_model not in models:
            return RecipeError(
                f"{line.base} serves no model {self.config.served_model!r}; it serves {', '.join(models) or 'none'}. "
                "Give one of these as served_model."
            )
        if refused.status == 404:
            return RecipeError(
                f"{line.base} has no /chat/completions ({refused.said}). Give the address up to /v1 as url."
            )
        return RecipeError(
            f"{line.base} refuses the request ({refused}). Check that it takes pictures and, for answer: "
            "probabilities, log-probabilities (logprobs, top_logprobs 20), and the fields of `request`."
        )


@dataclass(frozen=True)
class _Row:
    image: int
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class _Answer:
    """What one answer says: shares of the levels, or a value with parts. again: answers before it that said nothing."""

    shares: tuple[float, ...] = ()
    value: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    again: int = 0


def _question(config: HttpJudge.Config) -> str:
    """The question of a format. Raises RecipeError for a file that is none."""
    if config.rubric is not None:
        raise RecipeError(f"http-judge: answer {config.answer} is asked by `question`; leave `rubric` out.")
    if config.question is None:
        return FORMATS[config.answer].question
    path = Path(config.question).expanduser()
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"http-judge: the question {path} cannot be read ({error}).") from None
    if text.count("{prompt}") != 1:
        raise RecipeError(f"http-judge: the question {path} must hold {{prompt}} exactly once.")
    return text


def _on(images: Tensor, score: Score) -> Score:
    return score.to(images.device)
