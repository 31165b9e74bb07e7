"""Several processes on this machine through torch's elastic agent, for `run.py`; and what each of them does.

A worker is `python -m rewardtune.training.launch JOB`: it runs `run.train_recipe` again, now with RANK set. What it
raises comes back through a file, so the caller sees the same error as with one process.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardtune import errors
from rewardtune.errors import RecipeError, RewardTuneError

if TYPE_CHECKING:
    from rewardtune.recipe.file import LoadedRecipe

SHUTDOWN_SECONDS = 50
"""How long workers may take to finish a step and save after a signal, or after one of them died (ours)."""


def train_recipe(
    loaded: LoadedRecipe,
    *,
    out: Path,
    fresh: bool,
    allow_changed: Sequence[str],
    dry_run: bool,
    nproc: int,
    plugins: Sequence[str],
) -> Path:
    """`run.train_recipe` in `nproc` processes. Raises what the first failing one raised."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    smallest = loaded.recipe.train.accumulation * nproc
    if loaded.recipe.train.batch_size % smallest:
        raise RecipeError(
            f"train.batch_size {loaded.recipe.train.batch_size} cannot be split evenly over {nproc} processes with "
            f"{loaded.recipe.train.accumulation} micro-batches each; make it a multiple of {smallest}."
        )
    job = Path(tempfile.mkdtemp(prefix="rewardtune-"))
    (job / "job.json").write_text(
        json.dumps(
            {
                "recipe": loaded.recipe.model_dump(mode="json"),
                "source": str(loaded.source),
                "text": loaded.text,
                "name": loaded.name,
                "overrides": list(loaded.overrides),
                "out": str(out),
                "fresh": fresh,
                "allow_changed": list(allow_changed),
                "dry_run": dry_run,
                "plugins": list(plugins),
            }
        )
    )
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=job.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT",
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    # The agent reports each failure as a page of its own; ours is one paragraph.
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-m", "rewardtune.training.launch", str(job))
    except SignalException as error:
        _raise_first(job)
        raise SystemExit(128 + int(error.sigval)) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _raise_first(job, died=rank)
        code = failure.exitcode
        if code in (130, 143):
            # Somebody signalled the worker itself, which saved and left.
            raise SystemExit(code) from None
        died = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        lost = RewardTuneError(
            f"training process {rank} of {nproc} {died} without a message. The newest checkpoint in {out} is whole; "
            "run the same command again to continue from it. Signal 9 often means that the machine ran out of memory."
        )
        lost.exit_code = 128 - code if code < 0 else code
        raise lost from None
    finally:
        logger.setLevel(level)
        shutil.rmtree(job, ignore_errors=True)
    return out


def work(job: Path) -> int:
    """What one worker does; returns its exit code."""
    from pydantic import TypeAdapter

    from rewardtune import registry
    from rewardtune.recipe.file import LoadedRecipe
    from rewardtune.recipe.sections import Recipe
    from rewardtune.training import run

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    settings: dict[str, Any] = json.loads((job / "job.json").read_text())
    try:
        for plugin in settings["plugins"]:
            registry.load_plugin(plugin)
        adapter: TypeAdapter[Any] = TypeAdapter(Recipe)
        loaded = LoadedRecipe(
            recipe=adapter.validate_python(settings["recipe"]),
            source=Path(settings["source"]),
            text=settings["text"],
            name=settings["name"],
            overrides=tuple(settings["overrides"]),
        )
        run.train_recipe(
            loaded,
            out=settings["out"],
            fresh=settings["fresh"],
            allow_changed=settings["allow_changed"],
            dry_run=settings["dry_run"],
            plugins=settings["plugins"],
        )
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except Exception as error:
        report = {"kind": type(error).__name__, "message": str(error), "time": time.time()}
        report["traceback"] = traceback.format_exc()
        (job / f"error-{os.environ['RANK']}.json").write_text(json.dumps(report))
        return error.exit_code if isinstance(error, RewardTuneError) else 1
    return 0


def _raise_first(job: Path, *, died: int | None = None) -> None:
    """Raise the earliest error that a worker reported, if any did.

    died: rank of the process that ended first; what the others say of a lost connection is then no cause.
    """
    reports = [json.loads(path.read_text()) for path in job.glob("error-*.json")]
    ours = [report for report in reports if hasattr(errors, report["kind"])]
    if ours:
        first = min(ours, key=lambda report: float(report["time"]))
        raise getattr(errors, first["kind"])(first["message"]) from None
    cause = job / f"error-{died}.json"
    if died is not None and cause.exists():
        report = json.loads(cause.read_text())
        print(report["traceback"], file=sys.stderr)
        raise RuntimeError(f"{report['kind']}: {report['message']}") from None


def _end_with_parent(parent: int) -> None:
    """Leave when the agent is gone (kill -9): a worker that trained on would write beside the next run."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    # Before torch is imported: by default each process would use every core.
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"]))))
    status = work(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the process group may hang where a peer is gone; everything is on disk already.
    os._exit(status)
