"""Every built-in task, on tiny models of the real classes: stopping after every step changes nothing, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import tiny_scorer
import torch
from safetensors.torch import load_file

from rewardtune.data.images import to_pil

# Seconds on an idle machine; other work on it must not fail this.
pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).parent


def recipes(root: Path) -> dict[str, Any]:
    """A recipe for each task and method; 3 steps of 4 samples."""
    tiny.z_image().save_pretrained(root / "pipeline")
    tiny_scorer.write_scorer(root / "scorer", layers=["linear_attention", "full_attention"])
    tiny_scorer.write_reasoner(root / "reasoner", layers=["full_attention"])
    tiny_scorer.write_comparer(root / "comparer", layers=["full_attention"])
    rows, records = [], []
    for index, picture in enumerate(to_pil(torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)))):
        picture.save(root / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": ["a dog", "red cat", "two birds"][index % 3]})
        scores = dict.fromkeys(["alignment", "realism", "aesthetics", "plausibility"], 1.0 + index / 2)
        records.append({"group": str(index // 2), "prompt": "a dog", "image": f"{index}.png", "scores": scores})
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "prompts.txt").write_text("a dog\nred cat\ntwo birds\n")
    train = {"steps": 3, "batch_size": 4, "device": "cpu"}
    optimizer = {"lr": 0.01, "schedule": "cosine", "warmup_steps": 1}
    common = {"train": train, "optimizer": optimizer, "pipeline": {"model": str(root / "pipeline")}}
    direct = {
        **common, "task": "direct_reward", "lora": {"rank": 2}, "data": {"prompts": str(root / "prompts.txt")},
        "rollout": {"steps": 2, "guidance_scale": 2.0}, "rewards": [{"name": "redness"}],
    }  # fmt: skip
    judge = {"scorer": {"model": str(root / "reasoner")}, "train": train, "optimizer": {**optimizer, "lr": 1e-3}}
    gdso = {**judge, "task": "reward_gdso", "data": {"records": str(root / "records.jsonl")}}
    return {
        "sft-lora-bf16": {
            **common, "task": "sft", "lora": {"rank": 2}, "data": {"manifest": str(root / "manifest.jsonl")},
            "train": {**train, "precision": "bf16"},
        },
        "sft-full": {
            **common, "task": "sft", "full": {"modules": ["transformer", "text_encoder"]},
            "data": {"manifest": str(root / "manifest.jsonl"), "cache_latents": False},
            "train": {**train, "accumulation": 2, "ema_decay": 0.9, "gradient_checkpointing": True},
        },
        "draft": {
            **direct, "gradient": {"method": "draft", "last_steps": "all", "memory": "flat"},
            "rewards": [{"name": "redness"}, {"name": "redness", "weight": 0.5, "ceiling": 0.1}], "balance": "gradient",
            "regularise": {"velocity": 0.5, "sft": {"manifest": str(root / "manifest.jsonl"), "weight": 0.1}},
        },
        "draft-bf16": {
            **direct, "gradient": {"method": "draft", "last_steps": 2}, "train": {**train, "precision": "bf16"},
            "pipeline": {"model": str(root / "pipeline"), "dtype": "bfloat16", "offload": True, "decode": "sliced"},
        },
        "refl": {**direct, "gradient": {"method": "refl", "earliest": 0.3}},
        **{
            name: {**direct, "rollout": {"steps": 4, "guidance": "off"}, "gradient": {"method": name}}
            for name in ("draft_lv", "alignprop", "drtune", "direct_align", "flowbp_sparse")
        },
        "reward-sft": {
            "task": "reward_sft", "scorer": {"model": str(root / "scorer")}, "train": train, "optimizer": optimizer,
            "data": {"records": str(root / "records.jsonl")},
        },
        "reward-gdso": {**gdso, "objective": {"group_size": 2, "kl": 0.1, "reference_every": 2}},
        # steps 1 and 3 stop inside a roll-out
        "reward-gdso-two-updates": {**gdso, "objective": {
            "group_size": 2, "kl": 0.1, "reference_every": 3, "updates_per_rollout": 2, "clip": 0.2, "reward": "parsed",
        }},
        "reward-risd": {
            **judge, "task": "reward_risd", "data": {"images": str(root / "records.jsonl")},
            "teacher": {"model": str(root / "reasoner"), "cache": str(root / "judgements"), "traces": 2},
        },
        # without a cache every visit is a new judgement, which a resumed run must draw again as it was
        "reward-risd-live": {
            **judge, "task": "reward_risd", "data": {"images": str(root / "records.jsonl")},
            "teacher": {"model": str(root / "reasoner"), "traces": 2},
        },
        "reward-dance-pairs": {
            **judge, "task": "reward_dance", "scorer": {"model": str(root / "comparer")},
            "data": {"records": str(root / "records.jsonl")}, "objective": {"form": "pairwise"},
        },
        "reward-opd": {
            **judge, "task": "reward_opd", "data": {"images": str(root / "records.jsonl")},
            "teacher": {"model": str(root / "scorer"), "rubric": str(root / "reasoner/rubric.json")},
            "objective": {"samples": 2},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is trained on, and `runs1` and `runs2`, the run folders by number of processes."""
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def results(root: Path) -> dict[int, Any]:
    """What real_tasks.py finds, by number of processes."""
    asked = {"RECIPES": recipes(root), "PLUGIN": str(HERE / "redness.py")}
    running = []
    for world in (1, 2):
        for rank, env in enumerate(processes.group(world)):
            place = {"ROOT": str(root / f"runs{world}"), "RESULT": str(root / f"result-{world}-{rank}.json")}
            running.append(processes.start(HERE / "real_tasks.py", {**asked, **place, "ENV": env}))
    processes.join(running, lambda: [path.read_text() for path in root.glob("result-*.json")])
    return {world: json.loads((root / f"result-{world}-0.json").read_text()) for world in (1, 2)}


CASES = ["sft-lora-bf16", "sft-full", "draft", "draft-bf16", "refl", "draft_lv", "alignprop", "drtune", "direct_align",
         "flowbp_sparse", "reward-sft", "reward-gdso", "reward-gdso-two-updates",
         "reward-risd", "reward-risd-live", "reward-dance-pairs", "reward-opd"]  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_stop_after_every_step_changes_nothing(results: dict[int, Any], case: str, processes: int) -> None:
    found = results[processes][case]
    assert found["equal"] and found["lines_equal"]
    assert [line["step"] for line in found["lines"]] == [1, 2, 3]
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in found["lines"])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_losses_and_weights_of_one(results: dict[int, Any], root: Path, case: str) -> None:
    """The moments too, which show what Adam's division hides in the weights: a gradient of another size."""
    one, two = (results[world][case]["lines"] for world in (1, 2))
    if "bf16" in case:
        # bf16 rounds batches of other sizes differently
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2e-2)
        return
    # advantages magnify the rounding where the rewards of a group are nearly equal: measured 1.7e-6
    tolerance = 1e-5 if "gdso" in case else 1e-6
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance, abs=tolerance), a["step"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=tolerance, abs=tolerance), a["step"]
    saved = [root / f"runs{world}/{case}/whole/checkpoints/step-000003" for world in (1, 2)]
    # Moments are means of gradients, summed in another order: measured at most 2.6e-8. Adam divides the smallest of
    # them by themselves, so that their rounding is more of a step of `lr`, here up to 0.01: measured at most 3.9e-6.
    bounds = {"optimizer": 1e-7, "parameters": 1e-5, "ema": 1e-5}
    for part in sorted(bounds.keys() & {file.stem for file in saved[0].iterdir()}):
        mine, other = (load_file(folder / f"{part}.safetensors") for folder in saved)
        assert mine.keys() == other.keys() and mine
        worst = max(float((mine[name] - other[name]).abs().max()) for name in mine)
        assert worst <= bounds[part], part
