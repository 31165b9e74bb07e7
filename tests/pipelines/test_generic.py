"""`pipeline.family: generic`: pipelines that have no file of ours, run as a whole, with the gradient of their own call.

Real classes with small random weights and the schedulers of the published checkpoints, in fp32.
"""

from __future__ import annotations

import inspect
import random

import diffusers
import pytest
import tiny
import torch
from parity import PROMPTS, STEPS, chain, generators, gradient
from rewardtune.pipelines.generic import Generic
from rewardtune.pipelines.stable_diffusion import StableDiffusion
from rewardtune.pipelines.z_image import ZImage

from rewardtune import gradients
from rewardtune.build import build_task, find_family, load_pipeline
from rewardtune.diffusion import export, lora
from rewardtune.diffusion.rollout import sample
from rewardtune.errors import RecipeError
from rewardtune.gradients.alignprop import alignprop
from rewardtune.gradients.draft import choice, draft
from rewardtune.plugins import Guidance, RewardCard, WholeRollout
from rewardtune.recipe.file import load_recipe
from rewardtune.recipe.sections import PipelineSection
from rewardtune.scoring.reward_set import RewardSet, Term
from rewardtune.tasks.direct_reward import DirectReward
from rewardtune.types import Prompt, Score

SIZES = ((16, 16), (16, 32))
OFF = Guidance("off")


# ---------------------------------------------------------------------------------------------------------- pipelines


def t5():
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0))


def aura_flow():
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return tiny.ready(
        diffusers.AuraFlowPipeline(
            tokenizer=tiny.words(), text_encoder=UMT5EncoderModel(UMT5Config(**sizes)),
            vae=tiny.autoencoder(scaling_factor=0.6),
            transformer=diffusers.AuraFlowTransformer2DModel(
                sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=256,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )  # fmt: skip


def pixart_alpha():
    torch.manual_seed(0)
    return tiny.ready(
        diffusers.PixArtAlphaPipeline(
            tokenizer=tiny.words(), text_encoder=t5(), vae=tiny.autoencoder(scaling_factor=0.6),
            transformer=diffusers.PixArtTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
                cross_attention_dim=16, sample_size=8, caption_channels=16, use_additional_conditions=False,
            ),
            scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        )
    )  # fmt: skip


def cog_view_4():
    from transformers import GlmConfig, GlmModel

    torch.manual_seed(0)
    text = GlmConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    return tiny.ready(
        diffusers.CogView4Pipeline(
            tokenizer=tiny.words(), text_encoder=GlmModel(text), vae=tiny.autoencoder(scaling_factor=0.6),
            transformer=diffusers.CogView4Transformer2DModel(
                in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
                text_embed_dim=16, time_embed_dim=8, condition_dim=4, sample_size=8,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True,
                time_shift_type="linear",
            ),
        )
    )  # fmt: skip


def chroma():
    torch.manual_seed(0)
    return tiny.ready(
        diffusers.ChromaPipeline(
            tokenizer=tiny.words(), text_encoder=t5(), vae=tiny.autoencoder(scaling_factor=0.6, shift_factor=0.1),
            transformer=diffusers.ChromaTransformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=16, axes_dims_rope=(4, 2, 2), approximator_num_channels=8,
                approximator_hidden_dim=16, approximator_layers=1,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        )
    )  # fmt: skip


def ovis_image():
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    text = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return tiny.ready(
        diffusers.OvisImagePipeline(
            tokenizer=tiny.words(chat_template="{% for m in messages %}a {{ m['content'] }}{% endfor %}"),
            text_encoder=Qwen3Model(text), vae=tiny.autoencoder(scaling_factor=0.6, shift_factor=0.1),
            transformer=diffusers.OvisImageTransformer2DModel(
                in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 2, 2),
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )  # fmt: skip


def flux():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=0, projection_dim=16,
    )  # fmt: skip
    return tiny.ready(
        diffusers.FluxPipeline(
            tokenizer=tiny.words(length=16), text_encoder=CLIPTextModel(text), tokenizer_2=tiny.words(),
            text_encoder_2=t5(), vae=tiny.autoencoder(scaling_factor=0.6, shift_factor=0.1),
            transformer=diffusers.FluxTransformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 2, 2), guidance_embeds=True,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )
    )  # fmt: skip


def stable_diffusion(scheduler=None):
    return tiny.stable_diffusion(
        scheduler
        or diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        )
    )


def noisy():
    """Draws noise in every step."""
    return stable_diffusion(
        diffusers.EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    )


def perturbed():
    """Puts attention processors of its own into the denoiser for the time of its call."""
    parts = stable_diffusion(euler()).components
    pipe = diffusers.StableDiffusionPAGPipeline(
        **parts, pag_applied_layers="down_blocks.0.attentions.0", requires_safety_checker=False
    )
    return tiny.ready(pipe)


def sana_sprint():
    """Leaves the last of its scheduler's steps out, and embeds its guidance."""
    from families.sana import make

    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=32, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
        sample_size=8, guidance_embeds=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    parts = {**make().components, "transformer": transformer, "scheduler": diffusers.SCMScheduler()}
    return tiny.ready(diffusers.SanaSprintPipeline(**parts))


def hunyuan_image(guider=None, **transformer):
    """Guides by a part of its own."""
    from families.qwen_image import tokenizer
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 2, "eos_token_id": 3,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
            spatial_compression_ratio=2, sample_size=16, scaling_factor=0.6,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tiny.words(),
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(4, 4),
            **transformer,
        ),
        guider=guider,
    )  # fmt: skip
    pipe.tokenizer_max_length = 40
    return tiny.ready(pipe)


def deep_floyd():
    """Draws pixels without a decoder, and converts them for pictures only."""
    torch.manual_seed(0)
    return tiny.ready(
        diffusers.IFPipeline(
            tokenizer=tiny.words(length=77), text_encoder=t5(), safety_checker=None, feature_extractor=None,
            watermarker=None, requires_safety_checker=False,
            unet=diffusers.UNet2DConditionModel(
                sample_size=16, in_channels=3, out_channels=6, layers_per_block=1, block_out_channels=(8, 16),
                norm_num_groups=4, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=16, attention_head_dim=4,
                up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), encoder_hid_dim=16,
                resnet_time_scale_shift="scale_shift", only_cross_attention=True,
            ),
            scheduler=diffusers.DDPMScheduler(
                variance_type="learned_range", beta_schedule="squaredcos_cap_v2", thresholding=True
            ),
        )
    )  # fmt: skip


def euler():
    return diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def heun():
    return diffusers.HeunDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


FOREIGN = {
    "aura_flow": (aura_flow, {}),
    # it would draw at one of its own sizes and resize
    "pixart_alpha": (pixart_alpha, {"use_resolution_binning": False}),
    "cog_view_4": (cog_view_4, {}),
    "chroma": (chroma, {"max_sequence_length": 32}),
    "ovis_image": (ovis_image, {"max_sequence_length": 64}),
    # takes true_cfg_scale beside the guidance that its transformer embeds
    "flux": (flux, {"max_sequence_length": 32}),
    "noisy": (noisy, {}),
    "perturbed": (perturbed, {}),
}
"""Pipelines that the adapter knows nothing of, and options of their call."""


@pytest.fixture(params=FOREIGN)
def foreign(request):
    make, call = FOREIGN[request.param]
    return Generic(make(), Generic.Config(call=call))


def arguments(adapter, guidance, size=SIZES[0]):
    call = adapter.call(guidance)
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * len(PROMPTS)
    return {
        "prompt": list(PROMPTS), "height": size[0], "width": size[1], "num_inference_steps": STEPS,
        "generator": generators(), "output_type": "pt", **call,
    }  # fmt: skip


def roll_out(adapter, guidance, last_steps="all", memory="fast", size=SIZES[0]):
    return adapter.rollout(
        PROMPTS, generators(), num_steps=STEPS, guidance=guidance, size=size,
        **choice(None, last_steps=last_steps, memory=memory)._asdict(),
    )  # fmt: skip


class Raw:
    """What `parity.gradient` asks of an adapter, for runs that end in images."""

    def __init__(self, adapter):
        self.trainable, self.denoiser = adapter.trainable, adapter.denoiser

    def decode(self, images):
        return images


def difference(found, wanted):
    assert wanted.isfinite().all() and wanted.norm() > 0
    return float((found - wanted).norm() / wanted.norm())


# ----------------------------------------------------------------------------------------------- images and gradients


@pytest.mark.parametrize("guidance", [OFF, Guidance("full", 3.0), Guidance("full", 3.0, "red")], ids=str)
def test_images_equal_the_pipelines(foreign, guidance):
    for size in SIZES:
        found = sample(foreign, PROMPTS, generators(), num_steps=STEPS, guidance=guidance, size=size)
        wanted = foreign.pipe(**arguments(foreign, guidance, size)).images
        assert found.shape == (2, 3, *size)
        assert torch.equal(found, wanted)
    assert not torch.equal(roll_out(foreign, guidance), roll_out(foreign, Guidance("full", 2.0, "dog")))


@pytest.mark.parametrize("memory", ["fast", "flat"])
def test_full_chain_gradient_equals_autograd_through_the_call(foreign, memory):
    guidance = Guidance("full", 3.0)
    call = type(foreign.pipe).__call__.__wrapped__
    wanted = gradient(Raw(foreign), lambda: call(foreign.pipe, **arguments(foreign, guidance)).images)
    found = gradient(Raw(foreign), lambda: roll_out(foreign, guidance, memory=memory))
    assert difference(found, wanted) <= 1e-5


@pytest.mark.parametrize("memory", ["fast", "flat"])
def test_gradient_of_the_last_steps_is_that_of_a_call_cut_before_them(foreign, memory):
    """The pipelines' own callback can cut: it may give latents back."""
    if "callback_on_step_end" not in inspect.signature(type(foreign.pipe).__call__).parameters:
        pytest.skip("the pipeline has no callback")
    guidance = Guidance("full", 3.0)
    call = type(foreign.pipe).__call__.__wrapped__

    def cut(pipe, i, timestep, kwargs):
        return {"latents": kwargs["latents"].detach() if i == 1 else kwargs["latents"]}

    wanted = gradient(
        Raw(foreign), lambda: call(foreign.pipe, **arguments(foreign, guidance), callback_on_step_end=cut).images
    )
    whole = gradient(Raw(foreign), lambda: roll_out(foreign, guidance, memory=memory))
    found = gradient(Raw(foreign), lambda: roll_out(foreign, guidance, STEPS - 2, memory))
    assert difference(found, wanted) <= 1e-5
    assert difference(whole, wanted) > 1e-3


def test_steps_that_the_call_leaves_out_do_not_count():
    call = {"use_resolution_binning": False, "intermediate_timesteps": None, "complex_human_instruction": None}
    adapter, guidance, size = Generic(sana_sprint(), Generic.Config(call=call)), Guidance("full", 3.0), (32, 32)

    def cut(pipe, i, timestep, kwargs):
        return {"latents": kwargs["latents"].detach() if i == STEPS - 2 else kwargs["latents"]}

    plain = type(adapter.pipe).__call__.__wrapped__
    wanted = gradient(
        Raw(adapter),
        lambda: plain(adapter.pipe, **arguments(adapter, guidance, size), callback_on_step_end=cut).images,
    )
    for memory in ("fast", "flat"):
        found = gradient(Raw(adapter), lambda memory=memory: roll_out(adapter, guidance, 1, memory, size))
        assert difference(found, wanted) <= 1e-5


DEDICATED = {
    "stable_diffusion": (StableDiffusion, stable_diffusion, Guidance("full", 3.0, "red")),
    # the first and the second order have more steps than were asked for
    "stable_diffusion, Euler": (StableDiffusion, lambda: stable_diffusion(euler()), Guidance("full", 3.0)),
    "stable_diffusion, Heun": (StableDiffusion, lambda: stable_diffusion(heun()), Guidance("full", 3.0)),
    "z_image": (ZImage, tiny.z_image, Guidance("full", 2.0, "red")),
    "z_image, unguided": (ZImage, tiny.z_image, OFF),
}


@pytest.mark.parametrize("case", DEDICATED)
@pytest.mark.parametrize("last_steps", [1, 2, "all"])
def test_gradient_equals_that_of_the_familys_own_adapter(case, last_steps):
    family, make, guidance = DEDICATED[case]
    pipe = make()
    own, generic = family(pipe), Generic(pipe)
    assert isinstance(generic, WholeRollout) and not isinstance(own, WholeRollout) and not hasattr(generic, "predict")
    images = [
        sample(a, PROMPTS, generators(), num_steps=STEPS, guidance=guidance, size=SIZES[0]) for a in (own, generic)
    ]
    assert torch.equal(*images)

    def step_by_step():
        steps = chain(own, guidance, SIZES[0])
        finished = draft(steps, own.noise(generators(), SIZES[0]), None, last_steps=last_steps, memory="fast")
        return own.decode(finished.latents).clamp(0, 1)

    wanted = gradient(Raw(own), step_by_step)
    for memory in ("fast", "flat"):
        found = gradient(Raw(generic), lambda memory=memory: roll_out(generic, guidance, last_steps, memory))
        assert difference(found, wanted) <= 1e-5


@pytest.mark.parametrize("case", DEDICATED)
@pytest.mark.parametrize("memory", ["fast", "flat"])
def test_a_random_cut_is_the_one_of_the_familys_own_adapter(case, memory):
    """AlignProp draws from the steps that the scheduler has, which are more than were asked for with some."""
    family, make, guidance = DEDICATED[case]
    pipe = make()
    own, generic = family(pipe), Generic(pipe)
    settings = {"longest": 1.0, "memory": memory}
    lengths = set()
    for seed in range(6):

        def step_by_step(seed=seed):
            drawn = gradients.Draws(random.Random(seed), [])
            steps = chain(own, guidance, SIZES[0])
            return own.decode(alignprop(steps, own.noise(generators(), SIZES[0]), drawn, **settings).latents).clamp(
                0, 1
            )

        def whole(seed=seed):
            chosen = gradients.load_choice("alignprop", **settings)(gradients.Draws(random.Random(seed), []))

            def steps(total):
                lengths.add(len(found := chosen.gradient_steps(total)))
                return found

            return generic.rollout(
                PROMPTS, generators(), num_steps=STEPS, guidance=guidance, size=SIZES[0], gradient_steps=steps,
                recompute=chosen.recompute,
            )  # fmt: skip

        assert difference(gradient(Raw(generic), whole), gradient(Raw(own), step_by_step)) <= 1e-5
    total = len(chain(own, guidance, SIZES[0]))
    assert len(lengths) > 2 and max(lengths) <= total


def test_values_from_minus_one_are_converted_as_the_pipeline_does_it_for_pictures():
    guidance, call = Guidance("full", 3.0), {"clean_caption": False}
    adapter = Generic(deep_floyd(), Generic.Config(signed=True, call=call))
    pictures = adapter.pipe(**{**arguments(adapter, guidance), "output_type": "np"}).images
    assert torch.equal(roll_out(adapter, guidance).permute(0, 2, 3, 1), torch.from_numpy(pictures))
    plain = type(adapter.pipe).__call__.__wrapped__
    wanted = gradient(
        Raw(adapter), lambda: (plain(adapter.pipe, **arguments(adapter, guidance)).images / 2 + 0.5).clamp(0, 1)
    )
    for memory in ("fast", "flat"):
        found = gradient(Raw(adapter), lambda memory=memory: roll_out(adapter, guidance, memory=memory))
        assert difference(found, wanted) <= 1e-5
    with pytest.raises(RecipeError, match=r"values from -1 to 1 .*write pipeline\.options\.signed: true"):
        roll_out(Generic(adapter.pipe, Generic.Config(call=call)), guidance)


def test_transparency_shows_white():
    adapter = changed(image(lambda images: torch.cat([images, images[:, :1]], 1)))
    opaque = roll_out(changed(image(lambda images: images)), OFF)
    assert torch.allclose(roll_out(adapter, OFF), opaque * opaque[:, :1] + 1 - opaque[:, :1], atol=1e-6)


def test_a_size_among_the_settings_of_the_pipeline_counts_pixels():
    pipe = stable_diffusion()
    pipe.register_to_config(default_sample_size=24)
    assert Generic(pipe).image_size == (24, 24)


def test_only_the_chosen_steps_record_and_are_run_again():
    adapter = Generic(aura_flow())
    denoiser = adapter.trainable["transformer"].requires_grad_(True)
    seen = []
    denoiser.context_embedder.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for memory, again in (("fast", 0), ("flat", 2)):
        images = roll_out(adapter, OFF, 2, memory)
        assert seen == [False] * (STEPS - 2) + [True] * 2
        seen.clear()
        images.sum().backward()
        assert len(seen) == again
        seen.clear()
    with torch.no_grad():
        roll_out(adapter, OFF)
    assert seen == [False] * STEPS


def test_the_pipeline_is_left_as_it_was():
    pipe = aura_flow()
    adapter = Generic(pipe)
    adapter.trainable["transformer"].requires_grad_(True)
    scheduler, before = pipe.scheduler, dict(vars(pipe.scheduler))
    roll_out(adapter, OFF, 1, "flat")
    with pytest.raises(RecipeError):
        adapter.rollout(
            PROMPTS, generators(), num_steps=STEPS, guidance=OFF, size=(17, 16), gradient_steps=range,
            recompute=False,
        )  # fmt: skip
    assert pipe.scheduler is scheduler and vars(scheduler) == before
    assert "forward" not in vars(pipe.transformer) and "decode" not in vars(pipe.vae)


def test_a_call_does_not_depend_on_the_one_before():
    adapter = Generic(pixart_alpha(), Generic.Config(call={"use_resolution_binning": False}))
    first = roll_out(adapter, OFF)
    adapter.pipe(**{**arguments(adapter, OFF), "num_inference_steps": 7})
    assert torch.equal(roll_out(adapter, OFF), first)


def test_what_a_call_draws_beside_its_generators_follows_from_their_seeds():
    adapter = changed(image(lambda images: (images + torch.rand(()) / 10).clamp(0, 1)))
    before = torch.get_rng_state()
    first, second = roll_out(adapter, OFF), roll_out(adapter, OFF)
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------- guidance


def test_guidance_is_said_in_the_calls_own_words():
    plain, from_zero = Generic(aura_flow()), Generic(tiny.z_image())
    assert plain.call(OFF) == {"guidance_scale": 1.0}
    assert from_zero.call(OFF) == {"guidance_scale": 0.0}  # where 1 would guide
    assert plain.call(Guidance("full", 4.0)) == {"guidance_scale": 4.0}
    assert plain.call(Guidance("full", 4.0, "red")) == {"guidance_scale": 4.0, "negative_prompt": "red"}
    assert plain.call(Guidance("off", 4.0, "red")) == {"guidance_scale": 1.0}
    true = Generic(flux())
    assert true.call(OFF) == {"true_cfg_scale": 1.0}
    assert true.call(Guidance("off", embedded=2.5)) == {"true_cfg_scale": 1.0, "guidance_scale": 2.5}
    assert true.call(Guidance("full", 4.0)) == {"true_cfg_scale": 4.0, "negative_prompt": ""}
    images = [roll_out(true, g) for g in (OFF, Guidance("off", embedded=2.5), Guidance("full", 4.0))]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_a_distilled_denoiser_takes_its_guidance_under_the_name_that_the_call_has_for_it():
    sprint = Generic(sana_sprint())
    for mode in ("off", "full"):
        assert sprint.call(Guidance(mode, 3.0)) == {}  # its own default
        assert sprint.call(Guidance(mode, 3.0, embedded=2.0)) == {"guidance_scale": 2.0}
    distilled = Generic(hunyuan_image(guidance_embeds=True))
    assert distilled.call(Guidance("off", embedded=2.0)) == {"distilled_guidance_scale": 2.0}
    assert Generic(aura_flow()).call(Guidance("off", embedded=2.0)) == {"guidance_scale": 1.0}


def test_parts_that_guide_are_off_where_guidance_is_and_have_the_scale_that_was_asked_for():
    pipe = hunyuan_image(diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    adapter, own = Generic(pipe), pipe.guider
    guided = roll_out(adapter, Guidance("full", 3.0))
    assert torch.equal(guided, pipe(**arguments(adapter, Guidance("full", 3.0))).images)
    unguided = roll_out(adapter, OFF)
    assert not torch.equal(guided, unguided) and pipe.guider is own
    pipe.guider.disable()
    assert torch.equal(unguided, pipe(**arguments(adapter, OFF)).images)
    assert adapter.call(Guidance("full", 1.0)) == {}
    with pytest.raises(RecipeError, match=r"no part of it guides; write rollout\.guidance: off"):
        adapter.call(Guidance("full", 3.0))
    pipe.guider.enable()
    with pytest.raises(RecipeError, match="its part guider by 3 guides it, so give that scale"):
        adapter.call(Guidance("full", 4.0))


def test_a_branch_without_gradient_is_refused():
    with pytest.raises(RecipeError, match=r"AuraFlowPipeline runs as a whole.*rollout\.guidance: full, or off"):
        Generic(aura_flow()).call(Guidance("detached-negative", 3.0))


def test_options_of_the_call():
    adapter = Generic(aura_flow(), Generic.Config(call={"max_sequence_length": 9}, size=(16, 24)))
    assert adapter.call(OFF)["max_sequence_length"] == 9
    assert adapter.image_size == (16, 24)
    for name in ("max_length", "guidance_scale"):
        with pytest.raises(RecipeError, match=f"'{name}' is (no argument of|set by).*max_sequence_length"):
            Generic(aura_flow(), Generic.Config(call={name: 9}))


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("WanPipeline", "makes videos"),
        ("LattePipeline", "makes videos"),
        ("StableDiffusionImg2ImgPipeline", "starts from a picture"),
        ("StableDiffusionInpaintPipeline", "starts from a picture"),
        ("FluxControlPipeline", "starts from a picture"),
        ("StableDiffusionXLControlNetPipeline", "starts from a picture"),
        ("StableDiffusionInstructPix2PixPipeline", "takes pictures"),
        ("QwenImageEditPipeline", "takes pictures"),
        ("StableAudioPipeline", "without height, width"),
        ("WuerstchenCombinedPipeline", "no transformer or unet"),
        ("OmniGenPipeline", "takes pictures"),
    ],
)
def test_other_kinds_of_pipelines_are_refused(name, why):
    family = getattr(diffusers, name)
    with pytest.raises(RecipeError, match=f"generic: {name} .*{why}"):
        Generic(object.__new__(family))


def test_what_the_call_cannot_do_without_is_asked_for():
    parts = {name: part for name, part in stable_diffusion().components.items() if name != "image_encoder"}
    pipe = diffusers.StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    with pytest.raises(RecipeError, match=r"cannot be called without token_indices; give it in pipeline\.options"):
        Generic(pipe)
    assert Generic(pipe, Generic.Config(call={"token_indices": [1]})).image_size == (16, 16)


def changed(change):
    """Stable Diffusion, but its call is `change(call, pipe, ...)`."""

    class Changed(diffusers.StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, *args, **kwargs):
            return change(diffusers.StableDiffusionPipeline.__call__.__wrapped__, self, *args, **kwargs)

    Changed.__call__.__wrapped__.__signature__ = inspect.signature(diffusers.StableDiffusionPipeline.__call__)
    pipe = Changed(**stable_diffusion().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return Generic(pipe)


def image(change):
    return lambda call, *args, **kwargs: (change(call(*args, **kwargs)[0]),)


def interrupted(pipe, i, timestep, kwargs):
    pipe._interrupt = True
    return {}


def detached(pipe, i, timestep, kwargs):
    return {"latents": kwargs["latents"].detach()}


def detached_at_last(pipe, i, timestep, kwargs):
    return {"latents": kwargs["latents"].detach()} if i == pipe.num_timesteps - 1 else {}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (image(lambda images: images.detach()), "between its last step and the image"),
        (image(lambda images: torch.from_numpy(images.numpy())), "on its way to the image: Can't call numpy"),
        (lambda c, *a, **k: c(*a, **k, callback_on_step_end=detached_at_last), "between its last step and the image"),
        (lambda c, *a, **k: c(*a, **k, callback_on_step_end=detached), "between its steps"),
        (lambda c, *a, **k: c(*a, **k, callback_on_step_end=interrupted), "takes 1 steps where its scheduler has 5"),
        (image(lambda images: images.detach().numpy()), "gives ndarray for output_type='pt'"),
        (image(lambda images: images * 2 - 1), "gives values from -"),
        (image(lambda images: images[..., :8]), r"of shape \(2, 3, 16, 8\)"),
        (image(lambda images: images.unsqueeze(1)), r"of shape \(2, 1, 3, 16, 16\)"),
    ],
)
def test_what_would_train_on_nothing_or_on_other_images_is_refused(change, why):
    adapter = changed(change)
    adapter.trainable["unet"].requires_grad_(True)
    with pytest.raises(RecipeError, match=f"Changed .*{why}"):
        roll_out(adapter, OFF, 3)


def test_a_step_whose_input_was_changed_in_place_is_not_run_again():
    kept = []

    def spoil(pipe, i, timestep, kwargs):
        with torch.no_grad():
            for latents in kept:
                latents.add_(1)
        kept[:] = [kwargs["latents"]]
        return {}

    adapter = Generic(ovis_image(), Generic.Config(call={"callback_on_step_end": spoil, "max_sequence_length": 64}))
    adapter.trainable["transformer"].requires_grad_(True)
    with pytest.raises(RecipeError, match=r"OvisImagePipeline changes tensors in place.*gradient\.memory: fast"):
        roll_out(adapter, OFF, 3, "flat").sum().backward()


def test_an_unchanged_call_is_not_refused_however_many_decorators_it_has():
    adapter = changed(lambda call, *args, **kwargs: call(*args, **kwargs))
    family = type(adapter.pipe)
    family.__call__ = torch.inference_mode()(torch.no_grad()(family.__call__))
    adapter = Generic(adapter.pipe)
    adapter.trainable["unet"].requires_grad_(True)
    assert roll_out(adapter, OFF, 3).requires_grad


def test_what_the_pipeline_itself_refuses_is_told():
    with pytest.raises(RecipeError, match=r"CogView4Pipeline refuses its call: .*divisible"):
        sample(Generic(cog_view_4()), PROMPTS, generators(), num_steps=1, guidance=OFF, size=(20, 20))


def test_what_breaks_off_is_told_with_its_place_and_what_may_help():
    def broken(call, pipe, *args, **kwargs):
        return len(kwargs["timesteps"])

    told = (
        r"breaks off in its call \(test_generic\.py, line \d+\) with TypeError: .*'NoneType'.*pipeline\.options\.call\."
    )
    with pytest.raises(RecipeError, match=told):
        roll_out(changed(lambda call, *args, **kwargs: broken(call, *args, **{**kwargs, "timesteps": None})), OFF)

    def strict(call, pipe, *args, **kwargs):
        raise ValueError("no safety checker.")

    pipe = changed(strict).pipe
    pipe.safety_checker = torch.nn.Identity()
    with pytest.raises(RecipeError, match=r"no safety checker\. It runs here without its safety_checker"):
        roll_out(Generic(pipe), OFF)


def test_prompts_can_have_calls_of_their_own():
    def alone(call, pipe, *args, **kwargs):
        if len(kwargs["prompt"]) > 1:
            raise RuntimeError("shapes do not match")
        return call(pipe, *args, **kwargs)

    adapter = changed(alone)
    with pytest.raises(RecipeError, match=r"RuntimeError: shapes do not match\. .*pipeline\.options\.one_by_one: true"):
        roll_out(adapter, OFF)
    adapter, together = Generic(adapter.pipe, Generic.Config(one_by_one=True)), Generic(stable_diffusion(euler()))
    adapter.pipe.register_modules(scheduler=together.pipe.scheduler)
    adapter = Generic(adapter.pipe, adapter.options)
    guidance = Guidance("full", 3.0, "red")
    assert torch.allclose(roll_out(adapter, guidance), roll_out(together, guidance), atol=1e-5)
    drawn = []

    def draw(total):
        drawn.append(total)
        return range(total)[-2:]

    for memory in (False, True):
        found = gradient(
            Raw(adapter),
            lambda memory=memory: adapter.rollout(
                PROMPTS, generators(), num_steps=STEPS, guidance=guidance, size=SIZES[0], gradient_steps=draw,
                recompute=memory,
            ),
        )  # fmt: skip
        assert difference(found, gradient(Raw(together), lambda: roll_out(together, guidance, 2))) <= 1e-4
    assert drawn == [STEPS, STEPS]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: no")])
def test_exhausted_memory_is_left_to_whoever_knows_what_helps(error):
    def exhausted(*args, **kwargs):
        raise error

    with pytest.raises(type(error)):
        roll_out(changed(exhausted), OFF)


def test_a_package_that_the_pipeline_needs_is_asked_for(tmp_path, monkeypatch):
    """diffusers then has a stand-in for the class, which raises as soon as it is used."""
    from diffusers.utils.import_utils import DummyObject

    class KolorsPipeline(metaclass=DummyObject):
        _backends = ("torch", "a_package")

        @classmethod
        def from_config(cls, *args, **kwargs):
            raise ImportError("KolorsPipeline requires a_package")

    monkeypatch.setattr(diffusers, "KolorsPipeline", KolorsPipeline)
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline", "_diffusers_version": "0.42.0"}')
    with pytest.raises(RecipeError, match="needs a package: KolorsPipeline requires a_package"):
        load_pipeline(PipelineSection(model=str(tmp_path), family="generic"), device="cpu")


@pytest.mark.parametrize("change", ["another class", "another module", "one module more"])
def test_adapters_go_through_peft_where_diffusers_loader_is_not_for_the_denoiser(tmp_path, monkeypatch, change):
    """As in Kandinsky 3, whose UNet has no loader of adapters, in PRX, whose loader is for a UNet, and in Kolors with
    perturbed-attention guidance, where it is for two text encoders."""
    pixart_alpha().save_pretrained(tmp_path / "base")
    family = diffusers.PixArtAlphaPipeline
    monkeypatch.setattr(family, "load_lora_weights", lambda *_, **__: 1 / 0, raising=False)
    monkeypatch.setattr(family, "save_lora_weights", lambda *_, **__: 1 / 0, raising=False)
    modules = {"another module": ["unet"], "one module more": ["transformer", "text_encoder_2"]}
    monkeypatch.setattr(family, "_lora_loadable_modules", modules.get(change, ["transformer"]), raising=False)
    if change == "another class":
        monkeypatch.delattr(diffusers.loaders.PeftAdapterMixin, "load_lora_adapter")
    options = {"size": (16, 16), "call": {"use_resolution_binning": False}}
    section = PipelineSection(model=str(tmp_path / "base"), family="generic", options=options)
    adapter = load_pipeline(section, device="cpu")
    assert list(lora.loadable(adapter)) == ["transformer"]
    lora.attach(adapter.trainable, rank=2, targets=adapter.lora_targets)
    for name, parameter in adapter.trainable["transformer"].named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    (tmp_path / "export").mkdir()
    export.lora(adapter, ["transformer"], tmp_path / "export", {"name": "test"}, base=str(tmp_path / "base"))
    assert (tmp_path / "export" / "adapter_model.safetensors").is_file()
    assert "PeftModel.from_pretrained(pipe.transformer" in (tmp_path / "export" / "README.md").read_text()
    fresh = load_pipeline(section, device="cpu")
    before = roll_out(fresh, OFF)
    lora.load(fresh, tmp_path / "export")
    assert not torch.equal(roll_out(fresh, OFF), before)
    lora.unload(fresh)
    assert torch.equal(roll_out(fresh, OFF), before)


def kandinsky_5():
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=16, ff_dim=16, num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4),
    )  # fmt: skip


def prx():
    return diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=16, hidden_size=16, num_heads=2, depth=1, axes_dim=[4, 4]
    )


@pytest.mark.parametrize(
    ("denoiser", "targets"),
    [
        (lambda: tiny.z_image().transformer, ["to_q", "to_k", "to_v", "to_out.0"]),
        (lambda: deep_floyd().unet, ["to_q", "add_k_proj", "add_v_proj", "to_out.0"]),
        (prx, ["img_qkv_proj", "txt_kv_proj", "to_out.0"]),
        (kandinsky_5, ["to_query", "to_key", "to_value"]),  # its out_layer is the name of the last block, too
    ],
    ids=["the usual", "IF", "PRX", "Kandinsky 5"],
)
def test_adapters_go_to_the_attentions_whatever_their_layers_are_called(denoiser, targets):
    pipe = stable_diffusion()
    pipe.unet = denoiser()
    adapter = Generic(pipe)
    assert adapter.lora_targets == {"unet": targets}
    lora.attach(adapter.trainable, rank=2, targets=adapter.lora_targets)
    trained = {name.partition(".lora_A")[0] for name, p in pipe.unet.named_parameters() if "lora_A" in name}
    assert all(any(path.endswith(f".{name}") for path in trained) for name in targets)


def test_pipelines_within_a_pipeline_are_refused():
    pipe = stable_diffusion()
    pipe.decoder_pipe = stable_diffusion()
    with pytest.raises(RecipeError, match=r"through pipelines of its own \(decoder_pipe\)"):
        Generic(pipe)


# ------------------------------------------------------------------------------------------------------------ recipes


class Redness:
    card = RewardCard("redness", "red minus blue", differentiable=True, needs_prompt=False, range=(-1, 1))

    def score(self, images, prompts):
        return Score((images[:, 0] - images[:, 2]).mean((1, 2)))


@pytest.mark.parametrize(
    ("method", "settings"), [("draft", {"last_steps": 2}), ("alignprop", {"longest": 1.0})], ids=["draft", "alignprop"]
)
def test_reward_rises_and_the_adapters_load_in_diffusers(tmp_path, method, settings):
    cog_view_4().save_pretrained(tmp_path / "base")
    section = PipelineSection(model=str(tmp_path / "base"), family="generic", options={"size": (16, 16)})
    adapter = load_pipeline(section, device="cpu")
    lora.attach(adapter.trainable, rank=4, targets=adapter.lora_targets)
    task = DirectReward(
        adapter, trainable=adapter.trainable, prompts=[Prompt("dog"), Prompt("red cat"), Prompt("two birds")],
        rewards=RewardSet([Term(Redness())]), method=gradients.load_choice(method, **settings, memory="flat"),
        num_steps=4, guidance=Guidance("full", 2.0), size=(16, 16), seed=3, augmentation=None, samples=lambda: None,
        export=lambda *_: None,
    )  # fmt: skip
    optimizer = torch.optim.Adam([p for p in adapter.trainable["transformer"].parameters() if p.requires_grad], 1e-2)
    rewards = []
    for step in range(25):
        out = task.step(task.batch(step, range(step * 4, step * 4 + 4)))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        rewards.append(out.metrics["reward/redness"])
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.02
    whole = task.step(task.batch(7, range(28, 32)))
    halves = [task.step(task.batch(7, [28, 29])), task.step(task.batch(7, [30, 31]))]
    assert float(whole.loss) == pytest.approx(sum(float(h.loss) for h in halves) / 2, abs=1e-5)
    (tmp_path / "export").mkdir()
    export.lora(adapter, ["transformer"], tmp_path / "export", {"name": "test"}, base=str(tmp_path / "base"))
    assert (tmp_path / "export" / export.LORA_FILE).is_file()


RECIPE = """
task: direct_reward
pipeline: {model: base, family: generic}
full: {}
data: {prompts: "pocket:prompts/train"}
rollout: {steps: 4, guidance: full}
gradient: {method: draft}
rewards: [{name: zreward}]
train: {steps: 1}
"""
SFT = """
task: sft
pipeline: {model: base, family: generic}
full: {}
data: {manifest: rows.jsonl}
train: {steps: 1}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixart_alpha().save_pretrained(tmp_path / "base")

    def load(text: str, *overrides: str, **changes: object):
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(tmp_path / "recipe.yaml", overrides).recipe.model_copy(update=changes)

    return load


def test_an_unknown_pipeline_is_told_the_way_out(recipe):
    with pytest.raises(RecipeError, match=r"PixArtAlphaPipeline, which no family .* pipeline\.family: generic"):
        find_family("base", None)


def test_a_recipe_is_built_with_the_steps_that_its_method_chooses(recipe):
    task = build_task(recipe(RECIPE, "gradient.last_steps=3", "gradient.memory=fast"), device="cpu")
    chosen = task.method(gradients.Draws(random.Random(0), []))
    assert chosen.gradient_steps(4) == range(1, 4) and not chosen.recompute
    assert task.size == (16, 16)
    assert list(task.trainable) == ["transformer"] and all(
        p.requires_grad for p in task.trainable["transformer"].parameters()
    )


def test_a_scheduler_may_draw_noise_since_its_steps_are_never_run_again(recipe, tmp_path):
    noisy().save_pretrained(tmp_path / "base")
    assert isinstance(build_task(recipe(RECIPE), device="cpu"), DirectReward)


def test_what_takes_single_steps_is_refused_before_anything_is_loaded(recipe):
    for override, told in (
        ("gradient={method: refl}", "refl takes single steps; write draft or alignprop"),
        ("rollout.guidance=detached-negative", "no branch of its guidance can be without gradient"),
        ("rollout={steps: 4}", "write rollout.guidance: full, or off"),
    ):
        with pytest.raises(RecipeError, match=told):
            recipe(RECIPE, override)
    with pytest.raises(RecipeError, match=r"sft needs single predictions; write task: direct_reward"):
        recipe(SFT)


def test_so_it_is_in_a_recipe_that_nobody_checked(recipe):
    from rewardtune.recipe.gradients import ReflSection
    from rewardtune.recipe.sections import FullSection, RolloutSection, SftRecipe

    good = recipe(RECIPE)
    for changes, told in (
        ({"gradient": ReflSection(method="refl")}, "refl takes single steps.*draft"),
        ({"rollout": RolloutSection()}, "no branch of its guidance"),
        ({"full": FullSection(modules=["text_encoder"])}, "text_encoder cannot be trained.* it offers: transformer"),
    ):
        with pytest.raises(RecipeError, match=told):
            build_task(good.model_copy(update=changes), device="cpu")
    sft = SftRecipe(
        task="sft", pipeline=good.pipeline, full=FullSection(), data={"manifest": "rows.jsonl"}, train=good.train
    )
    with pytest.raises(RecipeError, match="sft needs single predictions and an encoder of images"):
        build_task(sft, device="cpu")
