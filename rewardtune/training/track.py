"""Where numbers go: metrics.jsonl always, wandb and TensorBoard if asked, a progress line for the person who waits.

A tracker that fails is switched off with one warning; it never ends or changes a run.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rewardtune.training.checkpoint import write_text


class MetricsFile:
    """metrics.jsonl: one JSON object per optimiser step, appended and flushed.

    Lines that cannot be written (a full disk) wait in memory and are tried again at the next step.
    """

    def __init__(self, path: Path, *, after: int) -> None:
        """Keep the lines of steps up to `after`, the step of the checkpoint that the run goes on from."""
        self.path = path
        self._pending: list[str] = []
        if path.exists():
            kept = [line for line in path.read_text("utf-8").splitlines(keepends=True) if 0 <= _step(line) <= after]
            write_text(path, "".join(kept))
        self._end = path.stat().st_size if path.exists() else 0

    def add(self, values: Mapping[str, Any]) -> None:
        """Append one line; a number that is not finite becomes null, which JSON has."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._pending.append(json.dumps(plain) + "\n")
        # A checkpoint's `sync` raises; until then the lines are safe in memory.
        try:
            self._write()
        except OSError:
            return

    def sync(self) -> None:
        """Write what waits and flush it to disk. Raises OSError when that does not work."""
        self._write()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _write(self) -> None:
        if not self._pending:
            return
        data = "".join(self._pending).encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            # What a failed attempt left behind is cut off first, so that no line is ever torn.
            os.ftruncate(descriptor, self._end)
            os.lseek(descriptor, self._end, os.SEEK_SET)
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
        finally:
            os.close(descriptor)
        self._end += len(data)
        self._pending.clear()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step(line) >= 0]


class Tracker(Protocol):
    """What is asked of accelerate's trackers."""

    def start(self) -> None:
        """Open the run."""
        ...

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Send numbers."""
        ...

    def finish(self) -> None:
        """Close the run."""
        ...


class Trackers:
    """The optional trackers of one run, each wrapped so that its failure stays its own."""

    def __init__(self, trackers: Mapping[str, Callable[[], Tracker]], *, config: Mapping[str, Any]) -> None:
        self._live: dict[str, Tracker] = {}
        for name, make in trackers.items():
            self._guard(name, lambda name=name, make=make: self._start(name, make, config))  # type: ignore[misc]

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """Send numbers of one step to every tracker that still works."""
        for name, tracker in list(self._live.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(dict(values), step=step))  # type: ignore[misc]

    def finish(self) -> None:
        """Close them."""
        for name, tracker in list(self._live.items()):
            self._guard(name, tracker.finish)
        self._live.clear()

    def _start(self, name: str, make: Callable[[], Tracker], config: Mapping[str, Any]) -> None:
        tracker = make()
        tracker.start()
        if name == "wandb":
            tracker.store_init_configuration(dict(config))  # type: ignore[attr-defined]
        self._live[name] = tracker

    def _guard(self, name: str, call: Callable[[], object]) -> None:
        # Anything at all may go wrong in a client of somebody else's server; wandb even leaves by SystemExit.
        try:
            call()
        except (Exception, SystemExit) as error:
            self._live.pop(name, None)
            print(f"tracker {name} is switched off: {type(error).__name__}: {error}", file=sys.stderr)


def build_trackers(
    *, wandb: str, tensorboard: bool, project: str, name: str, folder: Path, run_id: str, config: Mapping[str, Any]
) -> Trackers:
    """The trackers a recipe asks for. A continued run goes on under the same `run_id`."""
    makers: dict[str, Callable[[], Tracker]] = {}
    if wandb != "off":
        makers["wandb"] = lambda: _wandb(wandb, project=project, name=name, folder=folder, run_id=run_id)
    if tensorboard:
        makers["tensorboard"] = lambda: _tensorboard(folder)
    return Trackers(makers, config=config)


def _wandb(mode: str, *, project: str, name: str, folder: Path, run_id: str) -> Tracker:
    from accelerate.tracking import WandBTracker

    if mode == "online" and not sys.stdin.isatty() and not _wandb_key():
        print("wandb: no API key and nobody to ask; writing offline (`wandb sync` sends it later).", file=sys.stderr)
        mode = "offline"
    import wandb

    # Without `silent` the client prints a banner into the progress line.
    settings = wandb.Settings(silent=True)
    return WandBTracker(project, name=name, id=run_id, resume="allow", mode=mode, dir=str(folder), settings=settings)  # type: ignore[no-any-return]


def _wandb_key() -> bool:
    """Whether wandb could sign in without asking."""
    import wandb

    return bool(wandb.api.api_key)


def _tensorboard(folder: Path) -> Tracker:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", logging_dir=str(folder))  # type: ignore[no-any-return]


class Progress:
    """One line for the person who waits, on standard error: a bar on a terminal, else a line every few seconds."""

    def __init__(self, *, total: int, done: int, every_seconds: float = 10.0) -> None:
        self.total = total
        self.every_seconds = every_seconds
        self._seconds: list[float] = []
        self._said = -float("inf")  # the clock may have begun a moment ago
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}", markup=False),
                console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=total, completed=done, text="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, values: Mapping[str, Any], *, memory: int) -> None:
        """Say where the run is. values: one line of metrics.jsonl; memory: bytes."""
        self._seconds = [*self._seconds[-49:], values["seconds"]]
        pace = sum(self._seconds) / len(self._seconds)
        step = values["step"]
        rewards = [f"{k} {v:.3f}" for k, v in values.items() if k.startswith("reward") and isinstance(v, float)][:3]
        parts = [*rewards, f"loss {values['loss']:.4f}", f"{pace:.2f} s/step"]
        parts += [f"ETA {_clock(pace * (self.total - step))}", f"{memory / 2**30:.1f} GiB"]
        if values["skipped"]:
            parts.append(f"skipped {values['skipped']}")
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif time.monotonic() - self._said >= self.every_seconds or step == self.total:
            self._said = time.monotonic()
            print(f"step {step}/{self.total}  {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _step(line: str) -> int:
    """The step of a line, -1 for a torn one."""
    try:
        return int(json.loads(line)["step"]) if line.strip() else -1
    except (ValueError, KeyError, TypeError):
        return -1
