"""What all commands share: --plugin, --traceback, errors as one paragraph with their exit code, JSON on its own.

`app.py` declares the commands with `command`; nothing here knows one of them.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import sysconfig
import traceback as tracebacks
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

import rewardtune
from rewardtune.errors import OutOfMemoryError, RewardTuneError

OUR_FAULT = 70
"""Exit code for an error that no check foresaw; no other code has this meaning."""
DISK = 6
INTERRUPTED = 130

PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE_OR_MODULE",
        help="Import a file or module whose rewards or pipelines register themselves. Repeatable. It runs its code.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else there.")]
TracebackOption = Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")]


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command. It gets --plugin (imported before it runs) and --traceback; its own --device,
    if it has one, names a device of this machine."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, plugin: list[str] | None, traceback: bool, **arguments: Any) -> None:
            if not sys.stderr.isatty():
                # Libraries draw a bar for every file they load; in a log these are noise. Read when tqdm is imported.
                os.environ.setdefault("TQDM_DISABLE", "1")
            with errors_as_paragraphs(traceback=traceback):
                if plugin:
                    from rewardtune.registry import load_plugin

                    for source in plugin:
                        load_plugin(source)
                if arguments.get("device") is not None:
                    from rewardtune import devices

                    # before anything loads, and in the words that a recipe's train.device gets
                    devices.find(arguments["device"], key="--device")
                function(**arguments)

        signature = inspect.signature(function, eval_str=True)
        added = [
            inspect.Parameter("plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=PluginOption),
            inspect.Parameter("traceback", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=TracebackOption),
        ]
        parameters = [*signature.parameters.values(), *added]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name)(run)
        return function

    return decorate


@contextmanager
def errors_as_paragraphs(*, traceback: bool) -> Iterator[None]:
    """Turn errors into a paragraph on standard error and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except RewardTuneError as error:
        _leave(error, str(error), error.exit_code, traceback=traceback)
    except KeyboardInterrupt as error:
        _leave(error, str(error) or "interrupted", INTERRUPTED, traceback=traceback)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say, not even at shutdown.
        sys.stdout = None
        raise typer.Exit(0) from None
    except OSError as error:
        said = str(error)
        if error.filename and error.strerror:
            said = f"{error.filename}: {error.strerror}. Name another place, or make room or give rights there."
        _leave(error, f"the system refused: {said}", DISK, traceback=traceback)
    except Exception as error:
        if _out_of_memory(error):
            found = str(error).strip().partition("\n")[0].rstrip(".")
            said = (
                f"out of memory ({found or 'no details'}). Do less at once (a smaller batch size or smaller pictures), "
                "name another device, or end what else uses its memory."
            )
            _leave(error, said, OutOfMemoryError.exit_code, traceback=traceback)
        where = _elsewhere(error)
        whose = f"raised in {where}, a plug-in's file" if where else "this is a fault of rewardtune"
        said = f"unexpected {type(error).__name__}: {error} ({whose}; --traceback shows more)"
        _leave(error, said, OUR_FAULT, traceback=traceback)


def _out_of_memory(error: Exception) -> bool:
    """Whether it is Python's, CUDA's or torch's message of exhausted memory; known without importing torch."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error))
    )


def _elsewhere(error: BaseException) -> str:
    """File and line of the innermost code that is neither ours nor an installed package's, if there is any."""
    ours, installed = str(Path(rewardtune.__file__).parent), ("site-packages", "dist-packages", "<")
    beside = tuple(str(Path(ours).parent / name) for name in ("rewards", "pipelines"))  # of a checkout
    standard = sysconfig.get_paths()["stdlib"]
    for frame in reversed(tracebacks.extract_tb(error.__traceback__)):
        file = frame.filename
        if not file.startswith((ours, *beside, standard)) and not any(part in file for part in installed):
            return f"{file}, line {frame.lineno}"
    return ""


def _leave(error: BaseException, said: str, code: int, *, traceback: bool) -> None:
    if traceback:
        tracebacks.print_exception(error)
    print(f"error: {printable(said)}", file=sys.stderr)
    raise typer.Exit(code) from error


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters other than line ends are written as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def show(text: str = "") -> None:
    """A line for people, on standard output."""
    print(printable(text))


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest entry."""
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_json(document: Any) -> None:
    """The one JSON document of a command with --json."""
    print(json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False))


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what libraries print to standard error, so that standard output holds our answer and nothing else."""
    with redirect_stdout(sys.stderr):
        yield
