"""The guard against over-optimisation: when it is enough, which step is taken, and that a resumed run decides alike."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from rewardtune import registry
from rewardtune.errors import RecipeError
from rewardtune.guard.guard import read_looks
from rewardtune.guard.verdict import Rule, Seen, verdict
from rewardtune.plugins import RewardCard
from rewardtune.recipe.file import load_recipe
from rewardtune.training import run
from rewardtune.training.run_folder import record_rewards
from rewardtune.training.track import read_metrics

RULE = Rule(seeds=1, patience=2, min_diversity=0.7, max_drift=None)
START = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def seen(step: int, shift: float, *, diversity: float = 1.0, drift: float = 0.0, noise: float = 0.01) -> Seen:
    wobble = np.random.default_rng(step).normal(0, noise, len(START))
    return Seen(step, {"a": list(np.asarray(START) + shift + wobble)}, diversity, drift)


def test_scores_are_gains_in_the_starts_standard_deviations():
    """Rewards of other scales count alike."""
    big = Seen(5, {"a": [v + 1 for v in START], "b": [1000 * v - 500 for v in START]}, 1.0, 0.0)
    start = Seen(0, {"a": START, "b": [1000 * v for v in START]}, 1.0, 0.0)
    spread = float(np.std(START))
    assert verdict([start, big], RULE).scores == pytest.approx((0.0, (1 / spread - 0.5 / spread) / 2))


def test_it_is_enough_after_so_many_looks_that_are_surely_worse_than_the_best():
    looks = [seen(0, 0.0), seen(10, 1.0), seen(20, 0.5)]
    once = verdict(looks, RULE)
    assert once.best == 10 and not once.reasons
    twice = verdict([*looks, seen(30, 0.4)], RULE)
    assert twice.best == 10 and "step 10" in twice.reasons[0]
    # a look in between that is not surely worse begins anew
    assert not verdict([*looks, seen(30, 1.0, noise=1.0), seen(40, 0.4)], RULE).reasons
    # noise alone ends nothing
    assert not verdict([seen(0, 0.0), *(seen(10 * k, 0.0, noise=2.0) for k in range(1, 4))], RULE).reasons


def test_lost_diversity_and_drift_are_enough_at_once_and_cannot_be_best():
    flat = verdict([seen(0, 0.0), seen(10, 3.0, diversity=0.6)], RULE)
    assert flat.best == 0 and "60%" in flat.reasons[0]
    rule = Rule(1, 2, None, 0.5)
    far = verdict([seen(0, 0.0), seen(10, 1.0, drift=0.4), seen(20, 3.0, drift=0.6)], rule)
    assert far.best == 10 and "drift" in far.reasons[0]


def test_images_of_one_prompt_count_as_one():
    start = Seen(0, {"a": [0.0, 2.0, 1.0, 3.0]}, 1.0, 0.0)
    # every prompt is as it was, though half of the images fell
    later = [Seen(s, {"a": [2.0, 0.0, 3.0, 1.0]}, 1.0, 0.0) for s in (1, 2, 3)]
    assert not verdict([start, *later], Rule(2, 1, None, None)).reasons


@pytest.fixture(scope="module", autouse=True)
def _rewards():
    registry.load_plugin(str(Path(__file__).with_name("redness.py")))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    tiny.z_image().save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("a dog\nred cat\ntwo birds\n")
    return folder


def recipe(root: Path, folder: Path, *, steps: int = 8, track=None, **guard):
    """DRaFT towards red at a rate that overshoots; the held-out reward wants a little more red only."""
    prompts = str(root / "prompts.txt")
    document = {
        "task": "direct_reward", "pipeline": {"model": str(root / "pipeline")}, "lora": {"rank": 4},
        "data": {"prompts": prompts}, "rollout": {"steps": 2, "guidance": "off"},
        "gradient": {"method": "draft", "last_steps": 1}, "rewards": [{"name": "redness"}],
        "optimizer": {"lr": 0.05}, "train": {"steps": steps, "batch_size": 2, "device": "cpu"},
        "checkpoint": {"every": 3, "keep": 2}, "samples": {"steps": 2}, "track": track or {},
        "guard": {"prompts": prompts, "seeds": 2, "rewards": [{"name": "evenness"}], "every": 2, "patience": 1,
                  "min_diversity": None, "steps": 2, "guidance_scale": 0.0} | guard,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return load_recipe(str(folder / "recipe.yaml"))


def exported(folder: Path):
    return load_file(folder / "export/pytorch_lora_weights.safetensors")


def test_a_run_that_goes_wrong_is_ended_and_rolled_back(pipeline, tmp_path, capsys):
    folder = run.train_recipe(recipe(pipeline, tmp_path), out=tmp_path / "run")
    finished = json.loads((folder / "finished.json").read_text())
    found = finished["guard"]
    assert found["reasons"] and 0 < found["best_step"] < found["last_step"] < 8
    assert found["exported_step"] == found["best_step"] == finished["step"] < found["last_step"]
    kept = json.loads((folder / "rewards.json").read_text())
    assert [(reward["name"], reward["role"]) for reward in kept] == [("redness", "trained"), ("evenness", "guard")]
    looks = read_looks(folder / "guard")
    assert [look.step for look in looks] == list(range(0, found["last_step"] + 1, 2))
    assert f"step {found['best_step']} is taken" in capsys.readouterr().err
    lines = {line["step"]: line for line in read_metrics(folder / "metrics.jsonl")}
    assert "guard/score" in lines[2] and "guard/score" not in lines[1]
    assert lines[2]["guard/evenness"] == pytest.approx(float(np.mean(looks[1].values["evenness"])), abs=1e-5)
    # what is exported is that step: a run that ends there has the same adapters
    if found["best_step"]:
        short = run.train_recipe(
            recipe(pipeline, tmp_path / "b", steps=found["best_step"], action="warn"), out=tmp_path / "short"
        )
        wanted = exported(short)
    else:
        wanted = {k: torch.zeros_like(v) for k, v in exported(folder).items() if "lora_B" in k}
    assert all(torch.equal(exported(folder)[k], v) for k, v in wanted.items())
    # the newest checkpoint is the last step's, and exporting again takes the guard's step too
    again = run.export_run(folder, out=tmp_path / "again")
    assert all(torch.equal(load_file(again / "pytorch_lora_weights.safetensors")[k], v) for k, v in wanted.items())


def test_warn_trains_on_and_stop_keeps_the_last_step(pipeline, tmp_path, capsys):
    warned = run.train_recipe(recipe(pipeline, tmp_path / "w", action="warn"), out=tmp_path / "warned")
    assert json.loads((warned / "finished.json").read_text())["step"] == 8
    assert "Training goes on" in capsys.readouterr().err
    stopped = run.train_recipe(recipe(pipeline, tmp_path / "s", action="stop"), out=tmp_path / "stopped")
    found = json.loads((stopped / "finished.json").read_text())
    assert found["step"] == found["guard"]["exported_step"] == found["guard"]["last_step"] < 8
    assert not list((stopped / "guard").glob("best-*"))


def test_trackers_get_every_look_and_the_choice(pipeline, tmp_path):
    """From the files that wandb and TensorBoard wrote themselves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = {"wandb": "offline", "tensorboard": True}
    folder = run.train_recipe(recipe(pipeline, tmp_path, track=asked), out=tmp_path / "run")
    found = json.loads((folder / "finished.json").read_text())["guard"]
    assert found["exported_step"] < found["last_step"]  # rolled back, so that what is said last is of an earlier step
    looks = read_looks(folder / "guard")
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    history = {step: values for step, values in wandb_history(file) if "guard/score" in values}
    assert list(history) == [look.step for look in looks]
    for look in looks:
        assert history[look.step]["guard/evenness"] == pytest.approx(float(np.mean(look.values["evenness"])), abs=1e-5)
    last = history[found["last_step"]]
    wanted = {f"guard/{name}": value for name, value in found.items() if name != "reasons"}
    assert wanted["guard/exported_step"] == found["best_step"] and {name: last[name] for name in wanted} == wanted
    assert last["guard/reasons"] == found["reasons"][0]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("guard/score")] == [look.step for look in looks]
    assert [(e.step, e.value) for e in events.Scalars("guard/exported_step")] == [
        (found["last_step"], found["exported_step"])
    ]
    assert found["reasons"][0].encode() in events.Tensors("guard/reasons/text_summary")[0].tensor_proto.string_val[0]


def wandb_history(file: Path):
    """(step, values) of each row in a .wandb file: LevelDB's log format, the records wandb's own messages."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<4xHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            message = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if message.HasField("history"):
                row = message.history
                yield (
                    row.step.num,
                    {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row.item},
                )


@pytest.mark.parametrize("until", [1, 2, 3, 4])
def test_a_run_stopped_anywhere_decides_and_exports_alike(pipeline, tmp_path, until):
    from rewardtune.build import build_guard, build_task
    from rewardtune.training import runtime
    from rewardtune.training.loop import train

    whole = run.train_recipe(recipe(pipeline, tmp_path / "w"), out=tmp_path / "whole")
    loaded = recipe(pipeline, tmp_path / "c")
    cut = tmp_path / "cut"

    def part(recipe, until):
        cut.mkdir(exist_ok=True)
        task = build_task(recipe, device="cpu")
        where = runtime.start(device="cpu")
        train(
            task, folder=cut, train=recipe.train, optimizer=recipe.optimizer, checkpoint=recipe.checkpoint,
            where=where, until=until, guard=build_guard(recipe, task, cut),
        )  # fmt: skip

    for stop in (until, 8):
        part(loaded.recipe, stop)
    assert (cut / "guard/looks.jsonl").read_text() == (whole / "guard/looks.jsonl").read_text()
    best = [file.name for file in (whole / "guard").glob("best-*")]
    assert best == [file.name for file in (cut / "guard").glob("best-*")]
    assert all((cut / "guard" / name).read_bytes() == (whole / "guard" / name).read_bytes() for name in best)


def test_a_guards_weights_are_those_of_the_start_and_older_records_are_taken(tmp_path):
    def cards(commit: str) -> list[RewardCard]:
        return [RewardCard(name, "", differentiable=True, needs_prompt=False, range=None, models={"team/judge": commit})
                for name in ("one", "other")]  # fmt: skip

    old, new = cards("a" * 40), cards("b" * 40)
    record_rewards(tmp_path, old[:1], old[1:], allow=())
    record_rewards(tmp_path, old[:1], old[1:], allow=())
    with pytest.raises(RecipeError, match=r"other weights of its rewards.*--allow-changed rewards"):
        record_rewards(tmp_path, old[:1], new[1:], allow=())
    file = tmp_path / "rewards.json"
    file.write_text(json.dumps([{"name": "one", "models": {"team/judge": "a" * 40}}]))
    record_rewards(tmp_path, old[:1], new[1:], allow=())
    assert [reward["role"] for reward in json.loads(file.read_text())] == ["trained", "guard"]
    file.write_text(json.dumps([{"name": "one", "models": {"team/judge": "a" * 40}}]))
    with pytest.raises(RecipeError, match="other weights"):
        record_rewards(tmp_path, new[:1], new[1:], allow=())


def test_a_guard_that_is_trained_on_is_refused(pipeline, tmp_path):
    with pytest.raises(RecipeError, match=r"guard\.rewards names redness, which is trained on"):
        recipe(pipeline, tmp_path, rewards=[{"name": "redness"}])
    with pytest.raises(RecipeError, match="evenness twice"):
        recipe(pipeline, tmp_path, rewards=[{"name": "evenness"}, {"name": "evenness"}])
