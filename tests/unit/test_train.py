from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_task as tiny
import torch
from torch import Tensor, nn

from rewardtune.errors import DiskError, NonFiniteError, OutOfMemoryError, RecipeError
from rewardtune.recipe.sections import CheckpointSection, OptimizerSection, TrainSection
from rewardtune.training import checkpoint as checkpoints
from rewardtune.training.loop import train
from rewardtune.training.runtime import Runtime
from rewardtune.training.signals import Stop
from rewardtune.training.state import State, build_state
from rewardtune.training.track import read_metrics
from rewardtune.types import StepOutput

OPTIMIZER = OptimizerSection(lr=0.01, schedule="cosine", warmup_steps=2, weight_decay=0.1)


def run(folder: Path, task: Any = None, *, every: int = 100, **settings: Any) -> tuple[Any, State]:
    """Train the small task, 6 steps of 4 samples unless told otherwise."""
    folder.mkdir(exist_ok=True)
    task = task or tiny.TinyTask(dropout=0.2)
    loop = {key: settings.pop(key) for key in ("until", "stop", "sample_every") if key in settings}
    optimizer = settings.pop("optimizer", OPTIMIZER)
    section = TrainSection(**{"steps": 6, "batch_size": 4, "device": "cpu", **settings})
    every_section = CheckpointSection(every=every)
    return task, train(task, folder=folder, train=section, optimizer=optimizer, checkpoint=every_section, **loop)


def everything(state: State) -> dict[str, Tensor]:
    parts, rest = state.pack()
    tensors = {f"{part}/{name}": t.detach().clone() for part, some in parts.items() for name, t in some.items()}
    return tensors | {"rest": torch.tensor(list(json.dumps(rest).encode()))}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = read_metrics(folder / "metrics.jsonl")
    for line in found:
        del line["seconds"]
    return found


class Scalar:
    """loss = weight * mean of the indices: every number of the loop can be worked out by hand."""

    def __init__(self, scale: float = 1.0) -> None:
        self.module = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.module.weight, 1.0)
        self.trainable = {"m": self.module}
        self.scale = scale
        self.seen: list[tuple[int, list[int]]] = []

    def batch(self, step: int, indices: Any) -> Any:
        self.seen.append((step, list(indices)))
        return torch.tensor([float(i) for i in indices])

    def step(self, batch: Any) -> StepOutput:
        return StepOutput(self.scale * self.module.weight.sum() * batch.mean(), {"mean": float(batch.mean())})

    def samples(self) -> Tensor | None:
        return None


def test_indices_gradient_clipping_and_metrics_by_hand(tmp_path: Path) -> None:
    task = Scalar()
    _, state = run(tmp_path, task, steps=2, accumulation=2, max_grad_norm=2.0, optimizer=OptimizerSection(lr=0.5))
    assert task.seen == [(0, [0, 1]), (0, [2, 3]), (1, [4, 5]), (1, [6, 7])]
    first, second = lines(tmp_path)
    # Gradient of w * mean(0..3) is 1.5; of w * mean(4..7) it is 5.5, clipped to 2.
    assert first == {"step": 1, "loss": 1.5, "mean": 1.5, "grad_norm": 1.5, "lr": 0.5, "skipped": 0}
    assert second["grad_norm"] == 5.5 and second["mean"] == 5.5
    # AdamW's first step is lr * sign(gradient).
    assert second["loss"] == pytest.approx(0.5 * 5.5, rel=1e-6)
    moment = 0.9 * (0.1 * 1.5) + 0.1 * 2.0
    variance = 0.999 * (0.001 * 1.5**2) + 0.001 * 2.0**2
    step = 0.5 * (moment / (1 - 0.9**2)) / math.sqrt(variance / (1 - 0.999**2))
    assert task.module.weight.item() == pytest.approx(0.5 - step, rel=1e-5)
    assert state.step == 2


def test_schedule_and_average_by_hand(tmp_path: Path) -> None:
    task = Scalar()
    optimizer = OptimizerSection(lr=0.1, schedule="linear", warmup_steps=2)
    weights = [1.0]
    real = Scalar.batch

    def batch(step: int, indices: Any) -> Any:
        if step:
            weights.append(task.module.weight.item())
        return real(task, step, [1])

    task.batch = batch  # type: ignore[method-assign]
    _, state = run(tmp_path, task, steps=6, optimizer=optimizer, ema_decay=0.9)
    weights.append(task.module.weight.item())
    assert [line["lr"] for line in lines(tmp_path)] == pytest.approx([0.0, 0.05, 0.1, 0.075, 0.05, 0.025])
    average = 1.0
    for update, weight in enumerate(weights[1:], start=1):
        decay = min(0.9, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * weight
    assert state.ema is not None
    assert float(state.ema.average["m.weight"]) == pytest.approx(average, rel=1e-6)
    assert average != pytest.approx(weights[-1], rel=1e-3)
    with state.averaged():
        assert task.module.weight.item() == pytest.approx(average, rel=1e-6)
    assert task.module.weight.item() == weights[-1]


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    (one, _), (four, _) = run(tmp_path / "a", tiny.TinyTask()), run(tmp_path / "b", tiny.TinyTask(), accumulation=4)
    for a, b in zip(one.net.parameters(), four.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert [line["loss"] for line in lines(tmp_path / "a")] == pytest.approx(
        [line["loss"] for line in lines(tmp_path / "b")], rel=1e-5
    )


def test_it_learns(tmp_path: Path) -> None:
    run(tmp_path, tiny.TinyTask(), steps=150, batch_size=32, optimizer=OptimizerSection(lr=0.02))
    losses = [line["loss"] for line in lines(tmp_path)]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


@pytest.mark.parametrize("settings", [{}, {"accumulation": 2, "ema_decay": 0.9}, {"precision": "bf16"}])
def test_resuming_at_every_step_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    _, whole = run(tmp_path / "whole", **settings)
    for cut in range(1, 6):
        folder = tmp_path / f"cut-{cut}"
        run(folder, until=cut, **settings)
        _, resumed = run(folder, **settings)
        assert same(everything(whole), everything(resumed)), cut
        assert lines(folder) == lines(tmp_path / "whole")
    folder = tmp_path / "every step"
    for cut in range(1, 7):
        _, resumed = run(folder, until=cut, **settings)
    assert same(everything(whole), everything(resumed))
    assert lines(folder) == lines(tmp_path / "whole")


def test_lines_beyond_the_checkpoint_are_dropped_and_torn_ones_too(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    folder = tmp_path / "cut"
    run(folder, until=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0, "seconds": 1}\n{"step": 5, "lo')
    run(folder)
    assert lines(folder) == lines(tmp_path / "whole")


def test_trained_parameters_are_fp32_and_others_stay(tmp_path: Path) -> None:
    task = tiny.TinyTask()
    task.net.bfloat16()
    task.fixed.bfloat16()
    _, state = run(tmp_path, task, precision="bf16", steps=1)
    assert {p.dtype for p in task.net.parameters()} == {torch.float32}
    assert {p.dtype for p in task.fixed.parameters()} == {torch.bfloat16}
    assert sorted(state.parameters) == ["net.0.bias", "net.0.weight", "net.3.bias", "net.3.weight"]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("how", ["loss", "inf", "grad", "reward"])
def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, how: str, accumulation: int) -> None:
    # Sample 14 belongs to the fourth step, in its last micro-batch.
    _, before = run(tmp_path / "before", tiny.TinyTask(), accumulation=accumulation, until=3)
    state_before = everything(before)
    task = tiny.TinyTask(broken={14: how})
    _, after = run(tmp_path / "broken", task, accumulation=accumulation, until=4)
    state_after = everything(after)
    tensors = [name for name in state_before if name != "rest"]
    assert all(torch.equal(state_before[name], state_after[name]) for name in tensors)
    assert after.step == 4 and after.skipped == 1 and after.skipped_in_a_row == 1
    _, end = run(tmp_path / "broken", task, accumulation=accumulation)
    assert end.skipped == 1 and end.skipped_in_a_row == 0
    assert all(p.isfinite().all() for p in end.parameters.values())
    found = lines(tmp_path / "broken")
    assert [line["skipped"] for line in found] == [0, 0, 0, 1, 1, 1]
    assert found[3]["grad_norm"] is None
    # The learning rate follows the step, skipped or not.
    assert [line["lr"] for line in found[:3]] == [line["lr"] for line in lines(tmp_path / "before")]
    # And it is the same run when it is interrupted around the skipped step.
    _, whole = run(tmp_path / "whole", tiny.TinyTask(broken={14: how}), accumulation=accumulation)
    assert same(everything(whole), everything(end))


def test_too_many_in_a_row_end_the_run_with_a_clean_checkpoint(tmp_path: Path) -> None:
    broken = dict.fromkeys(range(8, 100), "reward")
    with pytest.raises(NonFiniteError, match="reward `tiny` returned nan") as caught:
        run(tmp_path, tiny.TinyTask(broken=broken), steps=20, max_consecutive_skips=3)
    assert caught.value.exit_code == 4
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 0, 1, 2, 3, 4]
    saved = checkpoints.newest(tmp_path / "checkpoints")
    assert saved is not None and all(t.isfinite().all() for t in saved.tensors("parameters").values())
    _, good = run(tmp_path / "good", tiny.TinyTask(), steps=20, until=2)
    for name, parameter in good.parameters.items():
        assert torch.equal(parameter, saved.tensors("parameters")[name])
    # Running it again stops at once, and goes on once the cause is gone.
    with pytest.raises(NonFiniteError):
        run(tmp_path, tiny.TinyTask(broken=broken), steps=20, max_consecutive_skips=3)
    _, end = run(tmp_path, tiny.TinyTask(), steps=20, max_consecutive_skips=3)
    assert end.step == 20


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path: Path, number: int, code: int) -> None:
    _, whole = run(tmp_path / "whole", tiny.TinyTask())
    task, stop = tiny.TinyTask(), Stop()
    real = task.step

    def step(batch: Any) -> StepOutput:
        if task.seen[-1][0] == 2 and stop.signal == 0:
            os.kill(os.getpid(), number)
        return real(batch)  # type: ignore[no-any-return]

    task.step = step
    with stop.listening(), pytest.raises(SystemExit) as left:
        run(tmp_path / "cut", task, stop=stop)
    assert left.value.code == code
    saved = checkpoints.newest(tmp_path / "cut" / "checkpoints")
    assert saved is not None and saved.step == 3
    _, resumed = run(tmp_path / "cut", tiny.TinyTask())
    assert same(everything(whole), everything(resumed))


def test_a_signal_ends_long_sampling_at_once(tmp_path: Path) -> None:
    task, stop = tiny.TinyTask(), Stop()

    def samples() -> Tensor | None:
        if task.seen:
            with torch.no_grad():
                assert not torch.equal(task.net[0].weight, state_weights[-1])
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal did not end this")
        return None

    state_weights = [task.net[0].weight.detach().clone()]
    task.samples = samples
    with stop.listening(), pytest.raises(SystemExit) as left:
        run(tmp_path / "cut", task, stop=stop, sample_every=2, ema_decay=0.5)
    assert left.value.code == 143
    _, resumed = run(tmp_path / "cut", tiny.TinyTask(), ema_decay=0.5)
    _, whole = run(tmp_path / "whole", tiny.TinyTask(), ema_decay=0.5)
    assert same(everything(whole), everything(resumed))


def test_samples_show_the_average_and_do_not_disturb_training(tmp_path: Path) -> None:
    task, shown = tiny.TinyTask(dropout=0.2), []
    task.net.train()

    def samples() -> Tensor:
        assert not task.net[2].training and not torch.is_grad_enabled()
        shown.append(task.net[0].weight.detach().clone())
        torch.manual_seed(99)
        return torch.full((5, 3, 8, 8), 0.5)

    task.samples = samples
    _, state = run(tmp_path / "with", task, ema_decay=0.5, sample_every=4)
    assert task.net[2].training
    assert sorted(path.name for path in (tmp_path / "with" / "samples").iterdir()) == [
        "step-000000.png", "step-000004.png", "step-000006.png",
    ]  # fmt: skip
    assert state.ema is not None and torch.equal(shown[-1], state.ema.average["net.0.weight"])
    _, without = run(tmp_path / "without", ema_decay=0.5)
    assert same(everything(without), everything(state))


def test_a_full_disk_is_survived_for_a_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, failing = tiny.TinyTask(width=4000), []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = task.batch

    def batch(step: int, indices: Any) -> Any:
        full = step in failing
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if full else soft, hard))
        return real(step, indices)

    task.batch = batch
    try:
        failing[:] = [2, 3]
        _, state = run(tmp_path / "a", task, every=1)
        assert state.step == 6
        said = capsys.readouterr().err
        assert said.count("could not be written") == 2 and "Trying again in 1 steps" in said
        assert sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir()) == ["step-000005", "step-000006"]
        failing[:] = [2, 3, 4, 5]
        with pytest.raises(DiskError) as caught:
            run(tmp_path / "b", task, every=1)
        assert caught.value.exit_code == 6
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saved = checkpoints.newest(tmp_path / "b" / "checkpoints")
    assert saved is not None and saved.step == 2
    assert not list((tmp_path / "b" / "checkpoints").glob(".tmp*"))


def test_metrics_wait_for_a_disk_with_space(tmp_path: Path) -> None:
    from rewardtune.training.track import MetricsFile

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics = MetricsFile(tmp_path / "metrics.jsonl", after=0)
    metrics.add({"step": 1, "text": "x" * 30_000})
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        metrics.add({"step": 2, "text": "y" * 30_000})
        with pytest.raises(OSError):
            metrics.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics.add({"step": 3, "value": math.nan})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_text().endswith('{"step": 3, "value": null}\n')


@pytest.mark.parametrize("where", ["batch", "step", "samples"])
def test_out_of_memory_names_what_to_change(tmp_path: Path, where: str) -> None:
    task = tiny.TinyTask()
    real = getattr(task, where)

    def greedy(*args: Any) -> Any:
        if where == "samples" or (task.seen and task.seen[-1][0] == 3):
            torch.empty(1 << 55, dtype=torch.uint8)
        return real(*args)

    setattr(task, where, greedy)
    with pytest.raises(OutOfMemoryError, match=r"train\.batch_size") as caught:
        run(tmp_path, task, every=2)
    assert caught.value.exit_code == 5
    saved = checkpoints.newest(tmp_path / "checkpoints")
    # The task refuses in the fourth step, or when it next collects a batch; samples are drawn before the first.
    assert (saved.step if saved else None) == {"step": 2, "batch": 4, "samples": None}[where]


def test_mistakes_are_named(tmp_path: Path) -> None:
    task = tiny.TinyTask()
    task.net.requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing to train"):
        run(tmp_path, task)
    run(tmp_path, until=4)
    with pytest.raises(RecipeError, match="already done 4 steps"):
        run(tmp_path, steps=2)
    with pytest.raises(RecipeError, match=r"net\.0\.bias.*here \(8,\), there \(16,\)") as caught:
        run(tmp_path, tiny.TinyTask(width=8))
    assert "--fresh" in str(caught.value)


def test_a_parameter_shared_by_two_modules_is_trained_once() -> None:
    task = Scalar()
    task.trainable = {"m": task.module, "again": task.module}
    where = Runtime(torch.device("cpu"))
    state = build_state(task, train=TrainSection(steps=1), optimizer=OptimizerSection(), where=where)  # type: ignore[arg-type]
    assert list(state.parameters) == ["m.weight"]


def test_a_damaged_checkpoint_costs_no_exactness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, whole = run(tmp_path / "whole", every=2)
    folder = tmp_path / "cut"
    run(folder, every=2, until=5)
    (folder / "checkpoints" / "step-000005" / "optimizer.safetensors").write_bytes(b"\0" * 100)
    _, resumed = run(folder, every=2)
    assert "step-000005 is damaged" in capsys.readouterr().err
    assert same(everything(whole), everything(resumed))
    assert lines(folder) == lines(tmp_path / "whole")


def test_progress_is_a_plain_line_off_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    run(tmp_path)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("step 6/6  reward/fit -") and "s/step" in last and "ETA 0:00:00" in last and "GiB" in last
