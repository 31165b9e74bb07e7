"""Is this picture better than that one, yes or no? The reward of RewardDance (arXiv 2509.08826) in its original form.

r(x1, x2, y, i) = P("yes" | x1, x2, y, i): is image 2, the candidate, better than image 1, the reference, for prompt y
under instruction i, which here asks about one dimension of the rubric. `tasks/reward_dance_pairs.py` trains it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardtune.data.images import read_tensors
from rewardtune.scorer.explanations import explanation_ids, explanation_log_probs
from rewardtune.scorer.model import Scorer
from rewardtune.scorer.rubric import ComparisonReading, comparison_reading
from rewardtune.scorer.targets import Pair

PAIRS = 16
"""Pairs that are measured at a time, each in both orders (ours)."""


@dataclass(frozen=True)
class PairQuestion:
    """Is `image` better than `reference`? Both: places among the images given beside. dimension: an index."""

    image: int
    reference: int
    prompt: str
    dimension: int

    @property
    def swapped(self) -> PairQuestion:
        return PairQuestion(self.reference, self.image, self.prompt, self.dimension)


@dataclass(frozen=True)
class Compared:
    """Answers to N questions.

    logits: (N, 2) of yes and no, fp32 (fp64 for a model in fp64). said: (M,) log-probabilities of all tokens of the
    explanations behind them.
    """

    logits: Tensor
    said: Tensor


@dataclass(frozen=True)
class Comparer:
    """A scorer that is asked which of two pictures is better."""

    scorer: Scorer
    reading: ComparisonReading

    def logits(
        self, images: Sequence[Tensor] | Tensor, references: Sequence[Tensor] | Tensor, prompts: Sequence[str],
        dimensions: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """(N, 2) logits of yes and no: is each image better than its reference? One forward pass, with graph.

        images, references: in [0, 1], (N, 3, H, W) or N tensors (3, H, W); dimensions: indices.
        """
        count = len(prompts)
        assert len(images) == len(references) == len(dimensions) == count, "an image, a reference and a dimension each"
        asked = [PairQuestion(n, count + n, prompts[n], dimensions[n]) for n in range(count)]
        return self.read([*images, *references], asked).logits

    def probability(
        self, images: Sequence[Tensor] | Tensor, references: Sequence[Tensor] | Tensor, prompts: Sequence[str],
        dimensions: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """(N,) P(yes) between the two answers alone, as scores are read from the levels alone. The arguments are those
        of `logits`."""
        return self.logits(images, references, prompts, dimensions).softmax(-1)[:, 0]

    def read(
        self,
        images: Sequence[Tensor],
        questions: Sequence[PairQuestion],
        *,
        answers: Sequence[bool] = (),
        explanations: Sequence[str] = (),
    ) -> Compared:
        """Answers to questions about pictures, each of which goes through the vision tower once.

        explanations: a text for each question that stands behind its right answer, of `answers`; may be empty.
        """
        scorer, model = self.scorer, self._model
        seen = scorer.see(images)
        told = [explanation_ids(scorer, text) for text in explanations] or [[] for _ in questions]
        # without an explanation nothing looks at the answer
        behind = [[self.reading.answers[not answers[n]], *words] if words else [] for n, words in enumerate(told)]
        rows = [
            scorer.tokens(self.reading.frames[q.dimension], q.prompt, seen.counts[q.image], seen.counts[q.reference])
            for q in questions
        ]
        ids, mask = scorer.pad([[*row, *more] for row, more in zip(rows, behind, strict=True)])
        hidden: Tensor = model.model(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == scorer.image_token).int(), use_cache=False,
            **seen.shown([place for question in questions for place in self._places(question)]),
        ).last_hidden_state  # fmt: skip
        weight = model.get_output_embeddings().weight
        last = torch.tensor([-1 - len(more) for more in behind], device=ids.device)
        logits = F.linear(hidden[torch.arange(len(rows), device=ids.device), last], weight[list(self.reading.answers)])
        said = explanation_log_probs(hidden, ids, [len(words) for words in told], weight)
        return Compared(logits if logits.dtype == torch.float64 else logits.float(), said)

    def _places(self, question: PairQuestion) -> list[int]:
        """Its pictures in the order in which the template shows them."""
        places = {"image": question.image, "reference": question.reference}
        return [places[slot] for slot in self.reading.frames[question.dimension].slots if slot in places]

    @property
    def _model(self) -> Any:
        return self.scorer.model


def load_comparer(scorer: Scorer) -> Comparer:
    """Raises RecipeError when the scorer's rubric does not say how to compare, or does not fit its tokenizer."""
    return Comparer(scorer, comparison_reading(scorer.rubric, scorer.tokenizer))


def ask(scorer: Scorer, pairs: Sequence[Pair]) -> tuple[list[Tensor], list[PairQuestion]]:
    """The pictures of some pairs, each once, and whether the better one of each pair is better."""
    paths = list(dict.fromkeys(path for pair in pairs for path in pair.images))
    images = read_tensors(paths, device=scorer.device)
    places = [[paths.index(path) for path in pair.images] for pair in pairs]
    return images, [
        PairQuestion(won, lost, pair.prompt, pair.dimension) for pair, (won, lost) in zip(pairs, places, strict=True)
    ]


@torch.no_grad()
def pair_accuracy(comparer: Comparer, pairs: Sequence[Pair], *, batch_size: int = PAIRS) -> dict[str, float]:
    """Share of the pairs that are ordered as people do, over all and for each dimension that has some.

    A pair is asked in both orders and the two log-odds of yes are compared, so that a leaning towards yes or towards
    one of the places cancels; a tie is wrong (ours).
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        images, asked = ask(comparer.scorer, some)
        logits = comparer.read(images, [*asked, *(question.swapped for question in asked)]).logits
        better, worse = (logits[:, 0] - logits[:, 1]).chunk(2)
        for pair, ordered in zip(some, (better > worse).tolist(), strict=True):
            right["pair_accuracy"].append(ordered)
            right[f"{comparer.scorer.dimensions[pair.dimension]}/pair_accuracy"].append(ordered)
    return {name: sum(each) / len(each) for name, each in right.items()}
