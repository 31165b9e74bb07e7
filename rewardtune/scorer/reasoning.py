"""Reasoning before scoring: sample traces, close them, and read the level distribution behind each.

A judgement is about one dimension (Z-Reward, arXiv 2606.09076, Eq. 1): trace, fixed closing text and score prefix,
and the closed-set softmax at the next position. Every trace is closed, whether the model came to an end or was cut off,
so a distribution exists for every sample. The tasks that train teachers use this, `evaluate`, and the trace cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rewardtune.randomness import generator
from rewardtune.scorer.model import Scorer
from rewardtune.scorer.patches import patchify
from rewardtune.scorer.rubric import ThinkingReading, thinking_reading

CHUNK = 1024
"""Reasoning tokens that go through the output layer at a time (ours); their logits are computed again backwards."""


@dataclass(frozen=True)
class Question:
    """One judgement that is asked for. image: its place among the images given beside; dimension: an index."""

    image: int
    prompt: str
    dimension: int


@dataclass(frozen=True)
class Trace:
    """A sampled reasoning. ids: its tokens without the closing text. ended: the model closed it itself."""

    ids: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class Judgements:
    """What N closed traces lead to.

    logits: (N, K) of the levels, fp32. log_probs: (N, T) of each sampled token, the model's own end included; None
    unless asked for. mask: (N, T) of the places that hold one; forced closing text is not among them.
    """

    logits: Tensor
    log_probs: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Reasoner:
    """A scorer that is asked to think first."""

    scorer: Scorer
    reading: ThinkingReading

    @property
    def unsayable(self) -> list[int]:
        """Tokens that stand for pictures: in a reasoning they would ask for pixels that are not there."""
        config: Any = self.scorer.model.config
        return sorted({self.scorer.image_token, config.video_token_id})

    @property
    def max_tokens(self) -> int:
        assert self.scorer.rubric.thinking is not None
        return self.scorer.rubric.thinking.max_tokens

    def text(self, trace: Trace) -> str:
        """A trace as text."""
        words: str = self.scorer.tokenizer.decode(list(trace.ids), skip_special_tokens=False)
        return words.strip()

    @torch.no_grad()
    def sample(
        self,
        images: Sequence[Tensor],
        questions: Sequence[Question],
        keys: Sequence[tuple[int | str, ...]],
        *,
        temperature: float = 1.0,
        max_tokens: int | None = None,
    ) -> list[Trace]:
        """One trace for each question, drawn with the randomness of its key (seed, stream, counters...) alone.

        images: (3, H, W) in [0, 1]. temperature 0 takes the likeliest token.
        """
        return self._generate(images, questions, keys, temperature, max_tokens, close=False)[0]

    @torch.no_grad()
    def judge(
        self,
        images: Sequence[Tensor],
        questions: Sequence[Question],
        keys: Sequence[tuple[int | str, ...]],
        *,
        temperature: float = 1.0,
        max_tokens: int | None = None,
    ) -> tuple[list[Trace], Tensor]:
        """The traces of `sample` and the logits of `read`, (N, K), without graph and in one generation: the closing
        text is put behind each trace as soon as it ends, so that nothing is read twice."""
        return self._generate(images, questions, keys, temperature, max_tokens, close=True)

    def _generate(
        self, images: Sequence[Tensor], questions: Sequence[Question], keys: Sequence[tuple[int | str, ...]],
        temperature: float, max_tokens: int | None, *, close: bool,
    ) -> tuple[list[Trace], Tensor]:  # fmt: skip
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        most, reading = max_tokens or self.max_tokens, self.reading
        chances = torch.stack([torch.rand(most, generator=generator(*key)) for key in keys])  # type: ignore[arg-type]
        rows, seen = self._ask(images, questions)
        ids, mask = self.scorer.pad(rows)
        closings = [reading.closings[q.dimension] for q in questions]
        draw = _Draw(chances.to(self.scorer.device), temperature, closings=closings, unsayable=self.unsayable,
                     start=ids.shape[1], levels=self.scorer.reading.level_ids if close else ())  # fmt: skip
        model: Any = self.scorer.model
        settings = GenerationConfig(
            max_new_tokens=most + (max(map(len, closings)) + 1 if close else 0), do_sample=False, use_cache=True,
            pad_token_id=self.scorer.tokenizer.pad_token_id or 0, repetition_penalty=1.0,
        )  # fmt: skip
        with _not_training(model):
            out: Tensor = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings,
                logits_processor=LogitsProcessorList([draw]), stopping_criteria=StoppingCriteriaList([draw.finished]),
                mm_token_type_ids=self._kinds(ids), **seen,
            )  # fmt: skip
        return draw.traces(out), draw.logits / self.scorer.rubric.temperature

    def read(
        self,
        images: Sequence[Tensor],
        questions: Sequence[Question],
        traces: Sequence[Trace],
        *,
        tokens: bool = False,
        temperature: float = 1.0,
    ) -> Judgements:
        """Judgements of closed traces from one forward pass of the backbone, with graph.

        tokens: give the traces' log-probabilities at `temperature` too; one image is encoded once for all its traces.
        """
        scorer, reading = self.scorer, self.reading
        rows, seen = self._ask(images, questions)
        starts = [len(row) for row in rows]
        rows = [[*row, *t.ids, *reading.closings[q.dimension]]
                for row, t, q in zip(rows, traces, questions, strict=True)]  # fmt: skip
        ids, mask = scorer.pad(rows)
        model: Any = scorer.model
        hidden: Tensor = model.model(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=self._kinds(ids), use_cache=False, **seen
        ).last_hidden_state
        weight: Tensor = model.get_output_embeddings().weight
        logits = F.linear(hidden[:, -1], weight[list(scorer.reading.level_ids)])
        logits = (logits if logits.dtype == torch.float64 else logits.float()) / scorer.rubric.temperature
        if not tokens:
            return Judgements(logits)
        # row, column and place of each sampled token; its logits stand one column before it
        at = [
            (n, ids.shape[1] - len(row) + start + k, k)
            for n, (row, start, t) in enumerate(zip(rows, starts, traces, strict=True))
            for k in range(len(t.ids) + t.ended)
        ]
        places = torch.tensor(at, dtype=torch.long, device=ids.device).reshape(-1, 3)
        row_at, column, place = places.unbind(1)
        found = token_log_probs(
            hidden[row_at, column - 1], ids[row_at, column], weight, temperature=temperature, without=self.unsayable
        )
        length = int(place.max()) + 1 if len(at) else 1
        log_probs = found.new_zeros(len(rows), length).index_put((row_at, place), found)
        held = torch.zeros(len(rows), length, device=ids.device, dtype=torch.bool)
        held[row_at, place] = True
        return Judgements(logits, log_probs, held)

    def every_dimension(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        *,
        traces: int,
        stream: tuple[int, str],
        places: Sequence[int],
        temperature: float = 1.0,
        max_tokens: int | None = None,
    ) -> tuple[list[Trace], Tensor]:
        """Traces about each image in each dimension, in the order image, dimension, trace, and the distributions that
        they lead to, (B, D, R, K). stream: seed and name of the randomness; places: each image's own number in it."""
        count = len(self.scorer.dimensions)
        names = [(i, d, t) for i in range(len(images)) for d in range(count) for t in range(traces)]
        questions = [Question(i, prompts[i], d) for i, d, _ in names]
        keys = [(*stream, places[i], d, t) for i, d, t in names]
        drawn: list[Trace] = [Trace((), ended=False)] * len(names)
        logits = torch.empty(len(names), len(self.scorer.levels), device=self.scorer.device)
        for d in range(count):
            # reasoning about one dimension is of one length or so, and a batch takes as long as its longest trace
            own = [n for n, question in enumerate(questions) if question.dimension == d]
            found, logits[own] = self.judge(
                images, [questions[n] for n in own], [keys[n] for n in own], temperature=temperature,
                max_tokens=max_tokens,
            )  # fmt: skip
            for n, trace in zip(own, found, strict=True):
                drawn[n] = trace
        return drawn, logits.softmax(-1).unflatten(0, (len(images), count, traces))

    def _kinds(self, ids: Tensor) -> Tensor:
        return (ids == self.scorer.image_token).int()

    def _ask(self, images: Sequence[Tensor], questions: Sequence[Question]) -> tuple[list[list[int]], dict[str, Any]]:
        """Ids of each question, up to the first token of its reasoning, and the model's arguments about images: every
        image goes through the vision tower once, however often it is asked about."""
        model: Any = self.scorer.model
        patches, grid = patchify(images, self.scorer.geometry)
        counts = (grid[:, 1] * grid[:, 2] // self.scorer.geometry.merge**2).tolist()
        rows = [self.scorer.tokens(self.reading.frames[q.dimension], q.prompt, counts[q.image]) for q in questions]
        grid = grid.to(self.scorer.device)
        seen = model.get_image_features(patches.to(grid.device), image_grid_thw=grid, return_dict=True)
        which = [q.image for q in questions]
        shown = copy.copy(seen)
        shown.pooler_output = [seen.pooler_output[i] for i in which]
        if getattr(seen, "deepstack_features", None) is not None:
            shown.deepstack_features = [[layer[i] for i in which] for layer in seen.deepstack_features]
        return rows, {"mm_encoder_outputs": {"image": shown}, "image_grid_thw": grid[which]}


def load_reasoner(scorer: Scorer) -> Reasoner:
    """Raises RecipeError when the scorer's rubric does not say how to think, or does not fit its tokenizer."""
    return Reasoner(scorer, thinking_reading(scorer.rubric, scorer.tokenizer))


def token_log_probs(
    hidden: Tensor, targets: Tensor, weight: Tensor, *, temperature: float = 1.0, without: Sequence[int] = ()
) -> Tensor:
    """(M,) log-probability of each target under its hidden state: (M, H) hidden, (M,) targets, (V, H) output weights.

    without: tokens that cannot be said; the others share their probability.

    The output layer runs on `CHUNK` rows at a time and again in the backward pass, so that no (M, V) matrix is kept:
    at a vocabulary of 250,000 the logits of one long trace take a gigabyte.
    """

    def some(part: Tensor, aims: Tensor) -> Tensor:
        logits = F.linear(part, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if without:
            logits = logits.index_fill(1, torch.tensor(without, device=logits.device), -torch.inf)
        return -F.cross_entropy(logits / (temperature or 1.0), aims, reduction="none")

    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    found = [checkpoint(some, h, t, use_reentrant=False) if torch.is_grad_enabled() else some(h, t) for h, t in parts]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def said_level(logits: Tensor, chance: Tensor) -> Tensor:
    """Index of the level that the text says, drawn from the distribution of logits (..., K) by (...) in [0, 1)."""
    share = logits.softmax(-1).cumsum(-1)
    return (share <= chance[..., None] * share[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)


def with_level(read: Judgements, level: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, T + 1) of the sampled tokens and of the level (N,) that is said last, and their mask."""
    assert read.log_probs is not None and read.mask is not None
    said = read.logits.log_softmax(-1).gather(-1, level[:, None])
    return torch.cat([read.log_probs, said], 1), torch.cat([read.mask, torch.ones_like(said, dtype=torch.bool)], 1)


class _Draw:
    """A logits processor that leaves one token a row, and the end of generation.

    While a row reasons, it is the token at which the cumulated probability passes a number that is the row's own, so
    that neither batch mates nor the rank of the process change what is drawn. A row that stops itself, or has used up
    its numbers, is given its closing text, and the logits of `levels` behind it are kept; without levels it is done.
    """

    def __init__(
        self, chances: Tensor, temperature: float, *, closings: Sequence[Sequence[int]], levels: Sequence[int],
        unsayable: Sequence[int], start: int,
    ) -> None:  # fmt: skip
        self.chances, self.temperature, self.start = chances, temperature, start
        device, rows, most = chances.device, len(closings), max(map(len, closings))
        self.unsayable = torch.tensor(unsayable, dtype=torch.long, device=device)
        self.levels = torch.tensor(levels, dtype=torch.long, device=device)
        self.lengths = torch.tensor([len(c) for c in closings], device=device)
        self.closings = torch.tensor([[*c, *[c[-1]] * (most - len(c))] for c in closings], device=device)
        # tokens that a row has said itself, tokens of its closing text that stand behind them, and who stopped itself
        self.said, self.closed = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.logits = torch.zeros(rows, len(levels), device=device)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        step, thinking = ids.shape[1] - self.start, self.closed == 0
        at_level = self.closed == self.lengths
        self.logits[at_level] = scores[at_level][:, self.levels].to(self.logits)
        token = self.closings.gather(1, self.closed.clamp(max=self.closings.shape[1] - 1)[:, None])[:, 0]
        if step < self.chances.shape[1]:
            token = torch.where(thinking, self._drawn(scores, self.chances[:, step, None]), token)
            thinking = thinking & (token != self.closings[:, 0])
            self.ended |= (self.closed == 0) & ~thinking
            self.said += thinking
            self.closed += ~thinking
        else:
            self.closed += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

    def finished(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """A stopping criterion: rows that stopped, or whose level logits are known."""
        return self.closed > (self.lengths if len(self.levels) else 0)

    def traces(self, out: Tensor) -> list[Trace]:
        rows = zip(out[:, self.start :].tolist(), self.said.tolist(), self.ended.tolist(), strict=True)
        return [Trace(tuple(row[:count]), ended) for row, count, ended in rows]

    def _drawn(self, scores: Tensor, chance: Tensor) -> Tensor:
        scores = scores.index_fill(1, self.unsayable, -torch.inf)
        if self.temperature == 0:
            return scores.argmax(-1)
        share = (scores.float() / self.temperature).softmax(-1).cumsum(-1)
        return torch.searchsorted(share, chance * share[:, -1:], right=True)[:, 0].clamp(max=scores.shape[1] - 1)


@contextmanager
def _not_training(model: nn.Module) -> Iterator[None]:
    # in training mode gradient checkpointing would turn the cache off
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
