"""The explanation behind an answer: its ids, and how likely a scorer is to say it. RewardDance learns it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardtune.scorer.model import Scorer
from rewardtune.scorer.reasoning import token_log_probs


def explanation_ids(scorer: Scorer, text: str) -> list[int]:
    """Ids of an explanation on a line of its own and the end of the turn; none where there is no text."""
    if not text:
        return []
    words: list[int] = scorer.tokenizer.encode(f"\n{text}", add_special_tokens=False, split_special_tokens=True)
    return [*words, scorer.tokenizer.eos_token_id]


def explanation_log_probs(hidden: Tensor, ids: Tensor, lengths: Sequence[int], weight: Tensor) -> Tensor:
    """(M,) log-probability of every token of the explanations, which are the last `lengths` tokens of the rows.

    hidden: (N, L, H) last hidden states. ids: (N, L). weight: (V, H) of the output layer.
    """
    at = [(n, ids.shape[1] - count + k) for n, count in enumerate(lengths) for k in range(count)]
    row, column = torch.tensor(at, dtype=torch.long, device=ids.device).reshape(-1, 2).unbind(1)
    return token_log_probs(hidden[row, column - 1], ids[row, column], weight)
