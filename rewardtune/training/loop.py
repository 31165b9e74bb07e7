"""One loop for every task: batch, backward, average, check, clip, step, log, save. It knows no algorithm.

`run.py` calls it with a task from `build.py`; what a step means is the task's (tasks/).
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.data.rows import counted
from rewardtune.errors import DiskError, NonFiniteError, OutOfMemoryError, RecipeError
from rewardtune.guard.guard import Guard
from rewardtune.randomness import key
from rewardtune.recipe.sections import CheckpointSection, OptimizerSection, TrainSection
from rewardtune.tasks import Task
from rewardtune.training import checkpoint as checkpoints
from rewardtune.training import optim, runtime, shard
from rewardtune.training.runtime import Runtime
from rewardtune.training.signals import Stop
from rewardtune.training.state import State, build_state
from rewardtune.training.track import MetricsFile, Progress, Trackers

FAILED_SAVES = 3
"""Checkpoints in a row that may fail to be written before the run ends (ours)."""
BUCKET = 1 << 25
"""Numbers that are averaged over processes at a time: 128 MiB of fp32 (ours)."""


@dataclass
class Loop:
    """What surrounds the steps: where things go, when, and who may interrupt."""

    folder: Path
    every: int
    keep: int
    where: Runtime
    stop: Stop
    failed_saves: int = 0
    saved: int = -1
    """Step of the newest checkpoint."""
    metrics: MetricsFile | None = None
    trackers: Trackers | None = None
    guard: Guard | None = None

    def save(self, state: State, *, final: bool = False) -> None:
        """Write a checkpoint in the main process. Raises DiskError after too many failures, or if nothing follows."""
        if self.saved == state.step:
            return
        parts, rest = state.pack(keep=self.where.main)
        if not self.where.main:
            self.saved = state.step
            return
        try:
            if self.metrics is not None:
                self.metrics.sync()
            rest["processes"] = self.where.world
            checkpoints.save(self.folder / "checkpoints", step=state.step, parts=parts, state=rest, keep=self.keep)
            self.failed_saves, self.saved = 0, state.step
            if self.guard is not None:
                self.guard.saved()
        except OSError as error:
            self.failed_saves += 1
            problem = error if isinstance(error, DiskError) else DiskError(f"metrics.jsonl cannot be written: {error}")
            if final or self.failed_saves >= FAILED_SAVES:
                raise problem from error
            print(f"warning: {problem} Trying again in {self.every} steps.", file=sys.stderr)


def train(
    task: Task,
    *,
    folder: Path,
    train: TrainSection,
    optimizer: OptimizerSection | None = None,
    checkpoint: CheckpointSection | None = None,
    sample_every: int = 100,
    until: int | None = None,
    where: Runtime | None = None,
    stop: Stop | None = None,
    trackers: Trackers | None = None,
    guard: Guard | None = None,
) -> State:
    """Train `task` from the newest valid checkpoint in `folder`, or from its start, to `train.steps`.

    `until` ends earlier, as if interrupted there; so does a guard that has seen enough. Returns the live state, whose
    last step is also in a checkpoint.
    Raises NonFiniteError, OutOfMemoryError, DiskError, RecipeError; leaves by SystemExit(128 + signal) after a signal.
    In all these cases the newest checkpoint is whole.
    """
    optimizer, checkpoint = optimizer or OptimizerSection(), checkpoint or CheckpointSection()
    where = where or runtime.start(device=train.device, precision=train.precision)
    share = train.batch_size // (where.world * train.accumulation)
    if share * where.world * train.accumulation != train.batch_size:
        raise RecipeError(
            f"train.batch_size {train.batch_size} cannot be split evenly over {where.world} processes with "
            f"{train.accumulation} micro-batches each; make it a multiple of {where.world * train.accumulation}."
        )
    last = min(until if until is not None else train.steps, train.steps)
    state = build_state(task, train=train, optimizer=optimizer, where=where)
    loop = Loop(folder, checkpoint.every, checkpoint.keep, where, stop or Stop(), trackers=trackers, guard=guard)
    _resume(state, loop)
    if guard is not None:
        guard.resume(state.step)
    if state.step > train.steps:
        raise RecipeError(
            f"{folder} has already done {state.step} steps, more than train.steps {train.steps}. Ask for at least as "
            "many, or start anew with --fresh or another --out."
        )
    if where.main:
        _check_space(folder, state)
        loop.metrics = MetricsFile(folder / "metrics.jsonl", after=state.step)
    with _out_of_memory(), Progress(total=train.steps, done=state.step) as progress:
        if state.step % sample_every == 0:
            _samples(task, state, loop, again=False)
        seen, ended = _guarded(task, state, loop, last=train.steps)
        if seen and loop.trackers is not None:
            loop.trackers.log(seen, step=state.step)  # the start has no line of metrics.jsonl
        while state.step < last and not ended:
            values, signal, problem = _step(task, state, train=train, share=share, loop=loop)
            if not signal:
                seen, ended = _guarded(task, state, loop, last=train.steps)
                values |= seen
            if loop.metrics is not None:
                loop.metrics.add(values)
                progress.show(values, memory=where.peak_memory())
            if loop.trackers is not None:
                loop.trackers.log(values, step=state.step)
            if state.skipped_in_a_row == 1 and where.main:
                why = problem or "Its loss or gradients are not finite."
                print(f"step {state.step} was skipped. {why}", file=sys.stderr)
            if state.skipped_in_a_row > train.max_consecutive_skips:
                loop.save(state)
                raise _skipped(state, problem, f"more than train.max_consecutive_skips {train.max_consecutive_skips}")
            if state.skipped == state.step == last:
                loop.save(state, final=True)
                raise _skipped(state, problem, "all there were")
            if signal:
                loop.save(state, final=True)
                raise SystemExit(128 + signal)
            if state.step % checkpoint.every == 0 and state.step < last:
                loop.save(state)
            if state.step % sample_every == 0 or state.step == train.steps or ended:
                _samples(task, state, loop)
        loop.save(state, final=True)
    return state


def _skipped(state: State, problem: str, how_many: str) -> NonFiniteError:
    return NonFiniteError(
        f"{counted(state.skipped_in_a_row, 'optimiser step')} in a row, up to step {state.step}, had a loss or "
        f"gradients that are not finite, {how_many}. {problem + ' ' if problem else ''}The parameters are those before "
        "that. Lower optimizer.lr, use train.precision fp32, or look at the data and rewards."
    )


def _step(task: Task, state: State, *, train: TrainSection, share: int, loop: Loop) -> tuple[dict[str, Any], int, str]:
    """One optimiser step: (its line of metrics.jsonl, the signal that asks to stop or 0, why it was skipped)."""
    began, where = time.monotonic(), loop.where
    lr = float(state.optimizer.param_groups[0]["lr"])
    parameters = list(state.parameters.values())
    state.optimizer.zero_grad(set_to_none=True)
    with state.shards.open():
        losses, metrics, problem = _backward(task, state, train=train, share=share, where=where)
        state.shards.finish_backward()
    present = [p.grad is not None for p in parameters]
    everyone = where.gather((sum(losses) / len(losses), present, metrics, problem, loop.stop.signal))
    loss = sum(report[0] for report in everyone) / where.world
    norm = math.nan
    if math.isfinite(loss):
        # A process whose micro-batches did not touch a parameter contributes zeros to it.
        touched = [any(flags) for flags in zip(*(report[1] for report in everyone), strict=True)]
        used = [p for p, flag in zip(parameters, touched, strict=True) if flag]
        norm = _average(used, where, train.max_grad_norm, averaged=bool(state.shards))
    # All processes see the same loss and norm, so they decide alike.
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        state.optimizer.step()
        if state.ema:
            state.ema.update()
    state.optimizer.zero_grad(set_to_none=True)
    optim.advance(state.schedule)
    state.step += 1
    state.skipped += not finite
    state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
    problem = next((report[3] for report in everyone if report[3]), "")
    # Where a reward is missing, the mean of the others is not the step's.
    shown = {} if problem else _mean([m for report in everyone for m in report[2]])
    values = {"step": state.step, "loss": loss, **shown}
    values |= {"grad_norm": norm, "lr": lr, "seconds": round(time.monotonic() - began, 4), "skipped": state.skipped}
    return values, max(report[4] for report in everyone), problem


def _backward(
    task: Task, state: State, *, train: TrainSection, share: int, where: Runtime
) -> tuple[list[float], list[Mapping[str, float]], str]:
    """Gradients of this process's micro-batches, divided by their number: (losses, metrics, what went wrong)."""
    losses: list[float] = []
    metrics: list[Mapping[str, float]] = []
    first = state.step * train.batch_size + where.rank * share * train.accumulation
    for micro in range(train.accumulation):
        start = first + micro * share
        indices = range(start, start + share)
        # Layers with dropout draw from torch's own generator; keyed like everything else, they repeat on a resumed run.
        torch.manual_seed(key(train.seed, "global", state.step, start))
        with where.autocast():
            with torch.no_grad():
                batch, problem = _attempt(state, where, task.batch, state.step, indices)
            if not problem:
                output, problem = _attempt(state, where, task.step, batch)
        if problem:
            return [math.nan], [], problem
        state.shards.synchronise(micro == train.accumulation - 1)
        if output.loss.requires_grad:
            (output.loss / train.accumulation).backward()
        losses.append(float(output.loss.detach()))
        metrics.append(output.metrics)
    return losses, metrics, ""


def _attempt(state: State, where: Runtime, action: Callable[..., Any], *given: Any) -> tuple[Any, str]:
    """(what `action` returns, what was not finite in it). Sharded modules compute in all processes or in none."""
    result, problem = None, ""
    try:
        result = action(*given)
    except NonFiniteError as error:
        problem = str(error)
    return result, next(filter(None, where.gather(problem)), "") if state.shards else problem


def _average(parameters: Sequence[nn.Parameter], where: Runtime, max_norm: float, *, averaged: bool) -> float:
    """Average gradients over processes, then clip them to `max_norm` if they are finite; returns the norm before.

    averaged: they are averages already, as FSDP leaves them.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if where.world > 1 and not averaged:
        for bucket in _buckets(gradients):
            flat = where.mean(torch.cat([g.reshape(-1) for g in bucket]))
            for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))
    if not gradients:
        return 0.0
    norm = shard.whole(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(float(norm)):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number over the micro-batches that report it."""
    names = dict.fromkeys(name for some in metrics for name in some)
    found = {name: [float(some[name]) for some in metrics if name in some] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def _resume(state: State, loop: Loop) -> None:
    """Load the newest valid checkpoint, the same in every process."""
    folder = loop.folder / "checkpoints"
    found = checkpoints.newest(folder) if loop.where.main else None
    path = loop.where.broadcast(found.path if found else None)
    if path is None:
        if loop.where.main and any(folder.glob("damaged-*")):
            print("no valid checkpoint is left; starting from step 0.", file=sys.stderr)
        return
    saved = found or checkpoints.read(path)
    state.load(saved)
    loop.saved = saved.step
    if loop.where.main:
        print(f"continuing from {path}", file=sys.stderr)
        if saved.state["processes"] != loop.where.world:
            print(
                f"note: the checkpoint was written by {saved.state['processes']} processes and is continued by "
                f"{loop.where.world}; losses agree to rounding, not to the bit.", file=sys.stderr,
            )  # fmt: skip


def _guarded(task: Task, state: State, loop: Loop, *, last: int) -> tuple[dict[str, float], bool]:
    """(what the guard saw where a look was due, whether it ends the training), the same in every process."""
    guard, where = loop.guard, loop.where
    if guard is None:
        return {}, False
    seen: dict[str, float] = {}
    if guard.due(state.step, last):
        look, weights = None, {}
        interruptible = loop.stop.leaving_at_once() if where.world == 1 else nullcontext()
        try:
            with evaluating(task, state, where):
                with interruptible:
                    # Sharded modules compute in all processes or in none; otherwise the main one draws.
                    look = guard.watch() if where.main or state.shards else None
                weights = shard.gathered(state.parameters, keep=where.main)
                if where.main and look is not None:
                    seen = guard.add(state.step, look, weights)
        except SystemExit:
            loop.save(state, final=True)
            raise
    seen, looks = where.broadcast((seen, guard.looks))
    if not where.main:
        guard.recall(looks)
    return seen, guard.ends


def _samples(task: Task, state: State, loop: Loop, *, again: bool = True) -> None:
    """Draw the recipe's fixed prompts and keep them as one picture; `again` also when it is there already."""
    step = state.step
    path = loop.folder / "samples" / f"step-{step:06d}.png"
    there = path.exists() and not again
    # Sharded modules compute in all processes or in none; otherwise the main one draws.
    if loop.where.broadcast(there) if state.shards else there or not loop.where.main:
        return
    # Drawing may take long, so a signal ends it; with several processes the others are a step ahead already.
    interruptible = loop.stop.leaving_at_once() if loop.where.world == 1 else nullcontext()
    try:
        # In this order: a signal must not interrupt the return to the trained weights.
        with evaluating(task, state, loop.where), interruptible:
            images = task.samples()
    except SystemExit:
        loop.save(state, final=True)
        raise
    if images is None or not loop.where.main:
        return
    from rewardtune.data.images import grid

    if not bool(torch.isfinite(images).all()):
        remedy = "Lower optimizer.lr, or use" if step else "Use pipeline.dtype float32 and"
        raise NonFiniteError(
            f"the samples of step {step} hold NaN or infinite pixels: with these weights it draws no picture. "
            f"{remedy} train.precision fp32, and start anew with --fresh."
        )
    try:
        path.parent.mkdir(exist_ok=True)
        grid(images.float().cpu(), columns=math.ceil(math.sqrt(len(images)))).save(path)
    except OSError as error:
        # A picture is worth less than the run.
        print(f"warning: samples of step {step} could not be written: {error}", file=sys.stderr)


@contextmanager
def evaluating(task: Task, state: State, where: Runtime) -> Iterator[None]:
    """Inside: averaged weights, no gradient, modules in evaluation mode; afterwards all as before.

    Sharded runs enter it in all processes, which must then call the modules alike.
    """
    training = [module for root in task.trainable.values() for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with state.averaged(), state.shards.open(), torch.no_grad(), where.autocast():
            yield
    finally:
        for module in training:
            module.training = True


def _check_space(folder: Path, state: State) -> None:
    """Raise DiskError now rather than hours later: a checkpoint is written beside the one before it."""
    # The optimiser's state does not exist yet; AdamW's is twice the parameters.
    trained = sum(p.numel() * 4 for p in state.parameters.values())
    needed = 2 * trained * (4 if state.ema else 3)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"{folder} has {free / 2**30:.2f} GiB free; two checkpoints of this run need about "
            f"{needed / 2**30:.2f} GiB. Free some space or name another folder with --out."
        )


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Turn torch's messages of exhausted memory into ours."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _memory_error(error) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise _memory_error(error) from error


def _memory_error(error: BaseException) -> OutOfMemoryError:
    found = str(error).strip().splitlines()
    return OutOfMemoryError(
        f"out of memory during training ({found[0] if found else 'no details'}). Raise train.accumulation or lower "
        "train.batch_size, set train.gradient_checkpointing=true, or lower what a sample costs (rollout.height and "
        "width; gradient.memory=flat or fewer gradient.last_steps), or let a reward see fewer images at once (its own "
        "batch_size); several processes can share the modules with train.shard=true. The newest checkpoint is whole; "
        "after such a change continue with --allow-changed and the keys you changed."
    )
