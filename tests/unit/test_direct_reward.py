"""The direct_reward and sft tasks on a real ZImagePipeline with random weights: learning, keys, export."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import tiny
import torch
from rewardtune.pipelines.z_image import ZImage
from safetensors import safe_open

from rewardtune import gradients
from rewardtune.diffusion import export, lora, offload
from rewardtune.errors import CheckFailed
from rewardtune.plugins import Guidance, RewardCard
from rewardtune.scoring.augment import Augmentation
from rewardtune.scoring.reward_set import RewardSet, Term
from rewardtune.tasks.direct_reward import DirectReward
from rewardtune.types import Prompt, Score


class Redness:
    card = RewardCard("redness", "red minus blue", differentiable=True, needs_prompt=False, range=(-1, 1))

    def score(self, images, prompts):
        return Score((images[:, 0] - images[:, 2]).mean((1, 2)))


def build(method: str, settings: dict, *, lr_seed: int = 0, pipe=None, augmentation=None, **more) -> DirectReward:
    adapter = ZImage(pipe or tiny.z_image())
    modules = {"transformer": adapter.pipe.transformer}
    lora.attach(modules, rank=4, alpha=4, targets=adapter.lora_targets, seed=lr_seed)
    bound = gradients.load_method(method)
    more.setdefault("rewards", RewardSet([Term(Redness())]))
    return DirectReward(
        adapter, trainable=modules, prompts=[Prompt("dog"), Prompt("red cat"), Prompt("two birds")],
        method=lambda c, n, r: bound(c, n, r, **settings), num_steps=4,
        guidance=Guidance("detached-negative", 2.0), size=(16, 16), seed=3, augmentation=augmentation,
        samples=lambda: None,
        export=lambda *_: None, **more,
    )  # fmt: skip


def train(task: DirectReward, steps: int, lr: float) -> list[float]:
    parameters = [p for m in task.trainable.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    rewards = []
    for step in range(steps):
        out = task.step(task.batch(step, range(step * 4, step * 4 + 4)))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        rewards.append(out.metrics["reward/redness"])
    return rewards


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("draft", {"last_steps": 2, "memory": "flat"}),
        ("draft_lv", {"copies": 2, "memory": "flat"}),
        ("alignprop", {"longest": 1.0, "memory": "flat"}),
        ("drtune", {"train_steps": 2, "early_stop": 2, "memory": "fast"}),
        ("direct_align", {"earliest": 0.3, "latest": 1.0, "span": 1, "inversion": 0.0}),
        ("flowbp_sparse", {"active_steps": 2, "late_bias": 1.0, "rescale": 0.5, "memory": "flat"}),
        ("refl", {"earliest": 0.5, "latest": 1.0}),
    ],
)
def test_reward_rises(method, settings):
    rewards = train(build(method, settings), 25, 1e-2)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.02


def test_views_are_shifted_copies_with_noise_and_carry_gradient():
    images = torch.rand(2, 3, 16, 20, requires_grad=True)
    keys = [torch.Generator().manual_seed(i) for i in range(2)]
    still = Augmentation(copies=2, shift=0.0, noise=0.0).views(images, keys)
    assert torch.equal(still, torch.cat([images, images]))
    moved = Augmentation(copies=40, shift=0.125, noise=0.0).views(images, keys)
    inner = [moved[2 * k, :, 2:-2, 2:-2] for k in range(40)]
    shifts = set()
    for view in inner:
        shifts |= {
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if torch.equal(view, images[0, :, dy : dy + 12, dx : dx + 16])
        }
    assert len(shifts) > 10  # of 25, each by at most two pixels
    noisy = Augmentation(copies=8, shift=0.0, noise=0.1).views(torch.full((2, 3, 16, 20), 0.5), keys)
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.1)
    moved.sum().backward()
    assert float(images.grad.sum()) == pytest.approx(2 * 40 * 3 * 16 * 20)


def test_augmented_steps_depend_on_the_samples_alone():
    """The same views whatever else is in the batch: a resumed or distributed run sees them again."""
    augmentation = Augmentation(copies=2, shift=0.2, noise=0.1)
    task = build("draft", {"last_steps": 1, "memory": "fast"}, augmentation=augmentation)
    whole = task.step(task.batch(7, range(28, 32)))
    halves = [task.step(task.batch(7, [28, 29])), task.step(task.batch(7, [30, 31]))]
    mean = sum(float(h.loss) for h in halves) / 2
    assert float(whole.loss) == pytest.approx(mean, abs=1e-5)
    assert float(task.step(task.batch(7, range(28, 32))).loss) == float(whole.loss)


def test_batches_are_keyed_by_global_index_alone():
    task = build("draft", {"last_steps": 1, "memory": "fast"})
    whole, parts = task.batch(7, range(28, 32)), [task.batch(7, [28, 29]), task.batch(7, [30, 31])]
    assert torch.equal(whole.noise, torch.cat([p.noise for p in parts]))
    assert whole.prompts == parts[0].prompts + parts[1].prompts


def test_a_kept_decoder_graph_saves_a_decoding_and_changes_nothing(monkeypatch):
    found = []
    for recompute in (True, False):
        task, decoded = build("draft", {"last_steps": 1, "memory": "fast"}, recompute_decoder=recompute), []
        decode = task.pipeline.decode
        monkeypatch.setattr(task.pipeline, "decode", lambda z, d=decode, seen=decoded: seen.append(len(z)) or d(z))
        task.step(task.batch(0, range(2))).loss.backward()
        parameters = task.trainable["transformer"].named_parameters()
        found.append((len(decoded), {name: p.grad for name, p in parameters if p.grad is not None}))
    (twice, again), (once, kept) = found
    assert (twice, once) == (2, 1)
    assert kept and all(torch.equal(kept[name], again[name]) for name in kept)


def test_gradient_reaches_adapters_only():
    task = build("draft", {"last_steps": 2, "memory": "flat"})
    task.step(task.batch(0, range(2))).loss.backward()
    transformer = task.trainable["transformer"]
    assert all(p.grad is None for n, p in transformer.named_parameters() if "lora_" not in n)
    assert any(p.grad is not None and p.grad.any() for n, p in transformer.named_parameters() if "lora_B" in n)


def test_exported_adapters_load_in_diffusers_to_the_same_image(tmp_path):
    """Also at alpha != rank: the scale is folded, so a loader that ignores metadata gets full strength."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    base = tmp_path / "base"
    tiny.z_image().save_pretrained(base)
    adapter = ZImage.load(str(base), ZImage.Config(), revision=None, dtype=torch.float32, device="cpu")
    modules = {"transformer": adapter.pipe.transformer}
    lora.attach(modules, rank=4, alpha=12, targets=adapter.lora_targets, seed=1)
    with torch.no_grad():
        for name, parameter in adapter.pipe.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path / "export"
    folder.mkdir()
    export.lora(adapter, ["transformer"], folder, {"name": "test", "step": "3"}, base=str(base))
    fresh = DiffusionPipeline.from_pretrained(base)
    untouched = export.probe(ZImage(fresh))
    fresh.load_lora_weights(str(folder))
    assert torch.allclose(export.probe(ZImage(fresh)), export.probe(adapter), atol=1e-5)
    assert not torch.allclose(export.probe(ZImage(fresh)), untouched, atol=1e-3)
    keys = load_file(folder / export.LORA_FILE)
    assert all(
        k.startswith("transformer.") and (k.endswith("lora_A.weight") or k.endswith("lora_B.weight")) for k in keys
    )
    with safe_open(folder / export.LORA_FILE, framework="np") as file:
        targets = json.loads(file.metadata()["lora_adapter_metadata"])["transformer.target_modules"]
    assert targets == sorted(targets) and len(targets) == len(adapter.lora_targets["transformer"])
    assert 'pipe.load_lora_weights("path/to/this/folder")' in (folder / "README.md").read_text()


def test_an_export_is_checked_and_described_at_the_revision_that_was_trained(tmp_path, monkeypatch):
    """A cache of the hub with two commits of other weights; `main` is the first, the run started from the second."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root, commits = tmp_path / "models--team--model", ("1a" * 20, "2b" * 20)
    for number, commit in enumerate(commits):
        pipe = tiny.z_image()
        with torch.no_grad():
            for parameter in pipe.transformer.parameters():
                parameter.mul_(1 + 0.2 * number)
        pipe.save_pretrained(root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(commits[0])

    adapter = ZImage.load("team/model", ZImage.Config(), revision=commits[1], dtype=torch.float32, device="cpu")
    lora.attach({"transformer": adapter.pipe.transformer}, rank=2, targets=adapter.lora_targets)
    folder = tmp_path / "export"
    folder.mkdir()
    with pytest.raises(CheckFailed, match="do not give the trained pipeline's image"):
        export.lora(adapter, ["transformer"], folder, {}, base="team/model", revision=commits[0])
    export.lora(adapter, ["transformer"], folder, {"name": "night"}, base="team/model", revision=commits[1])
    card = (folder / "README.md").read_text()
    assert card.count(commits[1]) == 2 and f'from_pretrained("team/model", revision="{commits[1]}")' in card
    with safe_open(folder / export.LORA_FILE, framework="np") as file:
        metadata = file.metadata()
    assert metadata["rewardtune.base_revision"] == commits[1] and metadata["modelspec.title"] == "night"


def test_the_trained_pipeline_makes_room_for_the_one_that_an_export_is_checked_with(tmp_path, monkeypatch):
    """The largest pipelines fit on a device once."""
    base, folder, moves = tmp_path / "base", tmp_path / "export", []
    tiny.z_image().save_pretrained(base)
    folder.mkdir()
    adapter = ZImage.load(str(base), ZImage.Config(), revision=None, dtype=torch.float32, device="cpu")
    lora.attach({"transformer": adapter.pipe.transformer}, rank=2, targets=adapter.lora_targets)
    load = ZImage.load

    @contextmanager
    def aside(pipeline):
        assert pipeline is adapter
        moves.append("aside")
        yield
        moves.append("back")

    monkeypatch.setattr(offload, "aside", aside)
    monkeypatch.setattr(ZImage, "load", lambda *given, **named: moves.append("load") or load(*given, **named))
    export.lora(adapter, ["transformer"], folder, {"name": "test", "step": "3"}, base=str(base))
    assert moves == ["aside", "load", "back"]
