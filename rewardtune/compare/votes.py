"""Votes that people cast in the page's blind mode -> a human net win rate. Files come from outside and are checked.

Each rater's page shuffles which side stands left; a vote says where each side stood and what was chosen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewardtune.compare.statistics import NetWinRate, Verdicts, net_win_rate
from rewardtune.errors import DataError

KIND = "rewardtune-votes"
_MAX_BYTES = 8_000_000
Index = Annotated[int, Field(ge=0)]


class Vote(BaseModel):
    """One pair of images, judged. `prompt` and `seed` are indices; left and right are side names."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompt: Index
    seed: Index
    left: str
    right: str
    choice: Literal["left", "right", "tie", "both-bad"]
    seconds: float | None = None


class VoteFile(BaseModel):
    """What the page downloads. `session` tells raters of the same name apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["rewardtune-votes"]
    version: Literal[1]
    report: str
    rater: Annotated[str, Field(max_length=200)]
    session: Annotated[str, Field(max_length=100)]
    saved: str
    votes: Annotated[list[Vote], Field(max_length=100_000)]


def read_votes(
    paths: Sequence[str | Path], *, report: str, sides: Sequence[str], prompts: int, seeds: int
) -> list[VoteFile]:
    """Votes for this very report. Raises DataError, naming the file, for anything else."""
    return [_read(Path(path), report=report, sides=sides, prompts=prompts, seeds=seeds) for path in paths]


def merge_votes(
    files: Sequence[VoteFile], *, a: str, b: str, cluster: Mapping[int, int] | None = None
) -> dict[str, Any] | None:
    """Side a over side b in people's eyes; None without a vote on that pair.

    A rater's later vote on the same images replaces the earlier one. `both-bad` counts as a tie. The interval resamples
    prompts, as everywhere (`cluster` makes one of prompts with the same text); raters count with as many votes as they
    cast.
    """
    latest = _latest(files, a=a, b=b)
    if not latest:
        return None
    keys = sorted(latest)
    verdict = np.array([_verdict(latest[key], a) for key in keys], dtype=np.int8)
    prompt = np.array([cluster[key[1]] if cluster else key[1] for key in keys], dtype=np.int64)
    raters = sorted({key[0] for key in keys})
    names = {(f"{file.rater}\0{file.session}"): file.rater for file in files}
    per_rater = []
    for rater in raters:
        own = [i for i, key in enumerate(keys) if key[0] == rater]
        result = net_win_rate(verdict[own], prompt[own])
        per_rater.append({"rater": names[rater], "votes": len(own), "net": result.net, "net_ci95": list(result.ci95)})
    return {
        "net": net_win_rate(verdict, prompt),
        "votes": len(keys),
        "both_bad": sum(latest[key].choice == "both-bad" for key in keys),
        "raters": per_rater,
        "agreement": rater_agreement(latest, a=a),
    }


def judge_agreement(
    files: Sequence[VoteFile], verdict: Verdicts, items: Mapping[tuple[int, int], int], *, a: str, b: str
) -> dict[str, float | int] | None:
    """How often the judge names the side that people preferred, over pairs where neither says tie; None without any."""
    latest = _latest(files, a=a, b=b)
    pairs = [(_verdict(vote, a), int(verdict[items[key[1], key[2]]])) for key, vote in latest.items()]
    decided = [human == judge for human, judge in pairs if human and judge]
    return {"agree": sum(decided) / len(decided), "votes": len(decided)} if decided else None


def rater_agreement(latest: Mapping[tuple[str, int, int], Vote], *, a: str) -> dict[str, float | int] | None:
    """Share of equal verdicts over all pairs of raters on the images that both judged; None without such images."""
    by_image: dict[tuple[int, int], list[int]] = defaultdict(list)
    for (_, prompt, seed), vote in latest.items():
        by_image[prompt, seed].append(_verdict(vote, a))
    equal = total = 0
    for verdicts in by_image.values():
        for i, first in enumerate(verdicts):
            for second in verdicts[i + 1 :]:
                equal, total = equal + (first == second), total + 1
    return {"agree": equal / total, "pairs": total} if total else None


def net_document(result: NetWinRate) -> dict[str, Any]:
    """A net win rate as `compare.json` has it."""
    return {
        "wins": result.wins,
        "ties": result.ties,
        "losses": result.losses,
        "net": result.net,
        "net_ci95": list(result.ci95),
        "p_value": result.p_value,
        "wilson95": list(result.wilson95) if result.wilson95 else None,
        "prompts_won": result.prompts_won,
        "prompts_lost": result.prompts_lost,
    }


def _latest(files: Sequence[VoteFile], *, a: str, b: str) -> dict[tuple[str, int, int], Vote]:
    """(rater, prompt, seed) -> last vote on the pair of sides. Files are taken in the order they were saved."""
    latest: dict[tuple[str, int, int], Vote] = {}
    for file in sorted(files, key=lambda f: f.saved):
        for vote in file.votes:
            if {vote.left, vote.right} == {a, b}:
                latest[f"{file.rater}\0{file.session}", vote.prompt, vote.seed] = vote
    return latest


def _verdict(vote: Vote, a: str) -> int:
    if vote.choice in ("tie", "both-bad"):
        return 0
    return 1 if (vote.left if vote.choice == "left" else vote.right) == a else -1


def _read(path: Path, *, report: str, sides: Sequence[str], prompts: int, seeds: int) -> VoteFile:
    again = "Download the votes again from the page, or leave this file out."
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes is too large for a file of votes. {again}")
        file = VoteFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {again}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: not votes of a comparison page ({where}: {first['msg']}). {again}") from error
    if file.report != report:
        raise DataError(
            f"{path}: these votes are about other images (report {file.report[:16]!r}, this one is {report!r}). "
            "Merge them with the comparison that they were cast on."
        )
    for number, vote in enumerate(file.votes):
        known = vote.left in sides and vote.right in sides and vote.left != vote.right
        if not known or vote.prompt >= prompts or vote.seed >= seeds:
            raise DataError(f"{path}: vote {number} names a side, prompt or seed that this comparison lacks. {again}")
    return file
