"""Reasoning before scoring: sample traces, close them, and read the level distribution behind each.

A judgement is about one dimension (Z-Reward, arXiv 2606.09076, Eq. 1): trace, fixed closing text and score prefix,
and the closed-set softmax at the next position. The tasks that train teachers use this, `evaluate`, and the trace
cache.

Every trace is closed, whether the model came to an end or was cut off, so a distribution exists for every sample: also
for an empty one, where the model had nothing to say. That is a draw from its judgements like any other (ours; the
paper says nothing of it). Left out, it would bend the mean over traces that a student learns (Eq. 15), and keep from
GDSO what the policy gradient is to discourage. A served teacher's are treated alike (`server.py`). Empty traces and
those that were cut off are counted and reported wherever some are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rewardtune.randomness import generator
from rewardtune.scorer.generation import Draft, Start, write
from rewardtune.scorer.model import Scorer, Seen
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
    """A sampled reasoning. ids: its tokens without the closing text. ended: the model closed it itself.

    log_probs: of each token when it was sampled, the model's own end included; None where that was in this process.
    """

    ids: tuple[int, ...]
    ended: bool
    log_probs: tuple[float, ...] | None = field(default=None, compare=False)


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

    def figures(self, traces: Sequence[Trace]) -> dict[str, float]:
        """Numbers to log about traces: tokens on average, the share that the model closed itself, and the share that is
        empty but for white space, of which Qwen's models write a line break before they close."""
        count = len(traces)
        return {
            "trace_tokens": sum(len(trace.ids) for trace in traces) / count,
            "trace_ended": sum(trace.ended for trace in traces) / count,
            "trace_empty": sum(not self._says(trace) for trace in traces) / count,
        }

    def _says(self, trace: Trace) -> bool:
        # token by token: nearly every trace says something with its first
        return any(self.scorer.tokenizer.decode([token]).strip() for token in trace.ids)

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
        drafted = self._generate(images, questions, keys, [1] * len(questions), temperature, max_tokens, levels=())
        return _traces(drafted)

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
        """The traces of `sample` and the logits of `read`, (N, K), without graph and with nothing read twice: the
        closing text is put behind each trace as soon as it ends, and what the questions about one picture begin with
        is shared."""
        tails = [self.reading.tails[q.dimension] for q in questions]
        levels = self.scorer.reading.level_ids
        drafted = self._generate(images, questions, keys, tails, temperature, max_tokens, levels=levels)
        return _traces(drafted), drafted.logits / self.scorer.rubric.temperature

    def _generate(
        self, images: Sequence[Tensor], questions: Sequence[Question], keys: Sequence[tuple[int | str, ...]],
        tails: Sequence[int], temperature: float, max_tokens: int | None, *, levels: Sequence[int],
    ) -> Draft:  # fmt: skip
        """Read the prompts without their last `tails` tokens, each once; then these, once for all traces; then write.

        Prompts whose tails have different lengths go on separately: padding inside a row would run through the states
        of linear attention.
        """
        model: Any = self.scorer.model
        most = max_tokens or self.max_tokens
        chances = torch.stack([torch.rand(most, generator=generator(*key)) for key in keys])  # type: ignore[arg-type]
        closings = [self.reading.closings[q.dimension] for q in questions]
        draft = Draft(chances.to(self.scorer.device), temperature, closings=closings, levels=levels,
                      unsayable=self.unsayable)  # fmt: skip
        seen = self.scorer.see(images)
        rows = self._rows(seen, questions)
        with _not_training(model):
            heads = {(q.image, *row[:-tail]): q.image for q, row, tail in zip(questions, rows, tails, strict=True)}
            number = {head: n for n, head in enumerate(heads)}
            ids, mask = self.scorer.pad([head[1:] for head in heads])
            shown, kinds = seen.shown(list(heads.values())), self._kinds(ids)
            places, _ = model.model.get_rope_index(
                ids, mm_token_type_ids=kinds, image_grid_thw=shown["image_grid_thw"], attention_mask=mask
            )
            out = model.model(input_ids=ids, attention_mask=mask, position_ids=places, mm_token_type_ids=kinds,
                              use_cache=True, **shown)  # fmt: skip
            read = Start(out.past_key_values, out.last_hidden_state[:, -1], mask, places.amax((0, 2)) + 1)
            lengths = sorted(set(tails))
            for length in lengths:
                own = [n for n, tail in enumerate(tails) if tail == length]
                asked = {(questions[n], *rows[n][-length:]): (questions[n].image, *rows[n][:-length]) for n in own}
                at = {question: n for n, (question, *_) in enumerate(asked)}
                begun = read if length == lengths[-1] else read.copy()
                start = begun.rows(ids.new_tensor([number[head] for head in asked.values()]))
                start = start.read(model, ids.new_tensor([tail for _, *tail in asked]))
                start = start.rows(ids.new_tensor([at[questions[n]] for n in own]))
                write(model, start, draft, ids.new_tensor(own))
        return draft

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
        seen = scorer.see(images)
        rows = self._rows(seen, questions)
        starts = [len(row) for row in rows]
        rows = [[*row, *t.ids, *reading.closings[q.dimension]]
                for row, t, q in zip(rows, traces, questions, strict=True)]  # fmt: skip
        ids, mask = scorer.pad(rows)
        model: Any = scorer.model
        hidden: Tensor = model.model(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=self._kinds(ids), use_cache=False,
            **seen.shown([q.image for q in questions]),
        ).last_hidden_state  # fmt: skip
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
        drawn, logits = self.judge(images, questions, keys, temperature=temperature, max_tokens=max_tokens)
        return drawn, logits.softmax(-1).unflatten(0, (len(images), count, traces))

    def _kinds(self, ids: Tensor) -> Tensor:
        return (ids == self.scorer.image_token).int()

    def _rows(self, seen: Seen, questions: Sequence[Question]) -> list[list[int]]:
        """Ids of each question, up to the first token of its reasoning."""
        frames = self.reading.frames
        return [self.scorer.tokens(frames[q.dimension], q.prompt, seen.counts[q.image]) for q in questions]


def _traces(draft: Draft) -> list[Trace]:
    rows = zip(draft.ids.tolist(), draft.said.tolist(), draft.ended.tolist(), strict=True)
    return [Trace(tuple(row[:count]), ended) for row, count, ended in rows]


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


@contextmanager
def _not_training(model: nn.Module) -> Iterator[None]:
    # in training mode gradient checkpointing would turn the cache off
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
