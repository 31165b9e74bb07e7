"""Pictures -> what every reward says of each, at what cost, and where one fails: second in the flow of `calibrate`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewardtune.calibration.labels import Picture
from rewardtune.data.images import open_image
from rewardtune.errors import DataError, MissingExtra, OutOfMemoryError, PluginError, RecipeError, RewardTuneError
from rewardtune.plugins import Reward, RewardCard
from rewardtune.progress import Progress
from rewardtune.recipe.rewards import RewardSection
from rewardtune.scoring.agreement import Array
from rewardtune.scoring.score import ImageScore, card_document, score_files


@dataclass(frozen=True)
class Failure:
    """A picture that a reward could not score, and why. reward: None where the picture itself cannot be opened."""

    picture: int
    reward: str | None
    why: str


@dataclass(frozen=True)
class Reading:
    """One reward on U pictures. said: U records, None where it failed. seconds: of calls of the reward alone.

    images: how many those seconds are for; the first batch, which warms up, is left out where there are others.
    """

    label: str
    card: Mapping[str, Any]
    options: Mapping[str, Any]
    said: Sequence[ImageScore | None]
    seconds: float
    images: int
    batch_size: int
    failures: Sequence[Failure] = field(default_factory=tuple)

    @property
    def sign(self) -> float:
        """1, or -1 where a lower value is better."""
        return 1.0 if self.card["higher_is_better"] else -1.0

    @property
    def parts(self) -> list[str]:
        """Names of the numbers beside the value: the reward's own parts, then its dimensions."""
        return list(dict.fromkeys(n for one in self.said if one for n in (*one.parts, *(one.dimensions or {}))))

    def values(self, part: str | None = None) -> Array:
        """(U,) the value, or one part, higher is better; NaN where there is none."""
        return np.array([self._number(one, part) for one in self.said], dtype=np.float64)

    def _number(self, one: ImageScore | None, part: str | None) -> float:
        if one is None:
            return float("nan")
        if part is None:
            return self.sign * one.value
        value = one.parts.get(part, (one.dimensions or {}).get(part))
        return float("nan") if value is None else self.sign * value


class _Timed:
    """A reward, and how long its calls take. Values are looked at before a call returns, so the device has finished."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.card = reward, reward.card
        self.calls: list[tuple[float, int]] = []

    def score(self, images: Any, prompts: Sequence[str]) -> Any:
        started = time.perf_counter()
        score = self.reward.score(images, prompts)
        float(score.value.sum())
        self.calls.append((time.perf_counter() - started, len(prompts)))
        return score

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reward, name)


def check_before(rewards: Mapping[str, RewardSection], pictures: Sequence[Picture]) -> None:
    """What can be known before a weight is loaded. Raises MissingExtra for packages, DataError for metadata."""
    from rewardtune import registry
    from rewardtune.recipe.validate import missing_requirement

    for section in rewards.values():
        card = registry.rewards.card(section.name)
        if why := missing_requirement(card):
            raise MissingExtra(f"reward {section.name!r} {why}")
        _check_metadata(card, pictures)


def read_rewards(
    rewards: Mapping[str, RewardSection],
    pictures: Sequence[Picture],
    *,
    device: str,
    batch_size: int,
    skip_failed: bool,
) -> list[Reading]:
    """Every reward on every picture, one reward in memory at a time.

    skip_failed: go on where a reward fails on a picture; else the first failure is an error that names both.
    """
    from rewardtune.scoring.reward_set import load_section

    progress = Progress("scoring images", len(rewards) * len(pictures))
    found = []
    for label, section in rewards.items():
        reward = load_section(section, device=device)
        _check_metadata(reward.card, pictures)
        timed = _Timed(reward)
        said: list[ImageScore | None] = []
        failures: list[Failure] = []
        for start in range(0, len(pictures), batch_size):
            chunk = pictures[start : start + batch_size]
            rows, bad = _read_chunk(label, timed, chunk, start, device=device, skip_failed=skip_failed)
            said += rows
            failures += bad
            progress.advance(len(chunk))
        if not any(said):
            raise DataError(f"reward {label!r} scores none of the {len(pictures)} pictures. {failures[0].why}")
        counted = timed.calls[1:] or timed.calls
        found.append(
            Reading(
                label=label,
                card=card_document(reward.card),
                options=section.options,
                said=said,
                seconds=sum(seconds for seconds, _ in counted),
                images=sum(count for _, count in counted),
                batch_size=batch_size,
                failures=failures,
            )
        )
        del reward, timed
    return found


def _read_chunk(
    label: str, reward: _Timed, chunk: Sequence[Picture], start: int, *, device: str, skip_failed: bool
) -> tuple[list[ImageScore | None], list[Failure]]:
    """A batch; where it fails, picture by picture, which tells the one to blame."""
    before = len(reward.calls)
    try:
        files, prompts = [p.file for p in chunk], [p.prompt for p in chunk]
        return list(score_files(reward, files, prompts, device=device, batch_size=len(chunk))), []
    except Exception as error:
        _stop_at_once(label, error)
        del reward.calls[before:]
    said: list[ImageScore | None] = []
    failures: list[Failure] = []
    for offset, picture in enumerate(chunk):
        try:
            said += score_files(reward, [picture.file], [picture.prompt], device=device, batch_size=1)
            continue
        except Exception as error:
            _stop_at_once(label, error)
            failure = _failure(label, picture, start + offset, error)
        if not skip_failed:
            remedy = "Mend that picture or the reward, or leave such pictures out for all rewards with --skip-failed."
            raise DataError(f"{failure.why} {remedy}")
        failures.append(failure)
        said.append(None)
    return said, failures


def _stop_at_once(label: str, error: Exception) -> None:
    """Raise what no other picture would mend: a wrong option or server, or memory."""
    if isinstance(error, RecipeError | PluginError | MissingExtra):
        raise error
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        raise OutOfMemoryError(
            f"reward {label!r} ran out of memory ({error}). Score fewer images at once: --batch-size 1."
        ) from error


def _failure(label: str, picture: Picture, index: int, error: Exception) -> Failure:
    try:
        open_image(picture.file)
    except DataError as broken:
        return Failure(index, None, str(broken))
    said = str(error) if isinstance(error, RewardTuneError) else f"{type(error).__name__}: {error}"
    hint = "" if isinstance(error, RewardTuneError) else f" `rewardtune rewards test {label}` looks for the cause."
    where = f"{picture.file} (prompt {str(picture.prompt)[:80]!r})"
    return Failure(index, label, f"reward {label!r} fails on {where}: {said.rstrip('.')}.{hint}")


def _check_metadata(card: RewardCard, pictures: Sequence[Picture]) -> None:
    lacking = [p.prompt for p in pictures if any(key not in p.prompt.metadata for key in card.metadata)]
    if not lacking:
        return
    keys = [key for key in card.metadata if key not in lacking[0].metadata]
    example = ", ".join(f'"{key}": ...' for key in keys)
    raise DataError(
        f"reward {card.name!r} reads {', '.join(map(repr, card.metadata))} beside a prompt, and "
        f"{len(lacking)} of {len(pictures)} pictures have a prompt without, such as {str(lacking[0])[:80]!r}. Add "
        f'`"metadata": {{{example}}}` to the rows of each group (docs/data.md), or leave this reward out.'
    )
