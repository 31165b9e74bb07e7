"""What a family's call reads and no checkpoint under `families/` sets: the same image still, also in a comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import parity
import pytest
import tiny
import torch
from parity import Case
from PIL import Image
from rewardtune.pipelines.generic import Generic
from rewardtune.pipelines.pixart_sigma import PixArtSigma
from rewardtune.pipelines.stable_diffusion_3 import StableDiffusion3
from rewardtune.pipelines.stable_diffusion_xl import StableDiffusionXL

from rewardtune import gradients
from rewardtune.build import build_task
from rewardtune.compare import reproduce
from rewardtune.compare.sampling import Plan, sample_sides
from rewardtune.compare.sides import resolve_sides
from rewardtune.diffusion import export, lora
from rewardtune.diffusion.rollout import sample
from rewardtune.errors import RecipeError
from rewardtune.plugins import Guidance, RewardCard
from rewardtune.recipe.sections import DirectRewardRecipe
from rewardtune.scoring.reward_set import RewardSet, Term
from rewardtune.tasks.direct_reward import DirectReward
from rewardtune.types import Prompt, Score

GUIDED = Guidance("full", 3.0)


def euler(**settings):
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


def distilled():
    return tiny.stable_diffusion_xl(euler(), unet={"time_cond_proj_dim": 8})


def zero_snr():
    # the largest sigma is 4096, and with these timesteps the chain starts at it
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return tiny.stable_diffusion_xl(euler(**settings))


def shifted_by_size():
    return tiny.stable_diffusion_3(scheduler={"use_dynamic_shifting": True, "base_image_seq_len": 8})


VARIANTS = {
    "xl, guidance as an input": (StableDiffusionXL, {}, distilled, Guidance("full", 3.0, embedded=2.5), 2.5),
    "xl, its default": (StableDiffusionXL, {}, distilled, Guidance("off"), None),
    "xl, zero terminal SNR": (StableDiffusionXL, {}, zero_snr, GUIDED, 3.0),
    "xl, layers left out": (
        StableDiffusionXL,
        {"clip_skip": 1},
        lambda: tiny.stable_diffusion_xl(euler()),
        GUIDED,
        3.0,
    ),
    "3, shift by size": (StableDiffusion3, {}, shifted_by_size, GUIDED, 3.0),
    "3, without T5": (StableDiffusion3, {"t5": False}, lambda: tiny.stable_diffusion_3(t5=False), GUIDED, 3.0),
    "3, few tokens": (StableDiffusion3, {"max_sequence_length": 5}, tiny.stable_diffusion_3, GUIDED, 3.0),
    "pixart, few tokens": (PixArtSigma, {"max_sequence_length": 5}, tiny.pixart_sigma, GUIDED, 3.0),
}
LATER = {"clip_skip", "max_sequence_length"}
"""Options that are arguments of the call; others choose what is loaded."""


@pytest.mark.parametrize("name", VARIANTS)
def test_the_image_is_that_of_the_call(name):
    family, options, make, guidance, scale = VARIANTS[name]
    pipe = make()
    call = {} if scale is None else {"guidance_scale": scale}
    call |= {k: v for k, v in options.items() if k in LATER}
    call |= {"use_resolution_binning": False} if family is PixArtSigma else {}
    adapter = family(pipe, family.Config(**options))
    for size in ((16, 16), (16, 24)):
        case = Case(name, guidance, call)
        assert torch.equal(parity.ours(adapter, case, size), parity.reference(pipe, case, size))
    assert {k: v for k, v in adapter.call(guidance).items() if k in call} == call


def test_options_matter():
    """Otherwise the equalities above would say little."""
    case = Case("", GUIDED, {})
    for name in ("xl, layers left out", "3, without T5", "3, few tokens", "pixart, few tokens"):
        family, options, make, *_ = VARIANTS[name]
        plain = tiny.stable_diffusion_3() if name == "3, without T5" else make()
        found = parity.ours(family(make(), family.Config(**options)), case, (16, 16))
        assert not torch.allclose(found, parity.ours(family(plain), case, (16, 16)), atol=1e-3), name


@pytest.mark.parametrize(
    ("family", "options", "make", "lines"),
    [
        (
            PixArtSigma, {}, tiny.pixart_sigma,
            ['pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "path/to/this/folder")'],
        ),
        (
            StableDiffusion3, {"t5": False}, tiny.stable_diffusion_3,
            [", text_encoder_3=None, tokenizer_3=None)", 'pipe.load_lora_weights("path/to/this/folder")'],
        ),
    ],
)  # fmt: skip
def test_a_comparison_with_its_adapters_can_be_drawn_again(family, options, make, lines, tmp_path, monkeypatch):
    """diffusers has no loader for PixArt's adapters; SD 3 is trained without a text encoder that its checkpoint has."""
    base, run = tmp_path / "base", tmp_path / "run"
    make().save_pretrained(base)
    (run / "export").mkdir(parents=True)
    adapter = family.load(str(base), family.Config(**options), revision=None, dtype=torch.float32, device="cpu")
    modules = {"transformer": adapter.pipe.transformer}
    lora.attach(modules, rank=2, alpha=6, targets=adapter.lora_targets)
    for path, parameter in adapter.pipe.transformer.named_parameters():
        if "lora_B" in path:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(path)))
    export.lora(adapter, ["transformer"], run / "export", {"name": "test"}, base=str(base))
    card = (run / "export" / "README.md").read_text()
    assert all(line in card for line in lines)
    write_recipe(run, base, options)
    # the start last, so that the adapters have to come off again
    sides = resolve_sides([run, f"{run}@1", f"{run}@0.5", f"{run}@linear", f"{run}@0", "base"])
    assert [side.name for side in sides] == ["run", "run-1", "run-0.5", "run-linear", "run-0", "base"]
    plan = Plan((Prompt("dog"), Prompt("red cat")), seeds=1, steps=2, guidance_scale=2.0, batch_size=2, size=(16, 16))
    sample_sides(sides, plan, tmp_path / "out", device="cpu")
    pictures = [(tmp_path / "out/images" / side.name / "0000-0.png").read_bytes() for side in sides]
    assert pictures[0] == pictures[1] and pictures[4] == pictures[5] and len(set(pictures)) == 4
    shutil.copy(Path(reproduce.__file__), tmp_path / "out")
    monkeypatch.setattr(reproduce, "HERE", tmp_path / "out")
    assert [reproduce.draw(side.name) for side in sides] == [0] * 6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("base@0.5", "base has no adapters"),
        ("run@1.5", "a number from 0"),
        ("run@cosine", "a number from 0"),
    ],
)
def test_a_scale_that_says_nothing_is_named(given, said, tmp_path, monkeypatch):
    tiny.pixart_sigma().save_pretrained(tmp_path / "base")
    (tmp_path / "run/export").mkdir(parents=True)
    write_recipe(tmp_path / "run", tmp_path / "base", {})
    (tmp_path / "run/export/adapter_model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=said):
        resolve_sides([f"./{given}", "base"])


def test_adapters_of_a_whole_rollout_cannot_be_annealed():
    pipeline = Generic(tiny.pixart_sigma())
    with pytest.raises(RecipeError, match=r"PixArtSigmaPipeline as a whole.*in place of `linear`"):
        sample(pipeline, ["dog"], parity.generators(1), num_steps=2, guidance=GUIDED, size=(16, 16), annealed=True)


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_at_a_scale_is_the_run_at_that_scale(merge, tmp_path, monkeypatch):
    """A run of one step, in bfloat16; its adapters are then made large enough to be seen."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    from rewardtune.recipe.file import load_recipe
    from rewardtune.training.run import export_run, train_recipe

    base = tmp_path / "base"
    tiny.z_image().save_pretrained(base)
    (tmp_path / "prompts.txt").write_text("dog\n")
    (tmp_path / "r.yaml").write_text(
        "task: sft\n"
        f"pipeline: {{model: {base}, dtype: bfloat16}}\nlora: {{rank: 2, alpha: 3}}\n"
        f"data: {{manifest: {tmp_path}/rows.jsonl, cache_latents: false}}\n"
        "train: {steps: 1, device: cpu, precision: bf16}\noptimizer: {lr: 0.1}\n"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a dog"}) + "\n")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    run = train_recipe(load_recipe(str(tmp_path / "r.yaml")), out=tmp_path / "run")
    with pytest.raises(RecipeError, match=r"--scale 1\.5"):
        export_run(run, scale=1.5)
    folder = export_run(run, scale=0.5, merge=merge)
    whole = load_file(run / "export" / export.LORA_FILE)
    assert any(t.any() for name, t in whole.items() if "lora_B" in name)
    if not merge:
        assert folder == run / "export-0.5"
        for name, tensor in load_file(folder / export.LORA_FILE).items():
            assert torch.equal(tensor, whole[name] * (0.5 if "lora_B" in name else 1.0))
        return
    assert folder == run / "export-merged-0.5"
    merged = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    start = tiny.z_image()
    changed = 0
    for name, weight in start.transformer.named_parameters():
        path = name.removesuffix(".weight")
        new = merged.transformer.get_parameter(name)
        a, b = whole.get(f"transformer.{path}.lora_A.weight"), whole.get(f"transformer.{path}.lora_B.weight")
        # in float32, though the run's frozen weights were bfloat16
        assert torch.allclose(new, weight if a is None else weight + 0.5 * b @ a, atol=1e-6)
        changed += a is not None
    assert changed


def test_a_denoiser_that_cannot_be_compiled_is_named(tmp_path):
    tiny.pixart_sigma().save_pretrained(tmp_path / "base")
    write_recipe(tmp_path, tmp_path / "base", {})
    recipe = json.loads((tmp_path / "recipe.json").read_text())["recipe"]
    recipe["train"]["compile"] = True
    with pytest.raises(RecipeError, match=r"train\.compile.*PixArtTransformer2DModel"):
        build_task(DirectRewardRecipe(**recipe), device="cpu")


def write_recipe(run: Path, base: Path, options: dict) -> None:
    recipe = {
        "task": "direct_reward", "pipeline": {"model": str(base), "options": options}, "lora": {"rank": 2},
        "data": {"prompts": "unused.txt"}, "gradient": {"method": "draft"}, "rewards": [{"name": "unused"}],
        "train": {"steps": 1},
    }  # fmt: skip
    (run / "recipe.json").write_text(json.dumps({"recipe": recipe}))


class Redness:
    card = RewardCard("redness", "red minus blue", differentiable=True, needs_prompt=False, range=(-1, 1))

    def score(self, images, prompts):
        return Score((images[:, 0] - images[:, 2]).mean((1, 2)))


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_reward_trains_either_text_encoder_alone(name):
    adapter = StableDiffusionXL(tiny.stable_diffusion_xl(euler()))
    modules = {name: adapter.trainable[name]}
    lora.attach(modules, rank=2, targets=adapter.lora_targets)
    for path, parameter in modules[name].named_parameters():
        if "lora_B" in path:
            parameter.data.fill_(0.1)
    method = gradients.load_method("draft")
    task = DirectReward(
        adapter, trainable=modules, prompts=[Prompt("dog")], rewards=RewardSet([Term(Redness())]),
        method=lambda c, n, r: method(c, n, r, last_steps=1, memory="flat"), num_steps=2,
        guidance=Guidance("detached-negative", 2.0), size=(16, 16), seed=0, augmentation=None, samples=lambda: None,
        export=lambda *_: None,
    )  # fmt: skip
    task.step(task.batch(0, [0])).loss.backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for p in modules[name].parameters())
