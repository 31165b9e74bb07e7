"""Families x checks: the same images, gradients and losses as diffusers' own code. Writes docs/parity.md.

`python -m pytest tests/pipelines/test_parity.py --write-pages` renews the page.
"""

from __future__ import annotations

import math
from pathlib import Path

import like_comfyui
import parity
import pytest
import torch
from parity import Family, arguments, chain, generators, gradient, ours, reference

from rewardtune.build import find_family
from rewardtune.compare import reproduce
from rewardtune.compare.sampling import Plan, sample_sides
from rewardtune.compare.sides import Side
from rewardtune.diffusion.parameterisation import shares, training_pair
from rewardtune.errors import RecipeError
from rewardtune.gradients.draft import draft
from rewardtune.plugins import Guidance
from rewardtune.recipe.sections import PipelineSection
from rewardtune.types import Prompt

PAGE = Path(__file__).parents[2] / "docs/parity.md"
FAMILIES = parity.families()
RESULTS: dict[str, dict[str, str]] = {}
COLUMNS = {
    "images": "image equals `pipe(...)`",
    "constants": "constants whose change is noticed",
    "gradient": "full-chain gradient against autograd through the call",
    "differences": "finite differences",
    "sft": "SFT loss",
    "lora": "LoRA loads in diffusers",
    "comfyui": "names for ComfyUI",
}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def family(name) -> Family:
    return FAMILIES[name]


def note(name: str, column: str, text: str) -> None:
    RESULTS.setdefault(name, {})[column] = text


def guided(family: Family) -> parity.Case:
    return family.cases[-1]


def test_rollout_equals_the_pipeline(name, family):
    pipe = family.make()
    images = []
    for case in family.cases:
        for size in family.sizes:
            adapter = family.adapter(pipe)
            # a batch of two prompts of different length, and no state left behind by the call before
            found, wanted = ours(adapter, case, size), reference(pipe, case, size)
            assert found.shape == wanted.shape == (2, 3, *size)
            difference = float((found - wanted).abs().max())
            assert difference <= family.bound, f"{case.label} at {size}: {difference}"
            if size == family.sizes[0]:
                images.append(found)
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i]), "cases that do not differ"
    note(name, "images", "equal" if not family.bound else f"within {family.bound:g}: {family.why}")


def test_the_call_says_what_the_guidance_means(family):
    """`call` is what a script beside a report samples with."""
    adapter = family.adapter(family.make())
    for case in family.cases:
        said = adapter.call(case.guidance)
        assert {k: said.get(k) for k in case.call} == dict(case.call)


def test_the_script_beside_a_report_draws_the_same(family, tmp_path, monkeypatch):
    """`compare`'s images, with the family's guidance, again by diffusers alone."""
    family.make().save_pretrained(tmp_path / "pipeline")
    side = Side("base", "base", PipelineSection(model=str(tmp_path / "pipeline")))
    guidance = guided(family).guidance
    plan = Plan(
        tuple(Prompt(p) for p in parity.PROMPTS), seeds=1, steps=2, guidance_scale=guidance.scale,
        embedded_guidance=guidance.embedded, batch_size=2, size=family.sizes[1],
    )  # fmt: skip
    sample_sides([side], plan, tmp_path, device="cpu")
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    assert reproduce.draw("base") == 0


def test_a_changed_constant_is_noticed(name, family):
    case, size = guided(family), family.sizes[0]
    wanted = reference(family.make(), case, size)
    for component, key, value in family.perturbations:
        pipe = family.make()
        holder = pipe if component == "pipeline" else getattr(pipe, component)
        if key in holder.config:
            assert holder.config[key] != value
            holder.register_to_config(**{key: value})
        else:
            holder.get_buffer(key).fill_(value)
        assert (ours(family.adapter(pipe), case, size) - wanted).abs().max() > 1e-4, f"{component}.{key}"
    note(name, "constants", ", ".join(f"{c}.{k}" for c, k, _ in family.perturbations))


def test_full_chain_gradient_equals_autograd_through_the_call(name, family):
    pipe = family.make()
    size, case = family.sizes[0], guided(family)
    adapter = family.adapter(pipe)
    call = type(pipe).__call__.__wrapped__
    unpack = family.unpack or (lambda _, latents, size: latents)
    wanted = gradient(
        adapter, lambda: unpack(pipe, call(pipe, **arguments(case, size), output_type="latent").images, size)
    )
    assert wanted.isfinite().all() and wanted.norm() > 0
    worst = 0.0
    for memory in ("fast", "flat"):
        found = gradient(adapter, lambda memory=memory: full_chain(adapter, case.guidance, size, memory))
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    assert worst <= 1e-5
    note(name, "gradient", "within 1e-5")


def full_chain(adapter, guidance, size, memory, last_steps="all"):
    noise = adapter.noise(generators(), size)
    return draft(chain(adapter, guidance, size), noise, None, last_steps=last_steps, memory=memory).latents


def test_detached_negative_has_the_same_images_and_another_gradient(family):
    case, size = guided(family), family.sizes[0]
    if case.guidance.mode != "full":
        pytest.skip("the family has no second branch")
    adapter = family.adapter(family.make())
    guidance = Guidance("detached-negative", case.guidance.scale, case.guidance.negative_prompt, case.guidance.embedded)
    both = [
        gradient(adapter, lambda g=g, m=m: full_chain(adapter, g, size, m, 2))
        for g, m in ((guidance, "fast"), (guidance, "flat"), (case.guidance, "flat"))
    ]
    assert (both[0] - both[1]).norm() <= 1e-5 * both[0].norm()
    assert (both[0] - both[2]).norm() > 1e-3 * both[0].norm()
    with torch.no_grad():
        latents = [full_chain(adapter, g, size, "fast") for g in (guidance, case.guidance)]
    assert torch.equal(*latents)


def test_every_text_encoder_that_may_be_trained_gets_a_gradient(family):
    case, size = guided(family), family.sizes[0]
    adapter = family.adapter(family.make())
    for name, module in adapter.trainable.items():
        if name == adapter.denoiser:
            continue
        weights = list(module.requires_grad_(True).parameters())
        latents = full_chain(adapter, case.guidance, size, "flat", 1)
        parts = torch.autograd.grad(latents.pow(2).mean(), weights, allow_unused=True)
        module.requires_grad_(False)
        assert any(part is not None and part.isfinite().all() and part.norm() > 0 for part in parts), name


def test_gradient_agrees_with_finite_differences(name, family):
    case, size = guided(family), family.sizes[0]
    adapter = family.adapter(family.make())
    found = gradient(adapter, lambda: full_chain(adapter, case.guidance, size, "flat"))
    weights = parity.parameters(adapter)
    for seed in range(2):
        key = torch.Generator().manual_seed(seed)
        # along the gradient and a little off it: the quotient of a random direction drowns in fp32's rounding
        direction = found / found.norm() + 0.5 * torch.randn(found.shape, generator=key) / math.sqrt(len(found))
        direction /= direction.norm()

        def value(offset: float, direction=direction) -> float:
            with torch.no_grad():
                for weight, part in zip(weights, direction.split([w.numel() for w in weights]), strict=True):
                    weight.add_(offset * part.view_as(weight))
                out = adapter.decode(full_chain(adapter, case.guidance, size, "fast")).double().pow(2).mean().item()
                for weight, part in zip(weights, direction.split([w.numel() for w in weights]), strict=True):
                    weight.sub_(offset * part.view_as(weight))
            return out

        step = family.difference
        # five points, so that curvature does not count
        quotient = (8 * (value(step) - value(-step)) - (value(2 * step) - value(-2 * step))) / (12 * step)
        assert quotient == pytest.approx(float((found * direction).sum()), rel=1e-2)
    note(name, "differences", "within 1 %")


def test_sft_loss_equals_the_training_formula_of_diffusers(name, family):
    if family.training is None:
        note(name, "sft", "not offered")
        return
    pipe = family.make()
    adapter = family.adapter(pipe)
    size = family.sizes[1]
    shape = adapter.noise(generators(), size).shape
    clean, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    u = torch.tensor([0.2, 0.9])
    prediction, target = family.training(pipe, clean, noise, u, parity.PROMPTS)
    off = Guidance(mode="off")
    noisy, timesteps, ours_target = training_pair(adapter.scheduler, clean, noise, u)
    found = adapter.predict(noisy, timesteps, adapter.encode(parity.PROMPTS, off), off)
    loss, wanted = (found - ours_target).pow(2).mean(), (prediction - target).pow(2).mean()
    assert torch.allclose(found, prediction, rtol=1e-4, atol=1e-5)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    assert family.latents is not None
    with torch.no_grad():
        assert torch.allclose(adapter.encode_images(images), family.latents(pipe, images), atol=1e-5)
    note(name, "sft", "equal")


def test_decode_inverts_the_scaling_of_encode(family):
    """What one side multiplies by the other divides by: the decoder sees the autoencoder's own latents."""
    if family.latents is None:
        return
    pipe = family.make()
    adapter = family.adapter(pipe)
    images = torch.rand(1, 3, *family.sizes[1], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        decoded = adapter.decode(adapter.encode_images(images))
        raw = plain_reconstruction(pipe.vae, images)
    assert torch.allclose(decoded, raw, atol=1e-5)


def plain_reconstruction(vae, images):
    pixels = images * 2 - 1
    flat = vae.config.get("z_dim") is None
    encoded = vae.encode(pixels if flat else pixels.unsqueeze(2))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    out = vae.decode(latents, return_dict=False)[0]
    return (out if flat else out[:, :, 0]) / 2 + 0.5


def test_clean_estimate_inverts_the_noising(family):
    """With the true noise and image, the x0 estimate of any step is the image."""
    adapter = family.adapter(family.make())
    off = Guidance(mode="off")
    steps = chain(adapter, off, family.sizes[0])
    shape = adapter.noise(generators(), family.sizes[0]).shape
    clean, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    flow = "FlowMatch" in type(adapter.scheduler).__name__ or adapter.scheduler.config.get("use_flow_sigmas")
    kind = adapter.scheduler.config.get("prediction_type")
    steps._scaled = lambda _, latents: latents  # type: ignore[method-assign]
    for i, timestep in enumerate(steps.timesteps):
        signal, sigma = shares(steps._states[0], i, timestep)
        truth = noise - clean if flow else noise if kind == "epsilon" else signal * noise - sigma * clean
        steps.predict = lambda *_, truth=truth: truth  # type: ignore[method-assign]
        assert torch.allclose(steps.clean(i, signal * clean + sigma * noise), clean, atol=2e-3)


def test_a_saved_checkpoint_is_recognised_and_loads(name, family, tmp_path):
    pipe = family.make()
    pipe.save_pretrained(tmp_path)
    assert find_family(str(tmp_path), None) == family.adapter.family
    adapter = family.adapter.load(
        str(tmp_path), family.adapter.Config(), revision=None, dtype=torch.float32, device="cpu"
    )
    adapter.pipe.set_progress_bar_config(disable=True)
    case, size = guided(family), family.sizes[0]
    assert torch.allclose(ours(adapter, case, size), reference(pipe, case, size), atol=max(1e-6, family.bound))
    assert all(side % adapter.size_multiple == 0 for pair in family.sizes for side in pair)
    assert all(side % adapter.size_multiple == 0 for side in adapter.image_size)


def test_exported_adapters_load_to_the_same_image(name, family, tmp_path):
    """Also at alpha != rank: the scale is folded, so a loader that ignores metadata gets full strength."""
    from diffusers import DiffusionPipeline

    from rewardtune.diffusion import comfyui, export, lora

    base, folder = tmp_path / "base", tmp_path / "export"
    family.make().save_pretrained(base)
    folder.mkdir()
    adapter = family.adapter.load(str(base), family.adapter.Config(), revision=None, dtype=torch.float32, device="cpu")
    names = list(family.lora_modules or [adapter.denoiser])
    lora.attach({n: adapter.trainable[n] for n in names}, rank=4, alpha=12, targets=adapter.lora_targets, seed=1)
    with torch.no_grad():
        for n in names:
            for path, parameter in adapter.trainable[n].named_parameters():
                if "lora_B" in path:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(path)))
    export.lora(adapter, names, folder, {"name": "test", "step": "3"}, base=str(base))
    fresh = DiffusionPipeline.from_pretrained(base)
    fresh.set_progress_bar_config(disable=True)
    untouched = export.probe(family.adapter(fresh))
    if hasattr(fresh, "load_lora_weights"):
        fresh.load_lora_weights(str(folder))
    else:  # diffusers has no loader for the family, so its users take peft's
        from peft import PeftModel

        setattr(fresh, adapter.denoiser, PeftModel.from_pretrained(getattr(fresh, adapter.denoiser), folder))
    assert torch.allclose(export.probe(family.adapter(fresh)), export.probe(adapter), atol=1e-5)
    assert not torch.allclose(export.probe(family.adapter(fresh)), untouched, atol=1e-3)
    note(name, "lora", "same image" if hasattr(fresh, "load_lora_weights") else "same image, through peft")
    wanted = export.probe(adapter)
    if adapter.comfyui is None:
        with pytest.raises(RecipeError, match="--merge"):
            comfyui.keys(adapter, names)
    else:
        tensors, other = comfyui.keys(adapter, names), DiffusionPipeline.from_pretrained(base)
        other.set_progress_bar_config(disable=True)
        like_comfyui.load(adapter, other, names, tensors)
        assert torch.allclose(export.probe(family.adapter(other)), wanted, atol=1e-4)
    own = "its own" if adapter.comfyui else "none known"
    note(name, "comfyui", adapter.comfyui if isinstance(adapter.comfyui, str) else own)
    lora.merge({n: adapter.trainable[n] for n in names})
    assert torch.allclose(export.probe(adapter), wanted, atol=1e-4)
    assert not any("lora" in path for n in names for path, _ in adapter.trainable[n].named_parameters())


def test_the_page_shows_these_results(request):
    """docs/parity.md is this run's outcome; whatever failed above is missing here."""
    if any(set(RESULTS.get(name, {})) != set(COLUMNS) for name in FAMILIES):
        pytest.skip("not every check has run and passed")
    rows = [[family.title, *(RESULTS[name][c] for c in COLUMNS)] for name, family in FAMILIES.items()]
    header = ["family", *COLUMNS.values()]
    table = [header, ["---"] * len(header), *rows]
    text = INTRODUCTION + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in table)
    if request.config.getoption("--write-pages"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, "run with --write-pages and commit docs/parity.md"


INTRODUCTION = """# Parity with diffusers

Written by `tests/pipelines/test_parity.py`. Every family is built from diffusers' real classes with small random
weights and the scheduler of its published checkpoint, in fp32. Checked: two prompts of different length in one batch,
two resolutions, every kind of guidance that the family has. *Image*: our roll-out with the same seeds against
`pipe(...)`. *Constants*: each is changed, and the check must fail. *Gradient*: of every weight of the denoiser through
all steps, with the graph kept and recomputed step by step. *SFT loss*: against diffusers' training scripts. *Names for
ComfyUI*: whose; every key of the export is one that ComfyUI's code accepts, as recorded from it in
`tests/pipelines/comfyui_names.json`.
"""
