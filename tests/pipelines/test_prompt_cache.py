"""Embeddings of prompts kept in main memory: text encoders run once a prompt, and no number of a training changes."""

from __future__ import annotations

import json
from pathlib import Path

import parity
import pytest
import tiny
import torch
import yaml
from parity import PROMPTS, STEPS, Family
from torch import Tensor

from rewardtune import registry
from rewardtune.build import build_task
from rewardtune.data.images import to_pil
from rewardtune.diffusion import offload
from rewardtune.diffusion.conditioning import mapped
from rewardtune.diffusion.prompt_cache import PromptCache
from rewardtune.plugins import Guidance
from rewardtune.recipe.file import load_recipe
from rewardtune.tasks.direct_reward import DirectReward
from rewardtune.training.loop import train
from rewardtune.training.track import read_metrics

FAMILIES = parity.families()


def leaves(conditioning) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(lambda tensor, _: found.append(tensor) or tensor, conditioning)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_joined_prompts_are_what_the_family_encodes_together(name):
    """For prompts of different length, and for as many of the same: one padding or another."""
    family: Family = FAMILIES[name]
    adapter = family.adapter(family.make())
    for case in family.cases:
        for prompts in (PROMPTS, [PROMPTS[1], PROMPTS[1]], [PROMPTS[0]] * 3, PROMPTS[:1]):
            with torch.no_grad():
                wanted = adapter.encode(prompts, case.guidance)
                found = adapter.join([adapter.encode([prompt], case.guidance) for prompt in prompts])
                count = len(prompts)
                noise = adapter.noise(parity.generators(count), family.sizes[0])
                timestep = adapter.timesteps(STEPS, family.sizes[0])[1][1]
                said = [adapter.predict(noise, timestep, c, case.guidance) for c in (wanted, found)]
            assert type(found) is type(wanted)
            assert [(t.shape, t.dtype) for t in leaves(found)] == [(t.shape, t.dtype) for t in leaves(wanted)]
            # batches of other sizes round differently
            for a, b in zip([*leaves(found), said[1]], [*leaves(wanted), said[0]], strict=True):
                assert torch.allclose(a.float(), b.float(), atol=1e-5), case.label


# ---------------------------------------------------------------------------------------------------------- the cache

TEXTS = ["dog", "red cat", "two birds", "a dog on the left of two birds", "one very long prompt", "cat"]


class Counted:
    """Prompts that an adapter's own `encode` is given, one call after another."""

    def __init__(self, adapter) -> None:
        self.calls: list[list[str]] = []
        encode = adapter.encode
        adapter.encode = lambda prompts, guidance: self.calls.append(list(prompts)) or encode(prompts, guidance)


def qwen():
    family = FAMILIES["qwen_image"]
    return family.adapter(family.make())


def size_of(conditioning) -> int:
    return sum(tensor.nbytes for tensor in leaves(conditioning))


def test_every_prompt_is_encoded_once_and_given_back_as_it_was():
    adapter, guidance = qwen(), Guidance("full", 3.0, "red")
    plain = PromptCache(adapter, guidance, limit=0)
    asked = [TEXTS[:2], TEXTS[2:4], [TEXTS[1], TEXTS[3]], [TEXTS[0], TEXTS[0]], TEXTS[:4]]
    wanted = [plain.encode(texts, first=0, prompt_of=TEXTS.__getitem__) for texts in asked]
    counted, cache = Counted(adapter), PromptCache(adapter, guidance, limit=2**20)
    found = [cache.encode(texts, first=0, prompt_of=TEXTS.__getitem__) for texts in asked]
    assert counted.calls == [[text] for text in TEXTS[:4]]
    for one, other in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))
    # the negative prompt is everyone's, and kept once
    alone = [size_of(adapter.encode([text], guidance)) for text in TEXTS[:4]]
    negative = size_of(adapter.encode(["red"], Guidance("off")))
    assert cache._size == sum(alone) - 3 * negative


def test_what_was_not_used_for_longest_is_forgotten_and_encoded_again_to_the_same():
    adapter, guidance = qwen(), Guidance("off")
    room = sum(size_of(adapter.encode([text], guidance)) for text in TEXTS[:2])
    counted, cache = Counted(adapter), PromptCache(adapter, guidance, limit=room)
    first = cache.encode(TEXTS[:1], first=0, prompt_of=TEXTS.__getitem__)
    for texts in (TEXTS[1:2], TEXTS[:1], ["cat"], TEXTS[:1], TEXTS[1:2]):
        cache.encode(texts, first=0, prompt_of=TEXTS.__getitem__)
    # the cat took the place of the second, which was used before the first
    assert counted.calls == [["dog"], ["red cat"], ["cat"], ["red cat"]]
    assert cache._size <= room
    tight = PromptCache(adapter, guidance, limit=1)  # room for none
    again = tight.encode(TEXTS[:1], first=0, prompt_of=TEXTS.__getitem__)
    assert not tight._kept and all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(again), strict=True))


def test_a_run_looks_ahead_as_far_as_there_is_room():
    adapter, guidance = qwen(), Guidance("off")
    room = sum(size_of(adapter.encode([text], guidance)) for text in TEXTS[:4])
    counted, cache = Counted(adapter), PromptCache(adapter, guidance, limit=room, end=len(TEXTS))
    for i, text in enumerate(TEXTS):
        cache.encode([text], first=i, prompt_of=TEXTS.__getitem__)
        # the first four at once; then, as one is missing, all that are left
        assert [call[0] for call in counted.calls] == TEXTS[: 4 if i < 4 else 6]


# --------------------------------------------------------------------------------------------------------- trainings


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    registry.load_plugin(str(Path(__file__).parents[1] / "unit" / "redness.py"))
    folder = tmp_path_factory.mktemp("prompts")
    tiny.z_image().save_pretrained(folder / "z_image")
    FAMILIES["stable_diffusion"].make().save_pretrained(folder / "stable_diffusion")
    (folder / "prompts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    rows = []
    for index, picture in enumerate(to_pil(torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)))):
        picture.save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": TEXTS[index]})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(root: Path, family: str, folder: Path, *, task: str = "direct_reward", lora=None, **pipeline):
    direct = {
        "data": {"prompts": str(root / "prompts.txt")}, "rollout": {"steps": 2, "guidance_scale": 2.0},
        "gradient": {"method": "draft"}, "rewards": [{"name": "redness"}],
        "regularise": {"sft": {"manifest": str(root / "manifest.jsonl"), "weight": 0.1}},
    }  # fmt: skip
    document = {
        "task": task, "pipeline": {"model": str(root / family), **pipeline}, "lora": {"rank": 2, **(lora or {})},
        "optimizer": {"lr": 0.01}, "train": {"steps": 5, "batch_size": 4, "accumulation": 2, "device": "cpu"},
        **(direct if task == "direct_reward" else {"data": {"manifest": str(root / "manifest.jsonl")}}),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return load_recipe(str(folder / "recipe.yaml")).recipe


def run(recipe, folder: Path, *, until: int | None = None):
    """(the task, what was encoded, its lines of metrics.jsonl, the trained weights)."""
    folder.mkdir(exist_ok=True)
    task = build_task(recipe, device="cpu")
    counted = Counted(task.pipeline)
    state = train(task, folder=folder, train=recipe.train, optimizer=recipe.optimizer, until=until)
    lines = [{**line, "seconds": 0} for line in read_metrics(folder / "metrics.jsonl")]
    return task, counted.calls, lines, {name: p.detach().clone() for name, p in state.parameters.items()}


def same(one, other) -> bool:
    return one[2] == other[2] and all(torch.equal(one[3][name], other[3][name]) for name in one[3])


@pytest.mark.parametrize("task", ["direct_reward", "sft"])
@pytest.mark.parametrize(("family", "little"), [("z_image", 4e-7), ("stable_diffusion", 1.5e-6)])
def test_a_training_is_the_same_with_much_room_little_and_none(root, tmp_path, family, little, task):
    """little: GiB for a few of the prompts."""
    runs = {
        room: run(recipe(root, family, tmp_path / str(room), task=task, prompt_cache=room), tmp_path / str(room))
        for room in (4.0, little, 0.0)
    }
    assert same(runs[4.0], runs[0.0]) and same(runs[4.0], runs[little])
    assert len(runs[4.0][2]) == 5
    encoded = {room: [call[0] for call in found[1]] for room, found in runs.items()}
    # one kind of guidance for the roll-outs and none for the denoising loss, each with a cache of its own
    tasks = 2 if task == "direct_reward" else 1
    assert all(encoded[4.0].count(text) <= tasks for text in encoded[4.0])
    assert set(encoded[4.0]) >= set(TEXTS) - {""}
    assert len(encoded[4.0]) < len(encoded[little]) <= len(encoded[0.0])


def test_a_continued_training_is_the_same_though_it_begins_with_an_empty_cache(root, tmp_path):
    made = recipe(root, "z_image", tmp_path, offload=True)
    whole = run(made, tmp_path / "whole")
    for until in (1, 3, 5):
        cut = run(made, tmp_path / "cut", until=until)
    assert same(whole, cut)


def test_text_encoders_that_wait_come_once(root, tmp_path, monkeypatch):
    """For all prompts of the run, before its first step; without room they come for every micro-batch."""
    for room, visits in ((4.0, 2), (0.0, 20)):
        made = recipe(root, "z_image", tmp_path / str(room), prompt_cache=room, offload=True)
        task = build_task(made, device="cpu")
        text_encoder, places = task.pipeline.pipe.text_encoder, []
        move = offload._move

        def watched(module, place, move=move, wanted=text_encoder, places=places):
            if module is wanted and places[-1:] != [str(place)]:
                places.append(str(place))
            move(module, place)

        monkeypatch.setattr(offload, "_move", watched)
        for name in ("text_encoder", "vae"):
            hook = getattr(task.pipeline.pipe, name)._hf_hook
            hook.execution_device = torch.device("cpu:0")  # tells a visit from home
        train(task, folder=tmp_path / str(room), train=made.train, optimizer=made.optimizer)
        monkeypatch.setattr(offload, "_move", move)
        # once for the roll-outs' prompts, and once for the denoising loss, which has no guidance
        assert places.count("cpu:0") == visits


def test_no_embedding_of_a_trained_text_encoder_is_kept(root, tmp_path):
    made = recipe(root, "stable_diffusion", tmp_path, lora={"modules": ["unet", "text_encoder"]})
    task, calls, _, weights = run(made, tmp_path)
    assert isinstance(task, DirectReward) and task.prompt_cache is None and task.sft[0].prompt_cache is None
    assert len(calls) == 2 * 10 and all(len(call) == 2 for call in calls)
    assert any(weight.any() for name, weight in weights.items() if name.startswith("text_encoder") and "lora_B" in name)


def test_a_family_without_join_has_its_prompts_encoded_anew(root, tmp_path, monkeypatch):
    from rewardtune.pipelines.z_image import ZImage

    monkeypatch.delattr(ZImage, "join")
    task, calls, _, _ = run(recipe(root, "z_image", tmp_path), tmp_path)
    assert task.prompt_cache is None and len(calls) == 2 * 10


def test_embeddings_keep_their_dtype_in_bfloat16(root, tmp_path):
    made = recipe(root, "z_image", tmp_path, dtype="bfloat16")
    task = build_task(made, device="cpu")
    texts = [str(task._prompt(i)) for i in range(2)]
    fresh, kept = (task.prompt_cache.encode(texts, first=0, prompt_of=task._prompt) for _ in range(2))
    assert {tensor.dtype for tensor in leaves(kept)} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(leaves(fresh), leaves(kept), strict=True))
