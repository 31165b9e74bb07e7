"""Scores that a judge writes as text, read strictly: what is not in the format is unreadable, never a number.

Formats are those of the models' own repositories; each is a few labelled lines in free text. Numbers outside the
format's range, a label that is missing or stands there twice with different numbers: unreadable too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
SHOWN = 120
"""Characters of an answer that an error shows."""


class Unreadable(ValueError):
    """A text without the scores that were asked for, and why."""


@dataclass(frozen=True)
class Scores:
    """value: one number. parts: by name; NaN where the judge says that a part does not apply."""

    value: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Format:
    """What a judge of one kind is asked, and how it is read.

    question: text with {prompt}; the image stands before it. range: of `value`. scale: of `RewardCard`. read: text ->
    Scores, raises Unreadable.
    """

    question: str
    range: tuple[float, float]
    scale: float
    read: Callable[[str], Scores]


def final_score(text: str) -> Scores:
    """`Final Score: 3.7`, from 1 to 5: UnifiedReward 1.x as flow_grpo reads it (flow_grpo/rewards.py, 54809b5)."""
    return Scores(_labelled(text, r"Final Score:", 1, 5), {})


def unified_reward(text: str) -> Scores:
    """`Alignment Score (1-5): 3.7`, the same for Coherence and Style: UnifiedReward 2.0. value: their mean, ours."""
    parts = {name: _labelled(text, rf"{name.title()} Score \(1-5\):", 1, 5) for name in UNIFIED_REWARD}
    return Scores(sum(parts.values()) / len(parts), parts)


def rational_rewards(text: str) -> Scores:
    """`## Score: 3.2` below each aspect's heading, from 1 to 4, `N/A` where no text was asked for: RationalRewards-T2I.

    value: (mean of the aspects that apply - 1) / 3, as Flow-Factory has it (rewards/rational_rewards_t2i.py, 99ed286);
    numbers out of range, which it clamps, are unreadable here.
    """
    body = re.split(r"^# Summary", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.split(r"^\**\s*[123]\.\s*\**(Text Faithfulness|Physical and Visual Quality|Text Rendering)\b.*$", body,
                     flags=re.MULTILINE)  # fmt: skip
    blocks = list(zip(found[1::2], found[2::2], strict=True))
    if [heading for heading, _ in blocks] != list(RATIONAL_REWARDS.values()):
        raise Unreadable(f"the headings of the {len(RATIONAL_REWARDS)} aspects are not there once each")
    parts = {}
    for (name, heading), (_, block) in zip(RATIONAL_REWARDS.items(), blocks, strict=True):
        without = name == "text_rendering" and re.search(r"^[#*\s]*Score:[*\s]*N/A[.*\s]*$", block, re.MULTILINE)
        try:
            parts[name] = math.nan if without else _labelled(block, "Score:", 1, 4)
        except Unreadable as error:
            raise Unreadable(f"{heading}: {error}") from None
    known = [score for score in parts.values() if not math.isnan(score)]
    return Scores((sum(known) / len(known) - 1) / 3, parts)


def level(text: str, levels: Sequence[str]) -> int:
    """Which of the levels the whole text is. Raises Unreadable."""
    said = text.strip().rstrip(".")
    if said not in levels:
        raise Unreadable(f"it is none of {', '.join(levels)}")
    return levels.index(said)


def shown(text: str) -> str:
    """The start of an answer, on one line."""
    line = " ".join(text.split())
    return repr(line[:SHOWN] + ("…" if len(line) > SHOWN else ""))


def _labelled(text: str, label: str, low: float, high: float) -> float:
    """The number that alone stands behind a label, which begins a line; Markdown's marks around either are left out."""
    found = re.findall(rf"^[#*\-\s]*{label}(.*)$", text, re.MULTILINE)
    numbers = [re.fullmatch(rf"[*\s]*{NUMBER}[.*\s]*", rest) for rest in found]
    name = label.replace("\\", "")
    if not found:
        raise Unreadable(f"no line says {name!r}")
    if any(match is None for match in numbers) or len({match[1] for match in numbers if match}) != 1:
        raise Unreadable(
            f"{name!r} is followed by {', '.join(shown(rest.strip()) for rest in found)}, not by one number"
        )
    value = float(numbers[0][1]) if numbers[0] else math.nan
    if not low <= value <= high:
        raise Unreadable(f"{name!r} is followed by {value:g}, which is not from {low:g} to {high:g}")
    return value


UNIFIED_REWARD = ("alignment", "coherence", "style")
RATIONAL_REWARDS = {
    "text_faithfulness": "Text Faithfulness",
    "physical_quality": "Physical and Visual Quality",
    "text_rendering": "Text Rendering",
}

# The questions are ours, in the formats' own labels. A model scores best on the wording that it was trained with.
FORMATS = {
    "final-score": Format(
        "The image was made for this caption:\n[{prompt}]\n\nRate from 1 (bad) to 5 (excellent), decimals allowed, how "
        "well it shows what the caption says and how good it looks. Name what speaks for and against it, then end with "
        "one line of this form:\nFinal Score: X",
        (1.0, 5.0),
        5.0,
        final_score,
    ),
    "unified-reward": Format(
        "The image was made for this caption:\n[{prompt}]\n\nRate it from 1 to 5, decimals allowed: Alignment, how "
        "well its content matches the caption; Coherence, whether it is free of glitches, distortions and "
        "contradictions; Style, how appealing it looks, whatever the caption says. Answer with these three lines:\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z",
        (1.0, 5.0),
        1.0,
        unified_reward,
    ),
    "rational-rewards": Format(
        "The image was made for this request:\n{prompt}\n\nScore three aspects from 1 (severe faults) to 4 (none), "
        "decimals allowed, and justify each score by what you see: how faithful the image is to the request; its "
        "physical and visual quality; how well it renders text, N/A if the request asks for none. Answer in this "
        "form:\n"
        "# Detailed Judgement\n1. Text Faithfulness:\n## Justification: ...\n## Score: X\n"
        "2. Physical and Visual Quality:\n## Justification: ...\n## Score: X\n"
        "3. Text Rendering:\n## Justification: ...\n## Score: X or N/A\n# Summary: ...",
        (0.0, 1.0),
        1.0,
        rational_rewards,
    ),
}
