"""Frozen weights in bfloat16, parts that wait in main memory, decoding in parts: on every family, real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import parity
import pytest
import tiny
import torch
from parity import Family
from rewardtune.pipelines.z_image import ZImage
from torch import Tensor, nn

from rewardtune import gradients, registry
from rewardtune.build import build_task, load_pipeline
from rewardtune.diffusion import export, lora, offload
from rewardtune.errors import CheckFailed, RecipeError
from rewardtune.plugins import Guidance, RewardCard
from rewardtune.recipe.sections import DirectRewardRecipe, FullSection, LoraSection, PipelineSection, SftRecipe
from rewardtune.scoring.reward_set import RewardSet, Term
from rewardtune.tasks.direct_reward import DirectReward
from rewardtune.training.live_bytes import peak_live_bytes
from rewardtune.types import Prompt, Score

# Seconds on an idle machine; other work on it must not fail this.
pytestmark = pytest.mark.timeout(900)

# the first kind of each adapter; kinds differ in schedulers and guidance, which are float32 and wait nowhere
FAMILIES = {family.adapter.family: family for family in reversed(parity.families().values())}
GUIDED = Guidance("detached-negative", 2.0)


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


ROUNDS_TIME = ("flux", "flux_2")
"""Families whose transformers take the time in the dtype of their latents, in diffusers' own pipelines too."""


def rounded_time(predict):
    """A prediction in float32 at the time that a bfloat16 transformer sees."""

    def at_rounded(latents, timestep, conditioning, guidance):
        seen = (timestep / 1000).to(torch.bfloat16) * 1000
        return predict(latents, seen.float(), conditioning, guidance)

    return at_rounded


class Redness:
    card = RewardCard("redness", "red minus blue", differentiable=True, needs_prompt=False, range=(-1, 1))

    def score(self, images, prompts):
        return Score((images[:, 0] - images[:, 2]).mean((1, 2)))


def adapted(pipeline: Any) -> dict[str, nn.Module]:
    """Adapters on the denoiser that are no longer at their start, the same for each pipeline of a family."""
    modules = {pipeline.denoiser: pipeline.trainable[pipeline.denoiser]}
    lora.attach(modules, rank=2, alpha=3, targets=pipeline.lora_targets)
    for path, parameter in modules[pipeline.denoiser].named_parameters():
        if "lora_B" in path:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(path)))
    return modules


def task_of(pipeline: Any, modules: dict[str, nn.Module], size: tuple[int, int], **more: Any) -> DirectReward:
    method = gradients.load_method("draft", last_steps=2, memory="flat")
    return DirectReward(
        pipeline, trainable=modules, prompts=[Prompt("dog"), Prompt("red cat")], method=method, num_steps=3,
        guidance=GUIDED, size=size, seed=3, augmentation=None, velocity=0.5, rewards=RewardSet([Term(Redness())]),
        samples=lambda: None, export=lambda *_: None, **more,
    )  # fmt: skip


def gradient(task: DirectReward) -> tuple[float, Tensor]:
    """Loss and gradient of one batch of two."""
    weights = [p for m in task.trainable.values() for p in m.parameters() if p.requires_grad]
    loss = task.step(task.batch(0, range(2))).loss
    parts = torch.autograd.grad(loss, weights, allow_unused=True)
    return float(loss), torch.cat(
        [(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, parts, strict=True)]
    )


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def test_frozen_weights_are_bfloat16_and_adapters_float32(family, tmp_path, monkeypatch):
    """With autocast and without: the loss and the gradient stay near those of float32."""
    family.make().save_pretrained(tmp_path)
    found = {}
    for dtype in ("float32", "bfloat16"):
        section = PipelineSection(model=str(tmp_path), dtype=dtype)
        pipeline = load_pipeline(section, device="cpu", trained=LoraSection())
        modules = adapted(pipeline)
        parts = [m for m in pipeline.pipe.components.values() if isinstance(m, nn.Module)]
        kinds = {(p.requires_grad, p.dtype) for m in parts for p in m.parameters()}
        assert kinds == {(True, torch.float32), (False, getattr(torch, dtype))}
        # what adapters would have the latents cast to, had they come first
        assert pipeline.trainable[pipeline.denoiser].dtype == getattr(torch, dtype)
        if dtype == "float32" and pipeline.family in ROUNDS_TIME:
            monkeypatch.setattr(pipeline, "predict", rounded_time(pipeline.predict))
        task = task_of(pipeline, modules, family.sizes[0])
        found[dtype, "fp32"] = gradient(task)
        with torch.autocast("cpu", torch.bfloat16):
            found[dtype, "bf16"] = gradient(task)
    exact, loss = found["float32", "fp32"][1], found["float32", "fp32"][0]
    for kind in [("bfloat16", "fp32"), ("bfloat16", "bf16")]:
        assert found[kind][0] == pytest.approx(loss, abs=2e-2)
        assert cosine(found[kind][1], exact) > 0.9


def test_exported_adapters_of_a_bfloat16_pipeline_are_checked(family, tmp_path, monkeypatch):
    base, folder = tmp_path / "base", tmp_path / "export"
    family.make().save_pretrained(base)
    folder.mkdir()
    pipeline = load_pipeline(PipelineSection(model=str(base), dtype="bfloat16"), device="cpu", trained=LoraSection())
    modules = adapted(pipeline)
    before = {name: p.clone() for name, p in modules[pipeline.denoiser].named_parameters()}
    export.lora(pipeline, [pipeline.denoiser], folder, {"name": "test"}, base=str(base))
    after = dict(modules[pipeline.denoiser].named_parameters())
    assert all(torch.equal(before[name], p) and before[name].dtype == p.dtype for name, p in after.items())
    folded = lora.folded
    monkeypatch.setattr(
        lora, "folded", lambda module: {k: -v if "lora_B" in k else v for k, v in folded(module).items()}
    )
    with pytest.raises(CheckFailed, match="do not give the trained pipeline's image"):
        export.lora(pipeline, [pipeline.denoiser], folder, {"name": "test"}, base=str(base))


class Poisoned:
    """In place of `offload._move`: numbers are NaN wherever they wait, until they are brought; with a log.

    What uses them while they are away, which no machine with one kind of device would notice, gives NaN.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.names = {id(module): name for name, module in modules.items()}
        self.kept = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
        self.log: dict[str, list[str]] = {name: [] for name in modules}

    def __call__(self, module, place):
        name = self.names[id(module)]
        self.log[name].append(str(place))
        for parameter, numbers in zip(module.parameters(), self.kept[name], strict=True):
            parameter.data.copy_(numbers) if str(place) == "cpu:0" else parameter.data.fill_(torch.nan)


def test_what_waits_in_main_memory_comes_when_it_is_needed(family, monkeypatch):
    """Images, latents of images, loss and gradient are those of the pipeline that is on its device as a whole."""
    found = []
    for away in (False, True):
        pipeline, size = family.adapter(family.make()), family.sizes[0]
        parts = {n: m for n, m in pipeline.pipe.components.items() if isinstance(m, nn.Module)}
        for part in parts.values():
            part.requires_grad_(False).eval()
        if away:
            poisoned = Poisoned({n: m for n, m in parts.items() if n != pipeline.denoiser})
            monkeypatch.setattr(offload, "_move", poisoned)
            offload.apply(pipeline, device="cpu:0", stay={pipeline.denoiser})
            assert offload.applied(pipeline) == "cpu:0"
            assert all(log == ["cpu"] for log in poisoned.log.values())
        task = task_of(pipeline, adapted(pipeline), size)
        images = parity.ours(pipeline, family.cases[-1], size)
        latents = pipeline.encode_images(images)
        found.append((images, latents, *gradient(task)))
        if away:
            for name, log in poisoned.log.items():
                # the gradient ends in the denoiser, before which all have left
                assert "cpu:0" in log and log[-1] == "cpu", name
    assert torch.isfinite(found[0][0]).all() and found[0][3].any()
    for plain, apart in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(plain), torch.as_tensor(apart))


def test_a_trained_text_encoder_stays(tmp_path):
    tiny.z_image().save_pretrained(tmp_path)
    section = PipelineSection(model=str(tmp_path), offload=True)
    for trained, hooked in ((None, {"vae", "text_encoder"}), (FullSection(modules=["text_encoder"]), {"vae"})):
        pipeline = load_pipeline(section, device="cpu", trained=trained)
        found = {n for n, m in pipeline.pipe.components.items() if hasattr(m, "_hf_hook")}
        assert found == hooked
    assert offload.applied(ZImage(tiny.z_image())) is None


def test_adapters_load_onto_a_pipeline_whose_parts_wait(tmp_path):
    """diffusers removes hooks that it takes for its own when it loads adapters, and puts the denoiser away."""
    base, folder = tmp_path / "base", tmp_path / "export"
    tiny.z_image().save_pretrained(base)
    folder.mkdir()
    pipeline = load_pipeline(PipelineSection(model=str(base), offload=True), device="cpu", trained=LoraSection())
    adapted(pipeline)
    export.lora(pipeline, ["transformer"], folder, {"name": "test"}, base=str(base))  # itself loads them so
    assert offload.applied(pipeline) == "cpu"
    other = load_pipeline(PipelineSection(model=str(base), offload=True), device="cpu")
    lora.load(other, folder)
    assert offload.applied(other) == "cpu" and not hasattr(other.pipe.transformer, "_hf_hook")
    assert torch.allclose(export.probe(other), export.probe(pipeline), atol=1e-5)


@pytest.mark.parametrize("how", ["sliced", "tiled"])
def test_decoding_in_parts(how, tmp_path):
    """Image by image: the same image and gradient. In tiles: another image where it is larger than a tile."""
    tiny.z_image().save_pretrained(tmp_path)
    found = {}
    for decode in ("whole", how):
        section = PipelineSection(model=str(tmp_path), decode=decode)
        pipeline = load_pipeline(section, device="cpu", trained=LoraSection())
        task = task_of(pipeline, adapted(pipeline), (16, 16), sliced=decode == "sliced")
        found[decode] = gradient(task)
    assert found[how][0] == pytest.approx(found["whole"][0], abs=1e-5)
    assert torch.allclose(found[how][1], found["whole"][1], atol=1e-6 + 1e-4 * float(found["whole"][1].abs().max()))
    assert pipeline.pipe.vae.use_slicing == (how == "sliced") and pipeline.pipe.vae.use_tiling == (how == "tiled")


def test_what_decoding_in_parts_saves():
    """Peak live bytes under gradient: four images one by one hold little more than one; the VAE's own checkpoints
    hold less than its whole graph."""
    pipeline = ZImage(tiny.z_image())
    pipeline.pipe.vae.requires_grad_(False)
    modules = adapted(pipeline)
    # small beside the decoder, as at full size
    pipeline.pipe.transformer.enable_gradient_checkpointing()
    pipeline.pipe.transformer.train()

    def peak(count: int, **more: Any) -> int:
        task = task_of(pipeline, modules, (64, 64), **more)
        task.velocity = 0.0
        return peak_live_bytes(lambda: task.step(task.batch(0, range(count))).loss.backward())

    one, whole, sliced = peak(1), peak(4), peak(4, sliced=True)
    pipeline.pipe.vae.enable_gradient_checkpointing()
    checked = peak(4)
    print(one, whole, sliced, checked)
    assert sliced < 0.6 * whole and checked < 0.9 * whole


def test_an_autoencoder_that_cannot_decode_in_parts_is_named(tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    tiny.z_image().save_pretrained(tmp_path)

    def refuse(self):
        raise NotImplementedError

    monkeypatch.setattr(AutoencoderKL, "enable_slicing", refuse)
    with pytest.raises(RecipeError, match=r"pipeline\.decode sliced: AutoencoderKL of ZImagePipeline"):
        load_pipeline(PipelineSection(model=str(tmp_path), decode="sliced"), device="cpu")


def recipe_of(kind: str, root, **more: Any) -> dict[str, Any]:
    registry.load_plugin(str(Path(__file__).parents[1] / "unit" / "redness.py"))
    return {
        "task": "direct_reward", "pipeline": {"model": str(root), "dtype": "bfloat16"}, kind: {},
        "data": {"prompts": str(root / "prompts.txt")}, "rollout": {"steps": 2}, "rewards": [{"name": "redness"}],
        "gradient": {"method": "draft", "last_steps": 1}, "train": {"steps": 1}, **more,
    }  # fmt: skip


def test_whole_modules_keep_float32_masters_of_the_checkpoint(tmp_path):
    """Not the bfloat16 values widened again; the rest of the pipeline is bfloat16, and autocast joins the two."""
    pipe = tiny.z_image()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a dog"}) + "\n")
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    recipe = {
        "task": "sft", "pipeline": {"model": str(tmp_path), "dtype": "bfloat16"}, "full": {},
        "data": {"manifest": str(tmp_path / "manifest.jsonl"), "cache_latents": False},
        "train": {"steps": 1, "precision": "bf16"},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"needs train\.precision bf16"):
        SftRecipe.model_validate({**recipe, "train": {"steps": 1}})
    task: Any = build_task(SftRecipe.model_validate(recipe), device="cpu")
    kept = dict(pipe.transformer.named_parameters())
    for name, parameter in task.pipeline.pipe.transformer.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad and torch.equal(parameter, kept[name])
    frozen = [*task.pipeline.pipe.vae.parameters(), *task.pipeline.pipe.text_encoder.parameters()]
    assert {(p.dtype, p.requires_grad) for p in frozen} == {(torch.bfloat16, False)}
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.step(task.batch(0, [0])).loss
    loss.backward()
    assert (
        float(loss) > 0
        and kept
        and all(p.grad is None or p.grad.dtype == torch.float32 for p in task.pipeline.pipe.transformer.parameters())
    )
    folder = tmp_path / "export"
    folder.mkdir()
    export.pipeline(task.pipeline, folder, {"name": "test"}, base=str(tmp_path))


def test_gradient_checkpointing_reaches_the_decoder_where_the_gradient_does(tmp_path):
    tiny.z_image().save_pretrained(tmp_path)
    (tmp_path / "prompts.txt").write_text("dog\n")
    settings = {"steps": 1, "gradient_checkpointing": True}
    for on in (True, False):
        train = {**settings, "gradient_checkpointing": on}
        recipe = DirectRewardRecipe.model_validate(recipe_of("lora", tmp_path, train=train))
        task: Any = build_task(recipe, device="cpu")
        assert task.pipeline.pipe.vae.decoder.gradient_checkpointing == on
