"""`remote`: a reward that `rewardtune serve` runs in another process, on another device or machine.

Named by recipes; the protocol and the gradient over it are the engine's `serving/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, field_validator

from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.serving.client import RemoteReward
    from rewardtune.types import Score


_NO_TOKEN = "Put the token of `rewardtune serve` into it, or into a file that token_file names."


class Remote:
    """The served reward, seen from here."""

    card = RewardCard(
        name="remote",
        summary="a reward that `rewardtune serve` runs elsewhere, with its gradient; the card is the served one's once "
        "it is loaded",
        differentiable=True,
        needs_prompt=True,
        range=None,
        licence_code="Apache-2.0",
        licence_weights="the served reward's",
        known_when_loaded=True,
    )

    class Config(Options):
        """Options of `remote`. Nothing secret stands in a recipe."""

        url: str
        """What `rewardtune serve` prints, such as http://127.0.0.1:8421."""
        token_variable: str = "REWARDTUNE_TOKEN"
        """Environment variable that holds the server's token."""
        token_file: str | None = None
        """File that holds it, instead of the variable."""
        timeout: Annotated[float, Field(gt=0.0)] = 300.0
        """Seconds for one request, waiting for other clients included (ours, like the next)."""
        retries: Annotated[int, Field(ge=0)] = 5
        """Further attempts after a dropped connection or a fault of the server; pauses double from 1 to 30 seconds."""

        @field_validator("url")
        @classmethod
        def _is_address(cls, url: str) -> str:
            from rewardtune.serving.connection import is_address

            if not is_address(url):
                raise ValueError("give http://host:port, without user, password or what follows the path")
            return url

    def __init__(self, reward: RemoteReward) -> None:
        self._reward = reward
        self.card = replace(
            reward.card,
            summary=f"{reward.card.summary} (served at {reward.url})",
            requires=(),
            models={**dict(reward.card.models), "what is served": f"identity {reward.identity}"},
        )

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Ask the server for its card. The device is where images come from; the server has its own.

        Raises RecipeError when nobody answers, or not to this token.
        """
        from rewardtune.serving.client import RemoteReward
        from rewardtune.serving.connection import key_from_environment, key_from_file

        key = (
            key_from_file(config.token_file)
            if config.token_file
            else key_from_environment(config.token_variable, remedy=_NO_TOKEN)
        )
        assert key is not None
        return cls(RemoteReward(config.url, key, timeout=config.timeout, retries=config.retries))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`: what the served reward returns, bit for bit."""
        return self._reward.score(images, prompts)
