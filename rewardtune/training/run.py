"""A run folder from start to end: who may continue it, what is recorded in it, training, evaluation, export.

`cli/app.py` and notebooks call `train_recipe`; the loop itself is `loop.py`, the objects come from `build.py`.
"""

from __future__ import annotations

import datetime
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rewardtune.errors import DiskError, RecipeError, RewardTuneError
from rewardtune.recipe.sections import DirectRewardRecipe, Recipe, SftRecipe

if TYPE_CHECKING:
    from rewardtune.guard.guard import Guard
    from rewardtune.recipe.file import LoadedRecipe
    from rewardtune.tasks import Task
    from rewardtune.training.checkpoint import Checkpoint
    from rewardtune.training.runtime import Runtime
    from rewardtune.training.state import State

Writer = Callable[[Path, dict[str, str]], None]
"""Writes an export with its provenance into an empty folder."""


def train_recipe(
    loaded: LoadedRecipe,
    *,
    out: str | Path | None = None,
    fresh: bool = False,
    allow_changed: Sequence[str] = (),
    dry_run: bool = False,
    nproc: int = 1,
    plugins: Sequence[str] = (),
) -> Path:
    """Run a recipe in its folder (`out`, or runs/<name>) and return the folder.

    An empty folder is started; an unfinished one of the same recipe is continued; a finished one is left as it is.
    fresh: move what is there aside first. allow_changed: dotted keys that may differ from the recipe the folder was
    started with. nproc: processes on this machine. plugins: what --plugin named, recorded with its sha256.
    Raises RecipeError for a folder of another recipe, and whatever `train.train` raises.
    """
    folder = Path(out) if out is not None else Path("runs") / loaded.name
    if nproc < 1:
        raise RecipeError(f"--nproc {nproc}: give 1 or more processes.")
    if os.environ.get("RANK", "0") == "0":
        for notice in loaded.notices:
            print(f"note: {notice}", file=sys.stderr)
    if nproc > 1 and "RANK" not in os.environ:
        from rewardtune.training import launch

        return launch.train_recipe(
            loaded, out=folder, fresh=fresh, allow_changed=allow_changed, dry_run=dry_run, nproc=nproc, plugins=plugins
        )
    from rewardtune.training import run_folder, runtime
    from rewardtune.training.signals import Stop

    stop = Stop()
    with stop.listening():
        with stop.leaving_at_once():
            where = runtime.start(device=loaded.recipe.train.device, precision=loaded.recipe.train.precision)
        if dry_run:
            with _temporary(folder, where) as temporary:
                _dry_run(loaded, folder=temporary, where=where, stop=stop)
            return folder
        with _locked(folder, where):
            todo = _together(
                where, lambda: run_folder.prepare(loaded, folder, fresh=fresh, allow=allow_changed, plugins=plugins)
            )
            if todo:
                _run(loaded, folder=folder, where=where, stop=stop, run_id=todo, allow=allow_changed)
    return folder


def export_run(
    run: str | Path,
    *,
    out: str | Path | None = None,
    format: str = "diffusers",
    merge: bool = False,
    scale: float = 1.0,
    push: str | None = None,
) -> Path:
    """Export a run's newest checkpoint, finished or not, to `out` (or the run's export/), and return the folder.

    format: `diffusers`, or `comfyui` for a file of adapters that it loads. merge: the whole pipeline with the adapters
    folded in. These go to the run's export-comfyui/ and export-merged/ by default. scale: how much of what the adapters
    do is kept, above 0 and up to 1; another than 1 is in the folder's default name. push: a repository of the hub to
    upload the folder to. Raises RecipeError when the folder is no run, holds no checkpoint or has no adapters, or the
    hub refuses, CheckFailed when the export does not reload.
    """
    from rewardtune.training import checkpoint as checkpoints
    from rewardtune.training import hub, run_folder, runtime

    folder = Path(run)
    if push is not None:
        hub.check(push)
    known = (folder / "recipe.json").is_file()
    saved = checkpoints.newest(folder / "checkpoints", clean=False) if known else None
    if saved is None:
        raise RecipeError(
            f"{folder} is not a run folder with a checkpoint (recipe.json and checkpoints/ are looked for). Give the "
            "folder that `rewardtune train` printed."
        )
    recipe = run_folder.read_recipe(folder)
    if merge and isinstance(recipe, SftRecipe | DirectRewardRecipe):
        # what bfloat16 would round away of the sum is most of what was learnt
        section = recipe.pipeline.model_copy(update={"dtype": "float32"})
        recipe = recipe.model_copy(update={"pipeline": section})
    where = runtime.start(device=recipe.train.device, precision=recipe.train.precision)
    guard = _finished_guard(recipe, folder, saved.step)
    task = _restored(recipe, saved, where, guard)
    write = _other_form(recipe, task, format=format, merge=merge)
    name = "export-merged" if merge else "export-comfyui" if format == "comfyui" else "export"
    if scale != 1.0:
        _scale(recipe, task, scale)
        name = f"{name}-{scale:g}"
    target = Path(out) if out is not None else folder / name
    chosen = guard.chosen() if guard else None
    step = saved.step if chosen is None else chosen
    scaled = {} if scale == 1.0 else {"lora_scale": f"{scale:g}"}
    _export(write or task.export, target, {**run_folder.provenance(folder, step=step), **scaled})
    if push is not None:
        url = hub.push(target, push, message=f"rewardtune: {folder.resolve().name}, step {step}")
        print(f"uploaded to {url}", file=sys.stderr)
    return target


def _scale(recipe: Recipe, task: Any, scale: float) -> None:
    """Take adapters back towards the start, before they are written."""
    if not isinstance(recipe, SftRecipe | DirectRewardRecipe) or recipe.lora is None:
        raise RecipeError(f"export --scale is about adapters of a pipeline; this run ({recipe.task}) trained none.")
    if not 0 < scale <= 1:
        raise RecipeError(f"export --scale {scale:g}: give a number above 0 (the start) and up to 1 (the tuned model).")
    from rewardtune.diffusion import lora

    lora.shrink(task.trainable.values(), scale)


def _other_form(recipe: Recipe, task: Any, *, format: str, merge: bool) -> Writer | None:
    """What writes another form of export than the task's own; None for that."""
    if format not in ("diffusers", "comfyui") or (merge and format == "comfyui"):
        raise RecipeError(
            f"export: format {format!r}{' with --merge' if merge else ''} is not offered. There are diffusers, "
            "comfyui, and --merge, which writes a whole diffusers pipeline."
        )
    if format == "diffusers" and not merge:
        return None
    wanted = "--merge" if merge else "--format comfyui"
    if not isinstance(recipe, SftRecipe | DirectRewardRecipe) or recipe.lora is None:
        raise RecipeError(f"export {wanted} is about adapters of a pipeline; this run ({recipe.task}) trained none.")
    from rewardtune.diffusion import comfyui, export

    base, revision, modules = recipe.pipeline.model, recipe.pipeline.revision, list(task.trainable)
    write = export.merged if merge else comfyui.export
    return lambda folder, provenance: write(task.pipeline, modules, folder, provenance, base=base, revision=revision)


def _restored(recipe: Recipe, saved: Checkpoint, where: Runtime, guard: Guard | None = None) -> Task:
    """The task of a recipe with the weights of a checkpoint, averaged ones where there are, or those that its guard
    chose; for use, not training."""
    from rewardtune.build import build_task
    from rewardtune.training.state import load_weights, trained_parameters

    task = build_task(recipe, device=str(where.device))
    averaged = recipe.train.ema_decay is not None and (saved.path / "ema.safetensors").exists()
    parameters = trained_parameters(task)
    load_weights(parameters, saved, "ema" if averaged else "parameters")
    if guard is not None and guard.chosen() is not None:
        guard.take_back(parameters)
    return task


def _guard(loaded: LoadedRecipe, task: Task, folder: Path) -> Guard | None:
    """The guard of a recipe that has one."""
    recipe = loaded.recipe
    if not isinstance(recipe, SftRecipe | DirectRewardRecipe) or recipe.guard is None:
        return None
    from rewardtune.build import build_guard

    return build_guard(recipe, task, folder)


def _finished_guard(recipe: Recipe, folder: Path, step: int) -> Guard | None:
    """The guard of a run that is finished, without means to look again; None for a run that it has not ended yet."""
    from rewardtune.training import run_folder

    if not isinstance(recipe, SftRecipe | DirectRewardRecipe) or recipe.guard is None:
        return None
    if not (folder / run_folder.FINISHED).exists():
        return None
    from rewardtune.build import open_guard

    guard = open_guard(recipe.guard, folder, _no_look)
    guard.resume(step)
    return guard


def _no_look() -> NoReturn:
    raise AssertionError("a finished run is not looked at again")


def _take_back(guard: Guard | None, state: State, facts: dict[str, Any]) -> None:
    """What the guard came to, and its weights where it chose others than the last."""
    if guard is None or guard.verdict is None:
        return
    facts["guard"] = guard.outcome()
    if (step := guard.chosen()) is not None:
        guard.take_back(state.parameters)
        state.ema = None  # the chosen weights are averages already, where there are any
        facts["step"] = step


def _export(write: Writer, target: Path, provenance: dict[str, str]) -> None:
    """Export beside `target`, then put it in its place: a former export is replaced only by a whole one."""
    from rewardtune.training.checkpoint import open_to_readers

    temporary = target.parent / f".tmp-{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary, provenance)
        open_to_readers(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except OSError as error:
        raise DiskError(
            f"the export could not be written to {target} ({error}). The last checkpoint is whole: free some disk "
            "space and run the same command again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run(loaded: LoadedRecipe, *, folder: Path, where: Runtime, stop: Any, run_id: str, allow: Sequence[str]) -> None:
    """Build, train, evaluate, export."""
    from rewardtune.tasks.direct_reward import DirectReward
    from rewardtune.training import run_folder

    recipe = loaded.recipe
    with stop.leaving_at_once():
        task = _build(loaded, where)
        guard = _guard(loaded, task, folder)
        trained = [term.reward.card for term in task.rewards.terms] if isinstance(task, DirectReward) else []
        held_out = guard.cards if guard else ()
        if trained or held_out:
            _together(where, lambda: run_folder.record_rewards(folder, trained, held_out, allow=allow))
    trackers = None
    if where.main:
        from rewardtune.training.track import build_trackers

        track = recipe.track
        trackers = build_trackers(
            wandb=track.wandb,
            tensorboard=track.tensorboard,
            project=track.project,
            name=folder.name,
            folder=folder,
            run_id=run_id,
            config=loaded.resolved,
        )
    try:
        state = _train(loaded, task, folder=folder, where=where, stop=stop, trackers=trackers, guard=guard)
        last = state.step
        facts: dict[str, Any] = {"step": last, "skipped": state.skipped, "evaluation": {}}
        _take_back(guard, state, facts)
        with stop.leaving_at_once():
            if where.main or state.shards:
                facts["evaluation"] = _evaluate(task, state, where)
            if where.main:
                averaged = state.averaged()
                if state.shards:
                    # Files are written and checked from whole modules, in one process. The parts go first, so that
                    # both never stand beside each other; a scorer is put together in main memory (loading_place).
                    if guard is not None:
                        guard.watch = _no_look  # it holds the pipeline
                    del task, state, averaged
                    gc.collect()
                    task, averaged = _restored(recipe, _newest(folder), where, guard), nullcontext()
                with averaged:
                    _export(task.export, folder / "export", run_folder.provenance(folder, step=facts["step"]))
                _mark_finished(folder, facts)
        if trackers is not None:
            # at the last step, also where an earlier one is exported: wandb drops what comes after a later step
            trackers.log(_outcome(facts), step=last)
    finally:
        if trackers is not None:
            trackers.finish()
    # The others wait, so that no launcher takes their early end for a failure.
    where.gather(None)


def _evaluate(task: Task, state: State, where: Runtime) -> dict[str, float]:
    """Held-out numbers of the final weights."""
    from rewardtune.training.loop import evaluating

    with evaluating(task, state, where):
        return dict(task.evaluate())


def _outcome(facts: dict[str, Any]) -> dict[str, Any]:
    """What finished.json says of the evaluation and the guard's choice, for the trackers' summaries."""
    said = {f"evaluation/{name}": value for name, value in facts["evaluation"].items()}
    for name, value in facts.get("guard", {}).items():
        said[f"guard/{name}"] = "; ".join(value) or "none" if isinstance(value, list) else value
    return said


def _mark_finished(folder: Path, facts: dict[str, Any]) -> None:
    from rewardtune.training import run_folder
    from rewardtune.training.checkpoint import write_json

    try:
        write_json(folder / run_folder.FINISHED, facts)
    except OSError as error:
        raise DiskError(
            f"{folder} cannot be written any more ({error}). Free some disk space and run again."
        ) from error


def _newest(folder: Path) -> Checkpoint:
    from rewardtune.training import checkpoint as checkpoints

    saved = checkpoints.newest(folder / "checkpoints")
    if saved is None:
        raise DiskError(f"the checkpoint written below {folder} does not load again.")
    return saved


def _build(loaded: LoadedRecipe, where: Runtime) -> Task:
    from rewardtune.build import build_task

    return build_task(loaded.recipe, device=str(where.device))


def _train(loaded: LoadedRecipe, task: Task, **surroundings: Any) -> State:
    """The loop, with the recipe's settings."""
    from rewardtune.training.loop import train

    recipe = loaded.recipe
    every = recipe.samples.every if isinstance(recipe, SftRecipe | DirectRewardRecipe) else recipe.train.steps
    return train(
        task,
        train=recipe.train,
        optimizer=recipe.optimizer,
        checkpoint=recipe.checkpoint,
        sample_every=every,
        **surroundings,
    )


def _dry_run(loaded: LoadedRecipe, *, folder: Path, where: Runtime, stop: Any) -> None:
    """Everything once: build, a step, a checkpoint, a reload; say what a whole run would take."""
    import torch

    from rewardtune.training.shard import local
    from rewardtune.training.track import read_metrics

    recipe = loaded.recipe
    with stop.leaving_at_once():
        task = _build(loaded, where)
    state = _train(loaded, task, folder=folder, where=where, stop=stop, until=1)
    if where.main:
        saved = _newest(folder)
        before = {name: local(p.detach()).cpu().clone() for name, p in state.parameters.items()}
        state.load(saved)
        if not all(torch.equal(before[name], local(p.detach()).cpu()) for name, p in state.parameters.items()):
            raise DiskError(f"the checkpoint written below {folder} loads other numbers than were saved.")
        seconds = read_metrics(folder / "metrics.jsonl")[0]["seconds"]
        size = sum(file.stat().st_size for file in saved.path.iterdir())
        print(
            f"dry run: one step took {seconds:.2f} s, so {recipe.train.steps} steps take about "
            f"{datetime.timedelta(seconds=round(seconds * recipe.train.steps))} (the first step is the slowest); "
            f"peak memory {where.peak_memory() / 2**30:.2f} GiB; a checkpoint {size / 2**20:.1f} MiB, "
            f"written and read back. Nothing is left behind.",
            file=sys.stderr,
        )
    where.gather(None)


def _together(where: Runtime, action: Any) -> Any:
    """Do something in the main process; all processes get its result or its error."""
    result: Any = None
    if where.main:
        try:
            result = ("done", action())
        except RewardTuneError as error:
            result = ("failed", error)
        except OSError as error:
            result = ("failed", DiskError(f"the run folder cannot be written: {error}. Name another with --out."))
    how, value = where.broadcast(result)
    if how == "failed":
        raise value
    return value


@contextmanager
def _locked(folder: Path, where: Runtime) -> Iterator[None]:
    """Create the folder and hold its lock, so that two runs cannot write into it at once."""
    from rewardtune.training import run_folder

    descriptor = _together(where, lambda: run_folder.lock(folder))
    try:
        yield
    finally:
        if where.main:
            os.close(descriptor)


@contextmanager
def _temporary(folder: Path, where: Runtime) -> Iterator[Path]:
    """A folder on the same disk as `folder`, gone afterwards."""
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())

    def make() -> str:
        try:
            return tempfile.mkdtemp(prefix=".dry-run-", dir=parent)
        except OSError as error:
            raise DiskError(f"{parent} cannot be written ({error}). Name another folder with --out.") from error

    path = Path(_together(where, make))
    try:
        yield path
    finally:
        if where.main:
            shutil.rmtree(path, ignore_errors=True)
