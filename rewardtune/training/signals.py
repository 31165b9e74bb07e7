"""SIGTERM and SIGINT: noted while a step runs, obeyed at once where nothing would be lost. Used by `run.py`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether a signal has asked to stop; `signal` is its number, or 0."""

    def __init__(self) -> None:
        self.signal = 0
        self.at_once = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first signal is noted and a second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread only; whoever owns it decides.
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Inside, the first signal raises SystemExit: the last checkpoint already holds everything."""
        if self.signal:
            raise SystemExit(128 + self.signal)
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        if self.at_once:
            raise SystemExit(128 + number)
        if os.environ.get("RANK", "0") == "0":
            # `print` may be interrupted by its own signal handler.
            os.write(2, b"stopping after this step, with a checkpoint; a second signal leaves at once\n")
