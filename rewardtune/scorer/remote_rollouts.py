"""Traces from a vLLM server that is given the adapter of the moment: sampling goes out, reading stays in process.

In place of `Reasoner.sample`, for a reasoner with LoRA; `served_adapter.py` sends the weights. Prompts go and traces
come as token ids (docs.vllm.ai/en/stable/serving/online_serving/token_in_token_out). Written against vLLM 0.33.

Not `/v1/chat/completions`: the server's chat template would have to write the rubric's prompt to the letter, and even
then a prompt that ends with white space or spells a special token becomes other ids than those of `Scorer.tokens`, so
that another prompt would be trained than was asked. `/v1/completions` takes no picture.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardtune.data.images import data_url, resize, to_pil
from rewardtune.data.rows import short
from rewardtune.data.skipped import Skipped
from rewardtune.errors import RecipeError
from rewardtune.randomness import key
from rewardtune.scorer import served_adapter
from rewardtune.scorer.reasoning import Question, Reasoner, Trace
from rewardtune.scorer.server import UNFILTERED
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

LOST_SHARE = 0.5
"""Most of a process's traces of one roll-out that may be lost (ours): they are few, and one is no sign yet."""


@dataclass
class RemoteSampler:
    """Samples a reasoner's traces on a server, under the weights that the reasoner has at the time.

    adapters: folder of this run's own that the server sees under the same path. The others: see `Connection` and
    `ServerJudge`. Raises RecipeError for an address that is none.
    """

    reasoner: Reasoner
    adapters: Path
    url: str
    key_variable: str | None = None
    timeout: float = 600.0
    retries: int = 5
    concurrency: int = 16
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    loaded: tuple[int, str] | None = None
    """Optimiser step whose weights the server has, and the adapter's name there."""

    def __post_init__(self) -> None:
        if not connection.is_address(self.url):
            raise RecipeError(f"objective.rollouts.server.url: {connection.ADDRESS}.")
        self.adapters = self.adapters.expanduser().resolve()

    @torch.no_grad()
    def sample(
        self,
        images: Sequence[Tensor],
        questions: Sequence[Question],
        keys: Sequence[tuple[Any, ...]],
        *,
        step: int,
        temperature: float = 1.0,
        max_tokens: int | None = None,
    ) -> list[Trace | None]:
        """One trace for each question, None where it was lost; the seeds are made of the keys.

        The first call of an optimiser step gives the server the weights; all processes must make it. Raises RecipeError
        when the server cannot do what is asked or reads other tokens than it was sent, DataError when more than
        `LOST_SHARE` of the traces are lost or the adapter cannot be loaded, DiskError when it cannot be written.
        """
        secret = connection.key_from_environment(self.key_variable)
        line = Connection(
            connection.base(self.url), key=secret, timeout=self.timeout, retries=self.retries, sleep=self.sleep
        )
        reasoner = self.reasoner
        if self.loaded is None or self.loaded[0] != step:
            self.loaded = (step, served_adapter.load(line, reasoner.scorer.model, self.adapters, step=step))
        cut = reasoner.scorer.geometry
        sizes = [cut.fit(*image.shape[-2:]) for image in images]
        counts = [cut.tokens(*size) for size in sizes]
        # in the size in which they are read here: the server, whose bounds are the checkpoint's own, leaves them so
        pictures = [data_url(to_pil(resize(image[None], size))[0]) for image, size in zip(images, sizes, strict=True)]
        rows = (
            # 31 bits, as in `server.py`
            _Row(pictures[q.image], self._prompt(q, 1), self._prompt(q, counts[q.image]), key(*one) % 2**31)
            for q, one in zip(questions, keys, strict=True)
        )
        asked = self._request(self.loaded[1], temperature, max_tokens or reasoner.max_tokens)
        found = in_order(ask_each(
            line, rows, lambda row: self._trace(line, row, asked), total=len(questions), concurrency=self.concurrency,
            share=LOST_SHARE, noun="traces",
            hint="Look at the server's log, or raise objective.rollouts.server.retries.",
        ))  # fmt: skip
        lost = Skipped()
        for question, one in zip(questions, found, strict=True):
            if isinstance(one, Unscorable):
                name = reasoner.scorer.dimensions[question.dimension]
                lost.add(f"because {one.reason}", f"{short(question.prompt)} in {name}")
        if lost:
            what = f"{self.url}: {lost.total} of {len(found)} traces of step {step} are lost, and their pairs left out:"
            print("\n  ".join([what, *lost.lines()]), file=sys.stderr)
        return [None if isinstance(one, Unscorable) else one for one in found]

    def _prompt(self, question: Question, count: int) -> list[int]:
        frame = self.reasoner.reading.frames[question.dimension]
        return self.reasoner.scorer.tokens(frame, question.prompt, count)

    def _request(self, name: str, temperature: float, most: int) -> dict[str, Any]:
        """What all requests of a roll-out have in common."""
        sampling = {
            **UNFILTERED,
            "temperature": temperature,
            "max_tokens": most,
            # where in-process sampling stops, and nowhere else; the token is among those that come back
            "stop_token_ids": [self.reasoner.reading.stop],
            "ignore_eos": True,
            # vLLM's least: as good as never
            "logit_bias": {str(token): -100.0 for token in self.reasoner.unsayable},
            "detokenize": False,
            # only values before the temperature are to be had (`--logprobs-mode raw_logprobs`, vLLM's default)
            **({"logprobs": 0} if temperature == 1 else {}),
        }
        return {"model": name, "sampling_params": sampling, "return_token_ids": True}

    def _trace(self, line: Connection, row: _Row, asked: Mapping[str, Any]) -> Trace | Unscorable:
        body = {
            **asked,
            # one placeholder: the server puts as many as the picture needs in its place
            "token_ids": row.short,
            "content_parts": [{"type": "image_url", "url": row.picture}],
            "sampling_params": {**asked["sampling_params"], "seed": row.seed},
        }
        url = f"{line.base.removesuffix('/v1')}/inference/v1/generate"
        try:
            return line.ask(
                url, body, lambda raw: self._read(json_object(raw), row, asked), seed=row.seed, step="trace"
            )
        except Dropped as error:
            return Unscorable(" ".join(str(error).split()))
        except Refused as refused:
            raise self._not_sampled(line, refused) from None

    def _read(self, answer: dict[str, Any], row: _Row, asked: Mapping[str, Any]) -> Trace:
        choice = first_choice(answer)
        ids, finish = choice.get("token_ids"), choice.get("finish_reason")
        if finish not in ("stop", "length"):
            raise Fault(f"the trace finished with {finish!r}")
        if not isinstance(ids, list) or not all(isinstance(token, int) and token >= 0 for token in ids):
            raise Fault("the answer has no token ids")
        self._check_prompt(answer.get("prompt_token_ids"), row.whole)
        if len(ids) > asked["sampling_params"]["max_tokens"] or set(ids) & set(self.reasoner.unsayable):
            raise Dropped("the trace is longer than max_tokens, or says a picture (is logit_bias left out?)")
        stop = self.reasoner.reading.stop
        ended = stop in ids
        said = ids.index(stop) if ended else len(ids)
        if finish == "stop" and not ended:
            raise Dropped("the trace stopped at another token than the rubric's closing text")
        if "logprobs" not in asked["sampling_params"]:
            return Trace(tuple(ids[:said]), ended)
        try:
            values = [float(place["logprob"]) for place in choice["logprobs"]["content"][: said + ended]]
        except (KeyError, TypeError, ValueError):
            raise Fault("the answer's log-probabilities are malformed") from None
        if len(values) != said + ended:
            raise Fault("the answer has too few log-probabilities")
        return Trace(tuple(ids[:said]), ended, tuple(values))

    def _check_prompt(self, read: Any, sent: list[int]) -> None:
        """Raises RecipeError unless the server has read the tokens that `Reasoner.read` will."""
        if read == sent:
            return
        if not isinstance(read, list):
            raise RecipeError(
                f"{self.url} does not say which tokens it read (`prompt_token_ids`), so they cannot be compared with "
                "those that are trained on. Roll-outs were written against vLLM 0.33; update the server."
            )
        pad = self.reasoner.scorer.image_token
        theirs, ours = read.count(pad), sent.count(pad)
        if theirs != ours:
            raise RecipeError(
                f"{self.url} makes {theirs} tokens of a picture of which this process makes {ours}: the two resize it "
                "differently. Serve the checkpoint that scorer.model names, with its own preprocessor_config.json and "
                "without --mm-processor-kwargs, and keep scorer.min_pixels and max_pixels within that file's bounds; a "
                "vLLM before 0.33 may not take pictures beside token ids at all."
            )
        place = next((k for k, (a, b) in enumerate(zip(read, sent, strict=False)) if a != b), min(len(read), len(sent)))
        raise RecipeError(
            f"{self.url} did not read the tokens that it was sent: of {len(sent)} the first that differs is number "
            f"{place + 1} ({read[place : place + 3]} instead of {sent[place : place + 3]}). Serve the checkpoint that "
            "scorer.model names."
        )

    def _not_sampled(self, line: Connection, refused: Refused) -> RecipeError:
        assert self.loaded is not None
        _, name = self.loaded
        if "scale-out" in refused.said.lower():
            return RecipeError(f"{line.base}: {refused.said} (roll-outs send token ids to /inference/v1/generate).")
        if refused.status in (401, 403):
            return line.no_access(refused)
        if refused.status == 404 and "does not exist" in refused.said:
            return RecipeError(
                f"{line.base} has lost the adapter {name} ({refused.said}). Was it started anew, or does another run "
                "use the same objective.rollouts.adapters? Start the run again: it continues from its checkpoint."
            )
        if refused.status == 404:
            return RecipeError(
                f"{line.base} has no /inference/v1/generate beside it ({refused.said}). Give the address up to /v1 of "
                "a vLLM server (0.33 or newer) that was started with --enable-scale-out."
            )
        return RecipeError(
            f"{line.base} refuses to sample ({refused}). Check objective.max_tokens against the server's longest "
            "context (--max-model-len), and that it serves the checkpoint that scorer.model names."
        )


@dataclass(frozen=True)
class _Row:
    """One request. short, whole: the prompt's ids with one image token, and with as many as the picture has."""

    picture: str
    short: list[int]
    whole: list[int]
    seed: int
