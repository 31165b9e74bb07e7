"""Families x checks: the same images, gradients and losses as diffusers' own code. Writes docs/parity.md.

`python -m pytest tests/pipelines/test_parity.py --write-pages` renews the page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import like_comfyui
import parity
import pytest
import torch
from parity import PROMPTS, STEPS, Family, arguments, chain, generators, gradient, images_gradient, ours, reference
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rewardtune.build import find_family
from rewardtune.compare import reproduce
from rewardtune.compare.sampling import Plan, sample_sides
from rewardtune.compare.sides import Side
from rewardtune.diffusion.parameterisation import shares, training_pair
from rewardtune.diffusion.rollout import Chain
from rewardtune.errors import RecipeError
from rewardtune.gradients.draft import draft
from rewardtune.plugins import Guidance
from rewardtune.recipe.sections import PipelineSection
from rewardtune.types import Prompt

PAGE = Path(__file__).parents[2] / "docs/parity.md"
FAMILIES = parity.families()
RESULTS: dict[str, dict[str, str]] = {}
MISTAKES: dict[str, dict[str, None]] = {}
"""Checks -> labels of the mistakes that they noticed."""
COLUMNS = {
    "images": "image equals `pipe(...)`",
    "constants": "constants of the checkpoint whose change the image shows",
    "changes": "mistakes put into the adapter that each check noticed",
    "gradient": "full-chain gradient against autograd through the whole call",
    "differences": "finite differences, float64",
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


# The three checks that the page names, apart from the tests, so that mistakes can be put before the very same ones.


def check_image(family: Family, found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).abs().max()) <= family.bound


def check_gradient(found: Tensor, wanted: Tensor) -> None:
    assert wanted.isfinite().all() and wanted.norm() > 0
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5


class Formula(NamedTuple):
    """One batch of training by diffusers' own script."""

    clean: Tensor
    noise: Tensor
    u: Tensor
    prediction: Tensor
    target: Tensor
    images: Tensor
    latents: Tensor


def formula(family: Family, pipe) -> Formula:
    assert family.training is not None and family.latents is not None
    size = family.sizes[1]
    shape = family.adapter(pipe).noise(generators(), size).shape
    clean, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    u = torch.tensor([0.2, 0.9])
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        latents = family.latents(pipe, images)
    return Formula(clean, noise, u, *family.training(pipe, clean, noise, u, PROMPTS), images, latents)


def check_sft_loss(adapter, wanted: Formula) -> None:
    off = Guidance(mode="off")
    noisy, timesteps, target = training_pair(adapter.scheduler, wanted.clean, wanted.noise, wanted.u)
    with torch.no_grad():
        found = adapter.predict(noisy, timesteps, adapter.encode(PROMPTS, off), off)
    assert torch.allclose(found, wanted.prediction, rtol=1e-4, atol=1e-5)
    loss = float((found - target).pow(2).mean())
    assert loss == pytest.approx(float((wanted.prediction - wanted.target).pow(2).mean()), rel=1e-5)
    assert torch.allclose(adapter.encode_images(wanted.images), wanted.latents, atol=1e-5)


def test_rollout_equals_the_pipeline(name, family):
    pipe = family.make()
    images = []
    for case in family.cases:
        for size in family.sizes:
            adapter = family.adapter(pipe)
            # a batch of two prompts of different length, and no state left behind by the call before
            found, wanted = ours(adapter, case, size), reference(pipe, case, size)
            assert found.shape == wanted.shape == (2, 3, *size)
            check_image(family, found, wanted)
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


def test_a_mistake_in_the_adapter_is_noticed(name, family):
    """Each by every check that its method goes into; two steps, so that what only the second one sees is there."""
    case, size, steps = guided(family), family.sizes[0], 2
    pipe = family.make()
    # first, for the call leaves its own timesteps in the scheduler that the script reads
    wanted_loss = None if family.training is None else formula(family, pipe)
    wanted_images, wanted_gradient = images_gradient(
        family.adapter(pipe), lambda: parity.whole_call(pipe, case, size, steps)
    )

    encoded = {}

    def fresh():
        """An adapter that takes what another has encoded: frozen encoders were a quarter of this test's time."""
        adapter = family.adapter(pipe)
        own = adapter.encode

        def encode(prompts, guidance):
            key = (*prompts, guidance)
            if key not in encoded:
                encoded[key] = own(prompts, guidance)
            return encoded[key]

        adapter.encode = encode
        return adapter

    def notices(adapter, checks: Sequence[str]) -> set[str]:
        failed = set()
        if "image" in checks:
            images, found = images_gradient(
                adapter, lambda: adapter.decode(full_chain(adapter, case.guidance, size, "fast", steps=steps))
            )
            assert images.isfinite().all() and found.isfinite().all(), "a mistake that any check would notice"
            failed |= refused("image", check_image, family, images.clamp(0, 1), wanted_images.clamp(0, 1))
            failed |= refused("gradient", check_gradient, found, wanted_gradient)
        if "SFT loss" in checks and wanted_loss is not None:
            failed |= refused("SFT loss", check_sft_loss, adapter, wanted_loss)
        return failed

    assert not notices(fresh(), ("image", "gradient", "SFT loss")), "the adapter as it is"
    count = dict.fromkeys(("image", "gradient", "SFT loss"), 0)
    for change in parity.changes(fresh(), case.guidance):
        adapter = fresh()
        setattr(adapter, change.method, change.make(adapter))
        due = {check for check in change.noticed if check != "SFT loss" or wanted_loss is not None}
        assert notices(adapter, change.noticed) == due, change.label
        MISTAKES.setdefault(", ".join(change.noticed), {})[change.label] = None
        for check in due:
            count[check] += 1
    assert min(count["image"], count["gradient"]) >= 8
    note(name, "changes", ", ".join(f"{check} {number}" for check, number in count.items() if number))


def refused(name: str, check: Callable[..., None], *inputs) -> set[str]:
    try:
        check(*inputs)
    except AssertionError:
        return {name}
    return set()


def test_full_chain_gradient_equals_autograd_through_the_call(name, family, monkeypatch):
    pipe = family.make()
    size, case = family.sizes[0], guided(family)
    adapter = family.adapter(pipe)
    _, wanted = images_gradient(adapter, lambda: parity.whole_call(pipe, case, size))
    for memory, few in (("fast", 0.1), ("flat", 0.1), ("flat", 1.0)):
        monkeypatch.setattr("rewardtune.diffusion.recompute.FEW", few)  # all weights are trained here
        found = gradient(adapter, lambda memory=memory: full_chain(adapter, case.guidance, size, memory))
        check_gradient(found, wanted)
    note(name, "gradient", "within 1e-5")
    with torch.no_grad():
        latents = pipe(**arguments(case, size), output_type="latent").images
        latents = latents if family.unpack is None else family.unpack(pipe, latents, size)
        assert torch.allclose(full_chain(adapter, case.guidance, size, "fast"), latents, atol=max(1e-6, family.bound))


def full_chain(adapter, guidance, size, memory, last_steps="all", steps=STEPS):
    noise = adapter.noise(generators(), size)
    return draft(chain(adapter, guidance, size, steps=steps), noise, None, last_steps=last_steps, memory=memory).latents


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
    """In float64, along random directions: in all weights, and in single ones that LoRA adapts, the first and the last.

    The error is measured by what a random direction makes of a gradient of this norm, norm / sqrt(weights), and not by
    the slope itself, which may be next to nothing by chance: a gradient wrong by this share in any way is noticed.
    """
    case, size = guided(family), family.sizes[0]
    pipe = family.make().to(torch.float64)
    with parity.double():
        adapter = family.adapter(pipe)
        found, kept = (
            gradient(adapter, lambda m=m: full_chain(adapter, case.guidance, size, m)) for m in ("flat", "fast")
        )
        assert found.dtype == torch.float64 and (found - kept).norm() <= 1e-12 * kept.norm()
        weights = parity.parameters(adapter)
        start = parameters_to_vector(weights).clone()
        conditioning, noise = adapter.encode(PROMPTS, case.guidance), adapter.noise(generators(), size)

        def value(offset: Tensor) -> float:
            vector_to_parameters(start + offset, weights)
            # a chain of its own: a multistep scheduler remembers the predictions of other weights
            steps = Chain(adapter, conditioning, num_steps=STEPS, guidance=case.guidance, size=size)
            latents = draft(steps, noise, None, last_steps="all", memory="fast").latents
            return float(adapter.decode(latents).pow(2).mean())

        adapted = adapted_weights(adapter, found)
        for seed, part in enumerate([slice(None), adapted[0], adapted[-1]]):
            direction = torch.zeros_like(found)
            entries = direction[part]
            entries.normal_(generator=torch.Generator().manual_seed(seed))
            direction /= direction.norm()
            step = family.difference / 100
            with torch.no_grad():
                quotient = (value(step * direction) - value(-step * direction)) / (2 * step)
            error = abs(quotient - float(found @ direction)) * len(entries) ** 0.5 / float(found[part].norm())
            assert error <= 1e-6, f"direction {seed}: {error}"
    note(name, "differences", "within 1e-6")


def adapted_weights(adapter, found: Tensor) -> list[slice]:
    """Where in the flat gradient the weights are that LoRA adapts by default; some have no part in the image, such as
    those behind a last block's text, and no gradient."""
    targets, parts, start = tuple(f".{t}.weight" for t in adapter.lora_targets[adapter.denoiser]), [], 0
    for path, weight in adapter.trainable[adapter.denoiser].named_parameters():
        part = slice(start, start := start + weight.numel())
        if f".{path}".endswith(targets) and found[part].any():
            parts.append(part)
    return parts


def test_sft_loss_equals_the_training_formula_of_diffusers(name, family):
    if family.training is None:
        note(name, "sft", "not offered")
        return
    pipe = family.make()
    check_sft_loss(family.adapter(pipe), formula(family, pipe))
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
    mistakes = "; ".join(f"by {checks}: {', '.join(labels)}" for checks, labels in MISTAKES.items())
    text = (
        INTRODUCTION
        + "\n"
        + textwrap.fill(f"Mistakes noticed {mistakes}.", 120)
        + "\n\n"
        + "".join(f"| {' | '.join(row)} |\n" for row in table)
    )
    if request.config.getoption("--write-pages"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, "run with --write-pages and commit docs/parity.md"


INTRODUCTION = """# Parity with diffusers

Written by `tests/pipelines/test_parity.py`. Every family is built from diffusers' real classes with small random
weights and the scheduler of its published checkpoint, in fp32. Checked: two prompts of different length in one batch,
two resolutions, every kind of guidance that the family has. *Image*: our roll-out with the same seeds against
`pipe(...)`. *Constants*: each is changed in the checkpoint, and the image must differ from the unchanged one's.
*Mistakes*: each is put into the adapter's own code path, and every check that the path goes into must fail: image,
gradient and SFT loss as in their columns, at two steps. *Gradient*: of every weight of the denoiser through all steps
and the decoder, with the graph kept and recomputed step by step. *Finite differences*: of that gradient in float64,
along a random direction in all weights and one each in the first and the last weight that LoRA adapts; the error is
over the slope that a random direction has on average, the gradient's norm / sqrt(weights). *SFT loss*: prediction, loss
and the images' latents against diffusers' training scripts. *Names for ComfyUI*: whose; every key of the export is one
that ComfyUI's code accepts, as recorded from it in `tests/pipelines/comfyui_names.json`.
"""
