"""A reward that runs in another process, as if it ran in this one: `rewardtune serve` answers.

The forward pass asks for the score; the backward pass asks once more, with the upstream gradients of value,
distribution and parts, for their product with the Jacobian at the images. What is made of a distribution
(`scoring/objective.py`) is therefore free, at the cost of a second forward pass on the server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewardtune import errors
from rewardtune.errors import DataError, NonFiniteError, RecipeError, RewardTuneError
from rewardtune.plugins import RewardCard
from rewardtune.serving import wire
from rewardtune.serving.connection import LARGEST_ANSWER, Connection, Dropped, Fault, Key, Refused
from rewardtune.types import Score

SERVE = "rewardtune serve --reward NAME"


@dataclass
class RemoteReward:
    """A served reward. url: what `rewardtune serve` printed, or the near end of a tunnel to it. The others: see
    `Connection`. The card is the served one's.

    Raises RecipeError where no reward answers, the token is wrong or the versions do not fit.
    """

    url: str
    key: Key
    timeout: float = 300.0
    retries: int = 5
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    card: RewardCard = field(init=False)
    identity: str = field(init=False)
    """Digest of what is served; `wire.identity_of`."""

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self._line = Connection(
            self.url, key=self.key, timeout=self.timeout, retries=self.retries, sleep=self.sleep
        )  # fmt: skip
        try:
            found = self._line.ask(f"{self.url}/card", None, _document, seed=0, step="card")
        except Dropped as error:
            raise RecipeError(
                f"no reward answers at {self.url} ({error}). Start one there with `{SERVE}`, and over another machine "
                "the tunnel to it (docs/serving.md)."
            ) from None
        except Refused as refused:
            raise self._error(refused) from None
        if "protocol" not in found:
            raise RecipeError(
                f"something answers at {self.url}, but no reward. Is it `{SERVE}` that runs there? Give the address "
                "that it printed as url."
            )
        if found["protocol"] != wire.PROTOCOL:
            raise RecipeError(
                f"{self.url} speaks protocol {found.get('protocol')!r} (rewardtune {found.get('version')}), this side "
                f"protocol {wire.PROTOCOL}. Install the same version of rewardtune on both sides."
            )
        try:
            self.card, self.identity = wire.card_of(found["card"]), str(found["identity"])
        except (KeyError, wire.Malformed) as error:
            raise RecipeError(
                f"{self.url}/card is no reward's card ({error}). Is it `{SERVE}` that runs there?"
            ) from None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. Errors that the served reward raises are raised here, with the address.

        Raises DataError when the server is gone or answers what is none, NonFiniteError for a value that is not finite,
        RecipeError for a request that the server takes for none of its own.
        """
        if len(prompts) != len(images):
            raise DataError(f"{len(images)} images came with {len(prompts)} prompts; give one an image.")
        raw = self._ask("score", images, prompts, largest=LARGEST_ANSWER)
        try:
            score = wire.score_of(raw, len(images)).to(images.device)
        except wire.Malformed as error:
            raise self._nonsense(error) from None
        if not bool(torch.isfinite(score.value).all()):
            bad = (~torch.isfinite(score.value)).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"{self.url}: reward {self.card.name!r} returned a value that is not finite for image(s) {bad} of the "
                f"batch. Run `rewardtune rewards test {self.card.name}` where it is served."
            )
        if not (self.card.differentiable and images.requires_grad and torch.is_grad_enabled()):
            return score
        outputs = wire.outputs(score)
        found = _Linked.apply(images, self, prompts, list(outputs), *outputs.values())  # type: ignore[no-untyped-call]
        linked = dict(zip(outputs, found, strict=True))
        parts = {name: linked[wire.PARTS + name] for name in score.parts}
        return Score(linked["value"], linked.get("distribution"), score.levels, score.dimensions, parts)

    def gradient(self, images: Tensor, prompts: Sequence[str], weights: Mapping[str, Tensor]) -> Tensor:
        """(B, 3, H, W): the gradient at the images of the sum of outputs times weights (`wire.outputs`).

        It may hold what is not finite, as in one process; the training loop decides. Raises as `score`.
        """
        room = images.numel() * images.element_size() + LARGEST_ANSWER
        found = self._ask("gradient", images, prompts, weights=weights, largest=room).tensors.get("gradient")
        if found is None or found.shape != images.shape:
            shape = "none" if found is None else f"one of shape {tuple(found.shape)}"
            raise self._nonsense(f"{shape} as the gradient of images of shape {tuple(images.shape)}")
        return found.to(images)

    def _ask(
        self, what: str, images: Tensor, prompts: Sequence[str], *, largest: int,
        weights: Mapping[str, Tensor] | None = None,
    ) -> wire.Message:  # fmt: skip
        try:
            body = wire.pack_request(images, prompts, identity=self.identity, weights=weights)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the metadata of a prompt cannot be sent to {self.url}: {error}. It must be what JSON can hold."
            ) from None
        try:
            return self._line.ask(f"{self.url}/{what}", body, self._message, seed=0, step=what, largest=largest)
        except Dropped as error:
            raise DataError(
                f"{self.url}: reward {self.card.name!r} is gone after {self.retries + 1} attempts: {error}. See what "
                "the server's log says and start it again (and the tunnel, if there is one); then start this run "
                "again, which continues from its last checkpoint."
            ) from None
        except Refused as refused:
            raise self._error(refused) from None

    def _message(self, raw: bytes) -> wire.Message:
        try:
            message = wire.unpack(raw)
        except wire.Malformed as error:
            raise Fault(str(error)) from None  # cut off, perhaps
        if message.document.get("protocol") != wire.PROTOCOL or message.document.get("identity") != self.identity:
            raise RecipeError(f"{self.url}: another reward or version answered than the one that was loaded. {_ANEW}")
        return message

    def _nonsense(self, what: object) -> DataError:
        return DataError(
            f"{self.url}: reward {self.card.name!r} answered with {what}. Is it `{SERVE}` that runs there?"
        )

    def _error(self, refused: Refused) -> RewardTuneError:
        said = f"{self.url}: {refused.said}"
        if refused.status == 401:
            return RecipeError(
                f"{self.url} refuses the token that was read from {self.key.source} ({refused.said}) Put the one there "
                "that `rewardtune serve` printed or was given."
            )
        if refused.kind == "protocol":
            return RecipeError(f"{said} Install the same version of rewardtune on both sides.")
        if refused.kind == "identity":
            return RecipeError(f"{said} {_ANEW}")
        if refused.status == 413:
            return RecipeError(f"{said} Raise that on the server, or send less at once (train.batch_size).")
        if refused.status == 422:
            # what the reward itself said is the same error as in one process
            raised = getattr(errors, refused.kind, None)
            if isinstance(raised, type) and issubclass(raised, RewardTuneError):
                return raised(said)
        if refused.status == 404:
            return RecipeError(
                f"{self.url} is no reward's address ({refused.said}) Give the one that `{SERVE}` prints."
            )
        return RecipeError(f"{self.url} refuses the request ({refused}). Is it `{SERVE}`, of the same version?")


_ANEW = (
    "Serve the reward of before, with the same options; or, if the other one is wanted, start this run again with "
    "--fresh."
)


class _Linked(torch.autograd.Function):
    """Outputs that came over the line -> the same numbers with a graph, whose backward asks for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, reward: RemoteReward, prompts: Sequence[str], names: Sequence[str], *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(images)
        ctx.reward, ctx.prompts, ctx.names = reward, prompts, names
        ctx.set_materialize_grads(False)  # what nobody weighs is not sent
        found = tuple(output.clone() for output in outputs)
        ctx.mark_non_differentiable(*(output for output in found if not output.is_floating_point()))
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        (images,) = ctx.saved_tensors
        weights = {name: one for name, one in zip(ctx.names, upstream, strict=True) if one is not None}
        gradient = ctx.reward.gradient(images, ctx.prompts, weights) if weights else None
        return (gradient, None, None, None, *(None for _ in upstream))


def _document(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}
