"""What is left out of a data set, counted by reason, with the first of each named: never a silent loss.

Filled where rows become what a task trains on (`scorer/targets.py`, `scorer/traces.py`), printed on standard error.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

SHOWN = 5
"""Ours: names of a reason before the rest is only counted."""


class Skipped:
    """Counts by reason, and the first few names of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        if len(self.first[reason]) < SHOWN:
            self.first[reason].append(name)

    def __bool__(self) -> bool:
        return bool(self.counts)

    @property
    def total(self) -> int:
        return self.counts.total()

    def lines(self) -> Iterable[str]:
        """A line a reason: `equal scores: 12 (group a: 1.png and 2.png in realism; ...; and 7 more)`."""
        for reason, count in self.counts.items():
            rest = count - len(self.first[reason])
            names = [*self.first[reason], *([f"and {rest:,} more"] if rest else [])]
            yield f"{reason}: {count:,} ({'; '.join(names)})"
