"""A reward server on loopback, in a thread, for tests; and a line that breaks as told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rewardtune.serving.server import Limits, RewardServer

TOKEN = "a token of a test"


@contextmanager
def serving(reward, *, options=None, port=0, token=TOKEN, limits=None, cls=RewardServer) -> Iterator[RewardServer]:
    """The server, whose `lines` are what it logged."""
    lines: list[str] = []
    server = cls(reward, options=options or {}, token=token, port=port, limits=limits or Limits(), log=lines.append)
    server.lines = lines
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.finish(5)
        thread.join(5)
