"""A progress line on standard error: rewritten in place on a terminal. Elsewhere, as in a log, it is a line every tenth
of what takes long, and nothing for what is soon done.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

QUIET = 10.0
"""Ours: seconds for which nobody who reads a log asks where it is."""


class Progress:
    """Counts `total` units of `what` and says how long the rest will take."""

    def __init__(self, what: str, total: int, *, stream: TextIO | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self._stream = stream or sys.stderr
        self._start = time.monotonic()
        self._shown = 0.0
        self._tenth = 0

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        finished = self.done >= self.total
        if self._stream.isatty():
            if finished or now - self._shown > 0.2:
                self._shown = now
                self._stream.write(f"\r\x1b[2K{self._line(now)}" + ("\n" if finished else ""))
                self._stream.flush()
        elif now - self._start > QUIET and self.done * 10 // max(self.total, 1) > self._tenth:
            self._tenth = self.done * 10 // max(self.total, 1)
            self._stream.write(self._line(now) + "\n")
            self._stream.flush()

    def _line(self, now: float) -> str:
        spent = now - self._start
        line = f"{self.what}: {self.done}/{self.total}"
        if self.done < self.total:
            return f"{line}, {_clock(spent / max(self.done, 1) * (self.total - self.done))} left"
        return f"{line} in {_clock(spent)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
