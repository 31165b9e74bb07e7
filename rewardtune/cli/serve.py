"""`rewardtune serve`: a reward over HTTP, until a signal ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from rewardtune.cli.command import printable, quiet_stdout, show

TOKEN_VARIABLE = "REWARDTUNE_TOKEN"
GRACE = 10.0
"""Seconds that requests under way get after a signal. Ours: below the 30 that schedulers wait before they kill."""
MIB = 2**20


def serve(
    reward: Annotated[
        str, typer.Option("--reward", metavar="NAME[:option=value,...]", help="A name of `rewards list`.")
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen on; this machine alone by default.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8421,
    token_file: Annotated[
        str | None,
        typer.Option("--token-file", metavar="FILE", help=f"Holds the token; else {TOKEN_VARIABLE}, else a new one."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; the best one by default.")] = None,
    max_mib: Annotated[int, typer.Option("--max-mib", min=1, help="Largest request, in MiB.")] = 1024,
    max_images: Annotated[int, typer.Option("--max-images", min=1, help="Most images of a request.")] = 64,
    max_pixels: Annotated[int, typer.Option("--max-pixels", min=1, help="Most pixels of an image.")] = 2048 * 2048,
) -> None:
    """Serve a reward: scores, and gradients at the images, for `rewards: [{name: remote}]` in other processes."""
    from rewardtune import registry
    from rewardtune.scoring.score import best_device, parse_spec
    from rewardtune.serving.connection import is_loopback, key_from_environment, key_from_file

    name, options = parse_spec(reward)
    registry.rewards.load_class(name)  # a wrong name is told before torch is loaded
    given = key_from_file(token_file) if token_file else None
    if given is None and os.environ.get(TOKEN_VARIABLE):
        given = key_from_environment(TOKEN_VARIABLE, remedy="Put a token of printable ASCII into it, or unset it.")
    with quiet_stdout():
        from rewardtune.scoring.reward_set import load_reward
        from rewardtune.serving.server import Limits, RewardServer, new_token

        device = device or best_device()
        token = given.secret if given else new_token()
        server = RewardServer(
            load_reward(name, device=device, **options), options={"name": name, **options}, token=token, host=host,
            port=port, limits=Limits(max_mib * MIB, max_images, max_pixels), device=device, log=_log,
        )  # fmt: skip
    show(f"reward {server.card['name']} on {device}, identity {server.identity}")
    show(f"url: {server.url}")
    show(f"token: {'from ' + given.source if given else token}")
    if not is_loopback(host):
        _log(f"{host} can be reached from other machines, and token and images travel unencrypted (docs/serving.md)")
    sys.stdout.flush()
    raise typer.Exit(128 + _until_signal(server.serve_forever, server.finish))


def _until_signal(run: Callable[[], None], finish: Callable[[float], bool]) -> int:
    """Run in another thread until SIGTERM or SIGINT; its number. A second signal leaves at once."""
    asked, number = threading.Event(), 0

    def receive(given: int, frame: FrameType | None) -> None:
        nonlocal number
        if number:
            os._exit(128 + given)
        number = given
        asked.set()

    before = {which: signal.signal(which, receive) for which in (signal.SIGTERM, signal.SIGINT)}
    try:
        threading.Thread(target=run, daemon=True).start()
        asked.wait()
        _log(f"{signal.Signals(number).name}: no more requests; those under way get {GRACE:g} s")
        if not finish(GRACE):
            _log("left with a request under way; its client will ask again")
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    return number


def _log(line: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(line)}", file=sys.stderr, flush=True)
