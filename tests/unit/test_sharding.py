"""FSDP2 in two processes on the CPU (gloo): really split, the numbers of the unsharded run, checkpoints for either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import tiny_scorer
import tiny_task
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from rewardtune.data.images import to_pil
from rewardtune.errors import RecipeError
from rewardtune.recipe.sections import DirectRewardRecipe, TrainSection
from rewardtune.training import shard
from rewardtune.training.runtime import Runtime
from rewardtune.training.track import read_metrics

# Seconds on an idle machine; other work on it must not fail this.
pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).parent


def cases(root: Path) -> dict[str, Any]:
    """What is trained: 3 optimiser steps of 4 samples, two for each process."""
    tiny.z_image().save_pretrained(root / "pipeline")
    tiny_scorer.write_scorer(root / "scorer", layers=["linear_attention", "full_attention"])
    tiny_scorer.write_reasoner(root / "reasoner", layers=["linear_attention", "full_attention"])
    tiny_scorer.write_comparer(root / "comparer", layers=["linear_attention", "full_attention"])
    tiny_scorer.write_reasoner(root / "teacher", layers=["full_attention"])
    sharp = json.loads((root / "reasoner/rubric.json").read_text()) | {"temperature": 0.05}
    (root / "sharp.json").write_text(json.dumps(sharp))
    captions, records = [], []
    for index, picture in enumerate(to_pil(torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)))):
        picture.save(root / f"{index}.png")
        captions.append({"image": f"{index}.png", "caption": ["a dog", "red cat", "two birds"][index % 3]})
        scores = dict.fromkeys(["alignment", "realism", "aesthetics", "plausibility"], 1.0 + index / 2)
        said = {"scores": scores} | ({"critique": "a dog is missing"} if index % 2 else {})
        records.append({"group": str(index // 2), "prompt": "a dog", "image": f"{index}.png", **said})
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    (root / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "prompts.txt").write_text("a dog\nred cat\ntwo birds\n")

    def scorer(*, lora: bool, **train: Any) -> dict[str, Any]:
        return {
            "task": "reward_sft", "scorer": {"model": str(root / "scorer"), **({"lora": {"rank": 2}} if lora else {})},
            "train": {"steps": 3, "batch_size": 4, "device": "cpu", **train},
            "optimizer": {"lr": 1e-3, "schedule": "cosine", "weight_decay": 0.1},
            "data": {"records": str(root / "records.jsonl"), "held_out": str(root / "records.jsonl")},
        }  # fmt: skip

    whole, lora = scorer(lora=False), scorer(lora=True)
    diffusion = {**whole, "pipeline": {"model": str(root / "pipeline")}}
    diffusion = {name: part for name, part in diffusion.items() if name not in ("scorer", "data")}
    distilled = {**whole, "data": {"images": str(root / "records.jsonl")}}
    broken = {**whole["train"], "accumulation": 2}
    # Of 4 samples the first two are rank 0's; with two micro-batches the last of each process is its second.
    return {
        "tiny": {"tiny": {}, "train": {"steps": 3, "batch_size": 4, "ema_decay": 0.9}, "stops": True, "changes": True},
        "tiny-skips": {
            "tiny": {"broken": {"7": "reward", "9": "grad", "12": "inf"}},
            "train": {"steps": 5, "batch_size": 4, "accumulation": 2},
        },
        "scorer-full": {
            "recipe": scorer(lora=False, accumulation=2, ema_decay=0.9, gradient_checkpointing=True),
        },
        "scorer-lora": {"recipe": lora, "stops": True, "changes": True},
        "scorer-lora-bf16": {"recipe": scorer(lora=True, precision="bf16", accumulation=2)},
        "scorer-full-bf16": {"recipe": scorer(lora=False, precision="bf16")},
        "pieces-full": {"recipe": whole, "pieces": {"half": False, "broken": {}}},
        "pieces-lora-half": {"recipe": lora, "pieces": {"half": True, "broken": {}}},
        "pieces-skips": {
            "recipe": {**whole, "train": broken}, "pieces": {"half": False, "broken": {"3": "reward", "8": "loss"}},
        },
        "draft": {
            "recipe": {
                **diffusion, "task": "direct_reward", "lora": {"rank": 2},
                "data": {"prompts": str(root / "prompts.txt")},
                "rollout": {"steps": 2, "guidance_scale": 2.0}, "rewards": [{"name": "redness"}],
                "gradient": {"method": "draft", "last_steps": "all", "memory": "flat"},
                "samples": {"prompts": ["a dog"], "every": 2, "steps": 2},
            },
        },
        # the denoiser is called with and without graph, and with its adapters off, in turn
        "drtune": {
            "recipe": {
                **diffusion, "task": "direct_reward", "lora": {"rank": 2},
                "data": {"prompts": str(root / "prompts.txt")}, "rollout": {"steps": 4, "guidance_scale": 2.0},
                "rewards": [{"name": "redness"}, {"name": "redness", "weight": 0.5}], "balance": "gradient",
                "gradient": {"method": "drtune"}, "regularise": {"velocity": 0.5},
            },
        },
        "sft-full": {
            "recipe": {
                **diffusion, "task": "sft", "full": {"modules": ["transformer", "text_encoder"]},
                "data": {"manifest": str(root / "manifest.jsonl"), "cache_latents": False},
                "train": {**whole["train"], "gradient_checkpointing": True},
            },
        },
        # Processes write traces of different lengths, and every second step has another reference. Advantages divide
        # by the spread of a group's rewards, so rounding counts for more the more alike these are: with both rewards
        # of equal weight they cancel to the last bit wherever a step towards the rating is one away from the gap. A
        # sharp scorer and unequal weights keep the groups apart.
        "gdso": {
            "recipe": {
                **whole, "task": "reward_gdso",
                "scorer": {"model": str(root / "reasoner"), "rubric": str(root / "sharp.json")},
                "optimizer": {"lr": 1e-4, "schedule": "constant", "warmup_steps": 0},
                "objective": {"kl": 0.5, "reference_every": 1, "updates_per_rollout": 2, "clip": 0.2,
                              "group_size": 4, "pairwise_reward": 0.5},
            },
            "stops": True, "changes": True,
        },
        # OPD's student writes, and its teacher reads, while they are split
        "risd": {"recipe": {**distilled, "task": "reward_risd", "teacher": {"model": str(root / "teacher")}}},
        "opd": {
            "recipe": {
                **distilled, "task": "reward_opd", "scorer": {"model": str(root / "reasoner")},
                "teacher": {"model": str(root / "teacher")}, "objective": {"samples": 2},
            },
        },
        "dance": {"recipe": {**whole, "task": "reward_dance"}},
        "dance-pairs": {
            "recipe": {
                **whole, "task": "reward_dance", "scorer": {"model": str(root / "comparer")},
                "objective": {"form": "pairwise"},
            },
        },
        "run": {"whole run": True, "recipe": scorer(lora=True, ema_decay=0.9)},
    }  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(folder of the runs, what sharded_tasks.py found in each process)."""
    root = tmp_path_factory.mktemp("sharding")
    given = {"CASES": cases(root), "PLUGIN": str(HERE / "redness.py"), "ROOT": str(root / "runs")}
    running = [
        processes.start(HERE / "sharded_tasks.py", {**given, "RESULT": str(root / f"{rank}.json"), "ENV": env})
        for rank, env in enumerate(processes.group(2))
    ]
    processes.join(running, lambda: [path.read_text() for path in root.glob("[01].json")])
    return root / "runs", [json.loads((root / f"{rank}.json").read_text()) for rank in (0, 1)]


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in read_metrics(folder / "metrics.jsonl")]


def last(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    parts = {file.stem: load_file(file) for file in newest.glob("*.safetensors")}
    return {f"{part}/{name}": tensor for part, some in parts.items() for name, tensor in some.items()}


def assert_alike(one: Path, other: Path) -> None:
    """Losses and all that is logged agree to 1e-6, every tensor of the newest checkpoints to 1e-7."""
    # Of traces: sums over tokens and several of the model's parts, measured up to 2.5e-6 and, in weights, 6e-7.
    logged, held = (1e-5, 1e-5) if one.parent.name in TRACES else (1e-6, 1e-7)
    a, b = numbers(one), numbers(other)
    assert len(a) == len(b) > 0
    for mine, theirs in zip(a, b, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            # Each process adds up the squares of its parts: measured 4.1e-6 of the norm.
            bound = 1e-5 if name == "grad_norm" else logged
            assert value == theirs[name] or value == pytest.approx(theirs[name], rel=bound, abs=bound), name
    mine_all, theirs_all = last(one), last(other)
    assert mine_all.keys() == theirs_all.keys()
    for name, tensor in mine_all.items():
        # Measured: 9e-6, of rewards that agree to 1e-7 in groups whose spread may be a hundredth. No loss shows it.
        bound = 10 * held if name.endswith(".advantages") else held
        assert torch.allclose(tensor, theirs_all[name], rtol=bound, atol=bound), name


CASES = ["tiny", "scorer-full", "scorer-lora", "pieces-full", "pieces-lora-half", "draft", "drtune", "sft-full", "gdso",
         "risd", "opd", "dance", "dance-pairs"]  # fmt: skip
TRACES = ["gdso", "opd", "dance", "dance-pairs"]
HALF = ["scorer-lora-bf16", "scorer-full-bf16"]
SKIPS = ["tiny-skips", "pieces-skips"]


@pytest.mark.parametrize("case", [*CASES, *HALF, *SKIPS])
def test_parameters_moments_and_averages_are_split_in_half(ran: Any, case: str) -> None:
    found = [rank[case]["split"] for rank in ran[1]]
    for name in ("all", "trained", "frozen", "optimizer", "ema"):
        total = found[0][name]["total"]
        assert all(rank[name]["sharded"] and rank[name]["total"] == total for rank in found)
        # Tiny tensors of odd length make the halves uneven.
        assert found[0][name]["here"] + found[1][name]["here"] == total
        assert not total or 0.5 <= found[0][name]["here"] / total < 0.56
    assert bool(found[0]["frozen"]["total"]) == (case == "opd")
    # The tiny task has two modules without blocks; a scorer two layers, two of vision, and what is left of it.
    kind = case.partition("-")[0]
    assert found[0]["groups"] == {"tiny": 2, "sft": 8}.get(kind, 5)


@pytest.mark.parametrize("case", CASES)
def test_sharded_training_gives_the_numbers_of_the_unsharded_run(ran: Any, case: str) -> None:
    folder = ran[0] / case
    assert_alike(folder / "sharded", folder / "plain")
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in numbers(folder / "sharded"))


@pytest.mark.parametrize("case", HALF)
def test_bf16_agrees_to_its_rounding(ran: Any, case: str) -> None:
    a, b = (numbers(ran[0] / case / how) for how in ("sharded", "plain"))
    for mine, theirs in zip(a, b, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
    one, other = last(ran[0] / case / "sharded"), last(ran[0] / case / "plain")
    assert one.keys() == other.keys() and all(t.dtype == torch.float32 for t in one.values())


@pytest.mark.parametrize("case", SKIPS)
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(ran: Any, case: str) -> None:
    folder = ran[0] / case
    expected = {"tiny-skips": [0, 1, 2, 3, 3], "pieces-skips": [1, 1, 2]}[case]
    assert [line["skipped"] for line in numbers(folder / "sharded")] == expected
    # Gradients of a micro-batch before the broken one must not reach the next step.
    assert_alike(folder / "sharded", folder / "plain")


@pytest.mark.parametrize("case", ["tiny", "scorer-lora", "gdso"])
def test_a_stop_after_every_step_changes_nothing(ran: Any, case: str) -> None:
    folder = ran[0] / case
    whole, cut = last(folder / "sharded"), last(folder / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert numbers(folder / "sharded") == numbers(folder / "cut")


@pytest.mark.parametrize("case", ["tiny", "scorer-lora", "gdso"])
def test_a_checkpoint_goes_on_sharded_or_not(ran: Any, case: str) -> None:
    folder = ran[0] / case
    for other in ("sharded-then-plain", "plain-then-sharded"):
        assert_alike(folder / other, folder / "plain")


def test_a_run_evaluates_exports_and_draws_samples(ran: Any) -> None:
    root, found = ran
    assert [rank["run"]["codes"] for rank in found] == [[0, 0], [0, 0]]
    one, other = root / "run" / "sharded", root / "run" / "plain"
    finished = [json.loads((folder / "finished.json").read_text()) for folder in (one, other)]
    # Scores agree to 1e-5; correlations of a few nearly equal scores magnify that.
    assert finished[0]["evaluation"] == pytest.approx(finished[1]["evaluation"], abs=1e-3) and finished[0]["evaluation"]
    mine, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5)
    drawn = [(root / "draft" / how / "samples" / "step-000003.png").read_bytes() for how in ("sharded", "plain")]
    assert drawn[0] == drawn[1]


def test_one_process_has_nothing_to_split(capsys: pytest.CaptureFixture[str]) -> None:
    task = tiny_task.TinyTask()
    assert not shard.split(task.trainable, where=Runtime(torch.device("cpu")))
    assert type(task.net[0].weight) is nn.Parameter
    assert "there is one process" in capsys.readouterr().err


def test_parameters_that_were_left_whole_are_refused() -> None:
    net = nn.Linear(3, 3)
    with pytest.raises(RecipeError, match="2 of 2 parameters of net are not sharded, the first is 'weight'"):
        shard._check("net", net, before=2, world=2)


def test_blocks_are_what_the_model_names_or_the_children_of_its_lists() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # a detail of the block, as diffusers' attention has it
            self.out = nn.ModuleList([nn.Linear(2, 2), nn.Dropout()])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Module()
            self.stack.layers = nn.ModuleList([Block(), Block(), nn.Dropout()])
            self.head = nn.Linear(2, 2)

    net = Net()
    first, second, _ = net.stack.layers
    assert shard.blocks(net) == [second, first]
    net.middle = Block()
    net._no_split_modules = ["Block"]
    assert shard.blocks(net) == [net.middle, second, first]


def test_what_cannot_be_sharded_is_refused_in_the_recipe() -> None:
    with pytest.raises(ValidationError, match=r"train\.compile"):
        TrainSection(steps=1, shard=True, compile=True)
    content = tiny_task.tiny_recipe(train={"shard": True}).recipe.model_dump()
    for name in ("adamw8bit", "muon", "prodigy"):
        with pytest.raises(ValidationError, match=r"optimizer\.name"):
            DirectRewardRecipe.model_validate({**content, "optimizer": {"name": name}})
