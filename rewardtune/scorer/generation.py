"""Write traces token by token behind prompts that were read once, and close each when it ends.

`scorer/reasoning.py` reads the prompts and says what closes a trace; nothing here knows images or rubrics.
`transformers.generate` is not used: it reads a prompt again for each of its samples, keeps rows that are done, and
leaves no place for the closing text.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardtune.training import shard


@dataclass(frozen=True)
class Start:
    """N prompts that have been read.

    cache: the model's. hidden: (N, H) at the last token. mask: (N, L) of what is not padding. position: (N,) of the
    next token.
    """

    cache: Any
    hidden: Tensor
    mask: Tensor
    position: Tensor

    def copy(self) -> Start:
        """The same, with a cache of its own."""
        return replace(self, cache=deepcopy(self.cache))

    def rows(self, which: Tensor) -> Start:
        """Some of the prompts, any of them several times. This one's cache goes with them."""
        self.cache.reorder_cache(which)
        return Start(self.cache, self.hidden[which], self.mask[which], self.position[which])

    def read(self, model: Any, ids: Tensor) -> Start:
        """The prompts and (N, T) more tokens of text. This one's cache goes with them."""
        length = ids.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(ids), length)], 1)
        places = self.position[:, None] + torch.arange(length, device=ids.device)
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=places.expand(3, -1, -1), past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        return Start(self.cache, hidden, mask, self.position + length)


class Draft:
    """N traces while they are written.

    While a row reasons, its next token is the one at which the cumulated probability passes a number that is the row's
    own, so that neither batch mates nor the rank of the process change what is drawn. A row that stops itself, or has
    used up its numbers, is given its closing text, and the logits of `levels` behind it are kept; without levels it is
    done.

    chances: (N, T) in [0, 1). temperature 0 takes the likeliest token. closings: of each row; the first token of all
    is the one that stops. unsayable: ids that are never drawn.
    """

    def __init__(
        self, chances: Tensor, temperature: float, *, closings: Sequence[Sequence[int]], levels: Sequence[int],
        unsayable: Sequence[int],
    ) -> None:  # fmt: skip
        self.chances, self.temperature = chances, temperature
        device, rows, most = chances.device, len(closings), max(map(len, closings))
        self.unsayable = torch.tensor(unsayable, dtype=torch.long, device=device)
        self.levels = torch.tensor(levels, dtype=torch.long, device=device)
        self.lengths = torch.tensor([len(c) for c in closings], device=device)
        self.closings = torch.tensor([[*c, *[c[-1]] * (most - len(c))] for c in closings], device=device)
        # what a row has said itself, how many tokens that is, and how many of its closing text stand behind them
        self.ids = torch.zeros(rows, chances.shape[1], dtype=torch.long, device=device)
        self.said, self.closed = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.logits = torch.zeros(rows, len(levels), device=device)

    def next(self, rows: Tensor, scores: Tensor, step: int) -> Tensor:
        """The (A,) tokens that rows (A,) go on with, from their logits (A, V)."""
        closed = self.closed[rows]
        at_level = closed == self.lengths[rows]
        self.logits[rows[at_level]] = scores[at_level][:, self.levels].to(self.logits)
        forced = self.closings[rows, closed.clamp(max=self.closings.shape[1] - 1)]
        if step >= self.chances.shape[1]:
            self.closed[rows] = closed + 1
            return forced
        token = torch.where(closed == 0, self._drawn(scores, self.chances[rows, step, None]), forced)
        thinking = (closed == 0) & (token != self.closings[rows, 0])
        self.ended[rows] |= (closed == 0) & ~thinking
        self.ids[rows, step] = token
        self.said[rows] += thinking
        self.closed[rows] = closed + ~thinking
        return token

    def unfinished(self, rows: Tensor) -> Tensor:
        """(A,) whether more has to be written behind rows (A,)."""
        if len(self.levels):
            return self.closed[rows] <= self.lengths[rows]
        return (self.closed[rows] == 0) & (self.said[rows] < self.chances.shape[1])

    def _drawn(self, scores: Tensor, chance: Tensor) -> Tensor:
        scores = scores.index_fill(1, self.unsayable, -torch.inf)
        if self.temperature == 0:
            return scores.argmax(-1)
        share = (scores / self.temperature).softmax(-1).cumsum(-1)
        return torch.searchsorted(share, chance * share[:, -1:], right=True)[:, 0].clamp(max=scores.shape[1] - 1)


def write(model: Any, start: Start, draft: Draft, rows: Tensor) -> None:
    """Go on with the prompts until the rows (A,) of the draft that stand behind them are finished.

    model: an image-text model of transformers, in eval mode. Rows that are finished leave the batch when they are half
    of it. Where parameters are sharded, processes go on until all are finished, since they gather weights together.
    """
    weight, step = model.get_output_embeddings().weight, 0
    while True:
        token = draft.next(rows, F.linear(start.hidden, weight).float(), step)
        unfinished = draft.unfinished(rows)
        if not shard.anywhere(unfinished.any(), model):
            return
        if unfinished.sum() * 2 <= len(rows):
            # one that is finished stays where only other processes have work left
            keep = unfinished.nonzero()[:, 0] if unfinished.any() else rows.new_zeros(1)
            start, rows, token = start.rows(keep), rows[keep], token[keep]
        start, step = start.read(model, token[:, None]), step + 1
