"""A tokenizer that does not lie beside the weights which it belongs to."""

from __future__ import annotations

from typing import Any

from rewardtune.data.references import resolve, why_not_loaded
from rewardtune.errors import RecipeError


def load_tokenizer(reference: str, *, revision: str | None, reward: str, at_most: int) -> Any:
    """A tokenizer from a folder or a hub id.

    Raises RecipeError: there is none, or it has more than `at_most` tokens and so belongs to another model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(reference), revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"reward {reward!r}: the tokenizer {reference!r} does not load: {why_not_loaded(error, reference)} "
            "Give a hub id, or a folder with its files."
        ) from error
    if len(tokenizer) > at_most:
        raise RecipeError(
            f"reward {reward!r}: the tokenizer {reference!r} has {len(tokenizer):,} tokens and the model {at_most:,}; "
            "it belongs to another model."
        )
    return tokenizer
