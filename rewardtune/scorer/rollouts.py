"""Roll-outs of pairs: G traces for each side, with what is fixed when they are drawn. `tasks/reward_gdso.py` learns
from them; `memory` carries them through a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewardtune.data.images import read_tensors
from rewardtune.errors import DataError
from rewardtune.randomness import generator
from rewardtune.scorer.reasoning import Judgements, Question, Reasoner, Trace
from rewardtune.scorer.targets import Pair
from rewardtune.training import shard


@dataclass(frozen=True)
class RollOut:
    """P pairs with G traces a side; N = P * 2 * G rows in the order pair, side, sample.

    drawn: (P, 2, G) in [0, 1), what picks a level where the reward is parsed from text. reference: (N, T)
    log-probabilities under the reference. levels, advantages (P, 2, G) and old (N, T): the level in the text, the
    advantage and the log-probabilities when the traces were drawn, for several updates on one roll-out. None where the
    task needs none. sampler: (N, T) log-probabilities in which a server sampled; kept: (pairs asked for,) False for
    those that lost a trace on the server and are not here; None where neither happened.
    """

    pairs: list[Pair]
    images: list[Tensor]
    questions: list[Question]
    traces: list[Trace]
    drawn: Tensor
    reference: Tensor | None = None
    levels: Tensor | None = None
    advantages: Tensor | None = None
    old: Tensor | None = None
    sampler: Tensor | None = None
    kept: Tensor | None = None

    @property
    def dropped(self) -> float:
        """Share of the pairs asked for that are not here."""
        return 0.0 if self.kept is None else 1 - float(self.kept.float().mean())

    @property
    def rated(self) -> Tensor:
        """(P,) whether a pair has scores; the others have an order only."""
        return torch.tensor([pair.ratings is not None for pair in self.pairs])

    @property
    def ratings(self) -> Tensor:
        """(rated pairs, 2) human scores."""
        return torch.tensor([pair.ratings for pair in self.pairs if pair.ratings is not None]).reshape(-1, 2)

    def read(self, reasoner: Reasoner, *, tokens: bool, temperature: float) -> Judgements:
        return reasoner.read(self.images, self.questions, self.traces, tokens=tokens, temperature=temperature)


FIXED = ("reference", "levels", "advantages", "old", "sampler", "kept")
Sample = Callable[..., Sequence[Trace | None]]
"""As `Reasoner.sample`; None for a trace that was lost."""


def ask(reasoner: Reasoner, pairs: Sequence[Pair], *, samples: int) -> tuple[list[Tensor], list[Question]]:
    """The pictures of some pairs, each once, and a question for every sample of every side."""
    paths = list(dict.fromkeys(path for pair in pairs for path in pair.images))
    images = read_tensors(paths, device=reasoner.scorer.device)
    questions = [
        Question(paths.index(path), pair.prompt, pair.dimension)
        for pair in pairs for path in pair.images for _ in range(samples)
    ]  # fmt: skip
    return images, questions


def roll_out(
    reasoner: Reasoner,
    pairs: Sequence[Pair],
    indices: Sequence[int],
    *,
    sample: Sample,
    samples: int,
    seed: int,
    temperature: float,
    max_tokens: int | None,
    remembered: Mapping[str, Tensor],
) -> RollOut:
    """Draw the traces of pairs; `indices` name the pairs' draws, so that they are the same on any rank.

    A roll-out that `remembered` holds under its first index is taken from there. Raises DataError when every pair lost
    a trace.
    """
    fixed = {name: remembered.get(f"{indices[0]}.{name}") for name in FIXED}
    images, questions = ask(reasoner, pairs, samples=samples)
    names = [(index, side, one) for index in indices for side in (0, 1) for one in range(samples)]
    traces = _remembered_traces(remembered, indices[0])
    if traces is None:
        keys = [(seed, "gdso/trace", *name) for name in names]
        said = sample(images, questions, keys, temperature=temperature, max_tokens=max_tokens)
        each = [said[k : k + 2 * samples] for k in range(0, len(said), 2 * samples)]
        traces = [trace for some in each if None not in some for trace in some if trace is not None]
        fixed["sampler"] = _sampler(traces, device=reasoner.scorer.device)
        if None in said:
            fixed["kept"] = torch.tensor([None not in some for some in each])
    if (kept := fixed["kept"]) is not None:
        if not kept.any():
            raise DataError(
                f"each of the {len(pairs)} pairs of a roll-out lost a trace on the server, so there is nothing to "
                "learn from. Look at the server's log, or raise objective.rollouts.server.retries; the run continues "
                "from its newest checkpoint."
            )
        pairs = [pair for pair, keep in zip(pairs, kept.tolist(), strict=True) if keep]
        names = [name for name, keep in zip(names, kept.repeat_interleave(2 * samples).tolist(), strict=True) if keep]
        images, questions = ask(reasoner, pairs, samples=samples)
    drawn = torch.stack([torch.rand((), generator=generator(seed, "gdso/level", *name)) for name in names])
    drawn = drawn.view(len(pairs), 2, samples).to(reasoner.scorer.device)
    return RollOut(list(pairs), images, questions, traces, drawn, **fixed)


def figures(reasoner: Reasoner, batch: RollOut, means: Tensor) -> dict[str, float]:
    """Numbers to log about judgements with expected scores (P, 2, G)."""
    out = {
        **reasoner.figures(batch.traces),
        "pair_accuracy": float((means[:, 0] > means[:, 1]).float().mean()),
    }
    if means.shape[-1] > 1:
        out["spread"] = float(means.std(-1).mean())
    if len(batch.ratings):
        out["mae"] = float((means[batch.rated] - batch.ratings[..., None].to(means)).abs().mean())
    return out


def sampler_gap(batch: RollOut, read: Judgements) -> dict[str, float]:
    """Mean distance between a token's log-probabilities on the server and here, under the weights of the roll-out.

    Rounding alone leaves it where it starts; one that grows with training means that the server has other weights.
    """
    if batch.sampler is None or read.log_probs is None or read.mask is None or not read.mask.any():
        return {}
    here = read.log_probs if batch.old is None else batch.old[:, : read.log_probs.shape[1]]
    return {"rollout_gap": float((here.detach() - batch.sampler).abs()[read.mask].mean())}


class Reference:
    """The policy of some steps ago (Z-Reward, Algorithm 1: refreshed at each outer iteration)."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.weights: dict[str, Tensor] = {}
        self.iteration = -1

    def refresh(self, iteration: int) -> None:
        """Take the weights as they are, once per iteration."""
        if iteration != self.iteration:
            self.iteration = iteration
            self.weights = {name: p.detach().clone() for name, p in self._trained()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the modules are the reference; no gradient may be taken.

        Values are copied and not swapped: FSDP gathers from the storage that it knows. What no block owns is whole
        when the weights are taken inside a step and split when they come from a checkpoint.
        """
        current = {name: p.detach().clone() for name, p in self._trained()}
        with torch.no_grad():
            try:
                for name, parameter in self._trained():
                    parameter.copy_(shard.alike(self.weights[name], parameter))
                yield
            finally:
                for name, parameter in self._trained():
                    parameter.copy_(current[name])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for module_name, module in self.modules.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{module_name}.{name}", parameter


def memory(rollouts: Mapping[int, RollOut]) -> dict[str, Tensor]:
    """Traces, probabilities and advantages of roll-outs by their first index, as tensors of a checkpoint."""
    out: dict[str, Tensor] = {}
    for first, r in rollouts.items():
        most = max((len(t.ids) for t in r.traces), default=0)
        rows = [[*t.ids, *[-1] * (most - len(t.ids))] for t in r.traces]
        out[f"{first}.ids"] = torch.tensor(rows, dtype=torch.long).reshape(len(r.traces), most)
        out[f"{first}.ended"] = torch.tensor([t.ended for t in r.traces])
        out |= {f"{first}.{name}": value for name in FIXED if (value := getattr(r, name)) is not None}
    return out


def _sampler(traces: Sequence[Trace], *, device: torch.device) -> Tensor | None:
    rows = [trace.log_probs for trace in traces if trace.log_probs is not None]
    if not rows:
        return None
    most = max(1, *map(len, rows))
    return torch.tensor([[*row, *[0.0] * (most - len(row))] for row in rows], device=device)


def _remembered_traces(tensors: Mapping[str, Tensor], first: int) -> list[Trace] | None:
    if f"{first}.ids" not in tensors:
        return None
    ended = tensors[f"{first}.ended"].tolist()
    rows = tensors[f"{first}.ids"].tolist()
    return [Trace(tuple(i for i in row if i >= 0), end) for row, end in zip(rows, ended, strict=True)]
