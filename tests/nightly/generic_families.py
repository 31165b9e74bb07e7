"""Small pipelines of diffusers' real classes, with random weights, that `family: generic` is tried on.

One function a pipeline. What they share with the families of our own comes from there: autoencoders, text encoders,
tokenizers of words. What rewrites prompts before they are drawn (ERNIE-Image, LongCat-Image) is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import test_generic as usual
import tiny
import torch
import transformers
from families import flux_2, flux_2_klein, qwen_image, sana
from rewardtune.pipelines.generic import Generic

from rewardtune.plugins import Guidance

OFF, FULL, NEGATIVE = Guidance("off"), Guidance("full", 3.0), Guidance("full", 3.0, "red")


@dataclass(frozen=True)
class Family:
    """A pipeline, and what a recipe would say about it."""

    make: Callable[[], Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    """`pipeline.options.call`."""
    size: tuple[int, int] = (16, 16)
    guidances: Sequence[Guidance] = (OFF, FULL, NEGATIVE)
    """Those that it can be called with."""
    signed: bool = False
    one_by_one: bool = False
    memories: Sequence[str] = ("fast", "flat")
    """Those in which all steps can have gradient."""
    keeps: bool = False
    """Whether its steps get more of those before them than the latents: a cache, a momentum."""

    @property
    def without_negative(self) -> list[Guidance]:
        return [guidance for guidance in self.guidances if not guidance.negative_prompt]

    def adapter(self) -> Generic:
        torch.manual_seed(0)
        options = Generic.Config(call=dict(self.call), signed=self.signed, one_by_one=self.one_by_one)
        return Generic(tiny.ready(self.make()), options)


# --------------------------------------------------------------------------------------------------------------- parts


class Words:
    """A processor of text and pictures, or a tokenizer of its own, that knows text alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: Any = None, images: Any = None, pad_to_multiple_of: Any = None, **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return [[0] * 5]  # as many tokens as the pipelines leave out again

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)


class Positions(Words):
    """ChatGLM's tokenizer counts its tokens."""

    model_max_length = 256

    def __call__(self, text: Any = None, **options: Any) -> Any:
        found = self.tokenizer(text, **options)
        found["position_ids"] = torch.arange(found["input_ids"].shape[1]).expand_as(found["input_ids"])
        return found


def drawn(module):
    """Random weights, for what leaves memory as it finds it."""
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.2)
    return module


def flow(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def ddim():
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def t5():
    return tiny.t5_encoder(16), tiny.words(end_only=True)


def clip(*, projected: bool = False, length: int = 16):
    config = tiny.clip()
    config.max_position_embeddings = length
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


LANGUAGE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def qwen3_vl(family=transformers.Qwen3VLModel, layers=2):
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**LANGUAGE, "num_hidden_layers": layers, "bos_token_id": 2, "eos_token_id": 3, "rope_parameters": rope}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return family(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))


def eightfold():
    """An AutoencoderKL whose latents are an eighth of the sides, where the pipelines count on that."""
    return diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=4, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1,
        sample_size=16, scaling_factor=0.6,
    )  # fmt: skip


def film(family, blocks: int, **config):
    """A film autoencoder of `blocks` resolutions."""
    return family(
        base_dim=8, z_dim=4, dim_mult=[1] * blocks, num_res_blocks=1,
        temperal_downsample=[False, *[True] * (blocks - 2)], latents_mean=[0.1] * 4, latents_std=[1.2] * 4, **config,
    )  # fmt: skip


def movq(*channels: int):
    """Kandinsky's autoencoder. Its norms have 32 groups."""
    plain = len(channels) - 1
    return diffusers.VQModel(
        block_out_channels=channels, latent_channels=4, layers_per_block=1, norm_num_groups=4, norm_type="spatial",
        down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain, num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip


def unet(**config):
    sizes = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
        "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 16, "attention_head_dim": 4,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**sizes, **config})


def prior():
    """What makes an embedding of a picture from that of a prompt."""
    return (
        diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16, num_embeddings=16
        ),
        diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0),
    )


# ---------------------------------------------------------------------------------------------------------- pipelines


def bria():
    text_encoder, tokenizer = t5()
    return diffusers.BriaPipeline(
        transformer=diffusers.BriaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=[4, 2, 2],
        ),
        scheduler=flow(), vae=tiny.autoencoder(scaling_factor=0.6, shift_factor=0.1), text_encoder=text_encoder,
        tokenizer=tokenizer,
    )  # fmt: skip


def fibo():
    text = transformers.SmolLM3Config(
        vocab_size=128001,  # an empty prompt is its last token
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return diffusers.BriaFiboPipeline(
        transformer=diffusers.BriaFiboTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=[4, 2, 2], text_encoder_dim=8,
        ),
        scheduler=flux_2_klein.scheduler(), vae=film(diffusers.AutoencoderKLWan, 5),
        text_encoder=transformers.SmolLM3ForCausalLM(text), tokenizer=tiny.words(),
    )  # fmt: skip


def cog_view_3():
    text_encoder, tokenizer = t5()
    return diffusers.CogView3PlusPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=tiny.autoencoder(scaling_factor=0.6),
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=16, time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            snr_shift_scale=4.0, timestep_spacing="trailing", prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
        ),
    )  # fmt: skip


def cosmos():
    text_encoder, tokenizer = t5()
    return diffusers.Cosmos2TextToImagePipeline(
        text_encoder=text_encoder, tokenizer=tokenizer, vae=film(diffusers.AutoencoderKLWan, 4),
        transformer=diffusers.CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
            text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32),
        ),
        scheduler=flow(use_karras_sigmas=True), safety_checker=torch.nn.Identity(),
    )  # fmt: skip


def ernie():
    return diffusers.ErnieImagePipeline(
        transformer=diffusers.ErnieImageTransformer2DModel(
            hidden_size=16, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16, out_channels=16,
            patch_size=1, text_in_dim=8, rope_axes_dim=(4, 2, 2),
        ),
        vae=flux_2_klein.autoencoder(), text_encoder=flux_2.make().text_encoder.model, tokenizer=tiny.words(),
        scheduler=flow(),
    )  # fmt: skip


def hi_dream():
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LANGUAGE))
    text_encoder, tokenizer = t5()
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=flow(), vae=tiny.autoencoder(scaling_factor=0.6, shift_factor=0.1),
        text_encoder=clip(projected=True), tokenizer=tiny.words(length=16), text_encoder_2=clip(projected=True),
        tokenizer_2=tiny.words(length=16), text_encoder_3=text_encoder, tokenizer_3=tokenizer, text_encoder_4=llama,
        tokenizer_4=tiny.words(),
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=4, caption_channels=[16, 16], text_emb_dim=32, num_routed_experts=4,
            num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 1],
        ),
    )  # fmt: skip
    pipe.default_sample_size = 8
    return pipe


def hunyuan_dit(family=diffusers.HunyuanDiTPipeline, **options):
    text_encoder, _ = t5()
    bert = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=80,
    )  # fmt: skip
    return family(
        vae=eightfold(), text_encoder=transformers.BertModel(bert), tokenizer=tiny.words(length=77),
        text_encoder_2=text_encoder, tokenizer_2=tiny.words(length=256, end_only=True), scheduler=ddim(),
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, hidden_size=24,
            mlp_ratio=4.0, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, in_channels=4,
            activation_fn="gelu-approximate",
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **options,
    )  # fmt: skip


def hunyuan_dit_pag():
    return hunyuan_dit(diffusers.HunyuanDiTPAGPipeline, pag_applied_layers="blocks.1")


def hunyuan_image():
    return usual.hunyuan_image(diffusers.ClassifierFreeGuidance(guidance_scale=3.0))


def hunyuan_image_projected(momentum):
    guider = diffusers.AdaptiveProjectedMixGuidance(
        adaptive_projected_guidance_start_step=2, adaptive_projected_guidance_momentum=momentum
    )
    return usual.hunyuan_image(guider)


def ideogram():
    """Guides away from a second denoiser."""
    denoisers = [
        diffusers.Ideogram4Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, intermediate_size=32,
            adaln_dim=8, llm_features_dim=16 * 13, mrope_section=(2, 1, 1),
        )
        for _ in range(2)
    ]  # fmt: skip
    template = "{% for m in messages %}a {{ m['content'][0]['text'] }}{% endfor %}"
    return diffusers.Ideogram4Pipeline(
        scheduler=flow(shift=1.0), vae=flux_2_klein.autoencoder(), text_encoder=qwen3_vl(layers=36),
        tokenizer=tiny.words(chat_template=template), transformer=denoisers[0], unconditional_transformer=denoisers[1],
    )  # fmt: skip


def kandinsky_2_2():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        intermediate_size=16, patch_size=16,
    )  # fmt: skip
    denoiser = unet(
        out_channels=8, block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), addition_embed_type="image",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=16, encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    model, scheduler = prior()
    return diffusers.KandinskyV22CombinedPipeline(
        unet=denoiser, scheduler=ddim(), movq=movq(32, 64), prior_prior=model, prior_scheduler=scheduler,
        prior_image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        prior_text_encoder=clip(projected=True), prior_tokenizer=tiny.words(length=16),
        prior_image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
    )  # fmt: skip


def kandinsky_3():
    return diffusers.Kandinsky3Pipeline(
        tokenizer=tiny.words(length=128, end_only=True), text_encoder=tiny.t5_encoder(16),
        unet=diffusers.Kandinsky3UNet(
            in_channels=4, time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=3,
            block_out_channels=(16, 32), cross_attention_dim=8, encoder_hid_dim=16,
        ),
        scheduler=diffusers.DDPMScheduler(beta_start=0.0001, beta_end=0.02), movq=movq(32, 32, 32, 32),
    )  # fmt: skip


def kandinsky_5():
    qwen, tokenizer = qwen_image.make(), tiny.words(length=77)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # CLIP knows no kinds of tokens
    pipe = diffusers.Kandinsky5T2IPipeline(
        transformer=diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=8, patch_size=(1, 2, 2),
            model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4),
        ),
        vae=eightfold(), text_encoder=qwen.text_encoder, tokenizer=Words(qwen.tokenizer), scheduler=flow(),
        text_encoder_2=clip(length=77), tokenizer_2=tokenizer,
    )  # fmt: skip
    pipe.resolutions = [(32, 32)]
    return pipe


def kolors(*, perturbed: bool = False):
    # diffusers itself has but a stand-in for these classes where sentencepiece is missing
    from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.pag.pipeline_pag_kolors import KolorsPAGPipeline

    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=64, hidden_size=16, ffn_hidden_size=16, kv_channels=8, num_attention_heads=2,
        seq_length=256, multi_query_attention=True, multi_query_group_num=1, add_qkv_bias=True, original_rope=True,
    )  # fmt: skip
    parts = {
        "vae": tiny.autoencoder(scaling_factor=0.6), "text_encoder": drawn(ChatGLMModel(config)),
        "tokenizer": Positions(tiny.words(length=256)), "scheduler": usual.euler(),
        "unet": unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=64, encoder_hid_dim=16,
            encoder_hid_dim_type="text_proj",
        ),
    }  # fmt: skip
    if perturbed:
        return KolorsPAGPipeline(**parts, pag_applied_layers=["down_blocks.1.attentions.0", "mid"])
    return KolorsPipeline(**parts)


def krea_2():
    qwen = qwen_image.make()
    return diffusers.Krea2Pipeline(
        scheduler=flux_2_klein.scheduler(), vae=qwen.vae, text_encoder=qwen3_vl(), tokenizer=qwen.tokenizer,
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=2,
            text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
        ),
        text_encoder_select_layers=(1, 2),
    )  # fmt: skip


def long_cat():
    qwen = qwen_image.make()
    vae = diffusers.AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        scaling_factor=0.6, shift_factor=0.1,
    )  # fmt: skip
    return diffusers.LongCatImagePipeline(
        scheduler=flux_2_klein.scheduler(), vae=vae, text_encoder=qwen.text_encoder, tokenizer=qwen.tokenizer,
        text_processor=None,
        transformer=diffusers.LongCatImageTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 2, 2],
        ),
    )  # fmt: skip


def lumina():
    return diffusers.LuminaPipeline(
        transformer=diffusers.LuminaNextDiT2DModel(
            sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3,
            num_kv_heads=1, multiple_of=16, cross_attention_dim=16,
        ),
        scheduler=flow(), vae=eightfold(), text_encoder=transformers.GemmaModel(transformers.GemmaConfig(**LANGUAGE)),
        tokenizer=tiny.words(),
    )  # fmt: skip


def nucleus():
    qwen = qwen_image.make()
    pipe = diffusers.NucleusMoEImagePipeline(
        transformer=drawn(
            diffusers.NucleusMoEImageTransformer2DModel(
                patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8,
                num_attention_heads=2, num_key_value_heads=2, joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
                num_experts=4, moe_intermediate_dim=16, capacity_factors=[2.0, 2.0],
            )
        ),
        scheduler=flux_2_klein.scheduler(), vae=qwen.vae, text_encoder=qwen3_vl(), processor=Words(qwen.tokenizer),
    )  # fmt: skip
    pipe._format_prompt = str  # its template is the published processor's
    return pipe


def prx():
    return diffusers.PRXPipeline(
        transformer=diffusers.PRXTransformer2DModel(
            in_channels=4, patch_size=2, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
            axes_dim=[4, 4],
        ),
        scheduler=flow(), text_encoder=sana.make().text_encoder, tokenizer=tiny.words(length=32),
        vae=tiny.autoencoder(scaling_factor=0.6, shift_factor=0.1), default_sample_size=16,
    )  # fmt: skip


def prx_pixel():
    return diffusers.PRXPixelPipeline(
        transformer=diffusers.PRXTransformer2DModel(
            in_channels=3, patch_size=4, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
            axes_dim=[4, 4], bottleneck_size=8, resolution_embeds=True,
        ),
        scheduler=flow(), text_encoder=sana.make().text_encoder, tokenizer=tiny.words(length=32),
        default_sample_size=16, prompt_max_tokens=32,
    )  # fmt: skip


def qwen_image_2_1():
    return diffusers.QwenImage21Pipeline(
        scheduler=flux_2_klein.scheduler(),
        # with transparency
        vae=film(diffusers.AutoencoderKLQwenImage21, 5, decoder_base_dim=8, in_channels=4, out_channels=4),
        text_encoder=qwen3_vl(transformers.Qwen3VLForConditionalGeneration),
        processor=Words(qwen_image.tokenizer()),
        transformer=diffusers.QwenImage21Transformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            context_in_dim=16, mlp_ratio=2, axes_dims_rope=(2, 2, 4),
        ),
    )  # fmt: skip


def z_image_omni():
    return diffusers.ZImageOmniPipeline(**tiny.z_image().components, siglip=None, siglip_processor=None)


def of_stable_diffusion(name: str, **parts: Any) -> Any:
    """Another pipeline of Stable Diffusion's parts."""
    family = getattr(diffusers, name)
    own = {**tiny.stable_diffusion(ddim()).components, "requires_safety_checker": False}
    taken = inspect.signature(family.__init__).parameters
    return family(**{name: part for name, part in own.items() if name in taken} | parts)


def stable_diffusion_pag():
    return of_stable_diffusion("StableDiffusionPAGPipeline", pag_applied_layers="down_blocks.0.attentions.0")


def gligen():
    return of_stable_diffusion("StableDiffusionGLIGENPipeline", unet=unet(attention_type="gated"))


def lcm(scheduler=diffusers.LCMScheduler):
    """Distilled for guidance, which it takes as an input under the name of the scale."""
    return of_stable_diffusion(
        "LatentConsistencyModelPipeline", unet=unet(time_cond_proj_dim=32),
        scheduler=scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )  # fmt: skip


def ldm3d():
    vae = diffusers.AutoencoderKL(
        in_channels=6, out_channels=6, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return of_stable_diffusion("StableDiffusionLDM3DPipeline", vae=vae)


def ldm():
    return diffusers.LDMTextToImagePipeline(
        vqvae=eightfold(), bert=clip(length=77), tokenizer=tiny.words(length=77),
        unet=unet(), scheduler=ddim(),
    )  # fmt: skip


def panorama():
    return of_stable_diffusion("StableDiffusionPanoramaPipeline", vae=eightfold())


def paradigms():
    """Takes several steps at once."""
    return of_stable_diffusion("StableDiffusionParadigmsPipeline", scheduler=diffusers.DDIMParallelScheduler())


def stable_unclip():
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    model, scheduler = prior()
    return diffusers.StableUnCLIPPipeline(
        prior_tokenizer=tiny.words(length=16), prior_text_encoder=clip(projected=True), prior=model,
        prior_scheduler=scheduler, image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=16),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tiny.words(length=16), text_encoder=clip(), scheduler=ddim(),
        unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=32),
        vae=tiny.autoencoder(scaling_factor=0.6),
    )  # fmt: skip


def stable_diffusion_xl_pag():
    parts = tiny.stable_diffusion_xl(usual.euler()).components
    return diffusers.StableDiffusionXLPAGPipeline(**parts, add_watermarker=False, pag_applied_layers="mid")


def stable_diffusion_3_pag():
    parts = tiny.stable_diffusion_3().components
    del parts["image_encoder"], parts["feature_extractor"]
    return diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.0"])


def pixart_sigma_pag():
    return diffusers.PixArtSigmaPAGPipeline(**tiny.pixart_sigma().components, pag_applied_layers="blocks.0")


def sana_pag():
    return diffusers.SanaPAGPipeline(**sana.make().components, pag_applied_layers="transformer_blocks.0")


def flux_kontext():
    return diffusers.FluxKontextPipeline(**usual.flux().components)


def amused():
    transformer = diffusers.UVit2DModel(
        hidden_size=16, cond_embed_dim=16, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=16,
        vocab_size=12, codebook_size=8, in_channels=16, block_out_channels=16, num_res_blocks=1, downsample=True,
        upsample=True, block_num_heads=2, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        sample_size=8,
    )  # fmt: skip
    vqvae = diffusers.VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=8, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=8, mid_block_add_attention=False,
        lookup_from_codebook=True,
    )  # fmt: skip
    return diffusers.AmusedPipeline(
        vqvae=vqvae, tokenizer=tiny.words(length=16), text_encoder=clip(projected=True), transformer=transformer,
        scheduler=diffusers.AmusedScheduler(mask_token_id=11),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- tables

SHORT = {"max_sequence_length": 32}
OWN_SIZE = {"use_resolution_binning": False}
SANA = {**OWN_SIZE, **SHORT, "complex_human_instruction": None}
PLAIN = {"clean_caption": False}
PRIOR = {"prior_num_inference_steps": 2}
BOX = {"gligen_phrases": ["red"], "gligen_boxes": [[0.0, 0.0, 0.5, 0.5]]}
NO_NEGATIVE = (OFF, FULL)
LARGER = (32, 32)

WORK = {
    "Bria 3.2": Family(bria, SHORT),
    "Bria FIBO": Family(fibo, SHORT, LARGER),
    "CogView3-Plus": Family(cog_view_3, SHORT),
    "DeepFloyd IF": Family(usual.deep_floyd, PLAIN, signed=True),
    "ERNIE-Image": Family(ernie),
    "FLUX.1 Kontext": Family(flux_kontext, {**SHORT, "max_area": 256}),
    "GLIGEN": Family(gligen, BOX, memories=["fast"]),
    "HiDream-I1": Family(hi_dream, {"max_sequence_length": 16}),
    "Hunyuan-DiT": Family(hunyuan_dit, OWN_SIZE, LARGER),
    # fails unguided, where its perturbation is on all the same
    "Hunyuan-DiT with PAG": Family(hunyuan_dit_pag, OWN_SIZE, LARGER, (FULL, NEGATIVE)),
    "Hunyuan-DiT with PAG, unguided": Family(hunyuan_dit_pag, {**OWN_SIZE, "pag_scale": 0.0}, LARGER, (OFF,)),
    "HunyuanImage 2.1": Family(hunyuan_image),
    "HunyuanImage 2.1, projected": Family(
        partial(hunyuan_image_projected, momentum=None), guidances=(OFF, Guidance("full", 3.5))
    ),
    "HunyuanImage 2.1, projected with momentum": Family(
        partial(hunyuan_image_projected, momentum=-0.5), guidances=(Guidance("full", 3.5),), keeps=True
    ),
    "HunyuanImage 2.1, distilled": Family(partial(usual.hunyuan_image, guidance_embeds=True), guidances=(OFF,)),
    "Ideogram 4": Family(ideogram, {**SHORT, "guidance_schedule": None}, guidances=NO_NEGATIVE),
    "Kandinsky 3": Family(kandinsky_3, {}, (64, 64), signed=True),
    "Kandinsky 5.0 Image": Family(kandinsky_5, {}, LARGER),
    "Kolors": Family(kolors),
    "Kolors with PAG": Family(partial(kolors, perturbed=True)),
    "Krea 2": Family(krea_2, SHORT),
    "Latent Consistency Models": Family(lcm, guidances=NO_NEGATIVE),
    "Latent Diffusion": Family(ldm, {}, LARGER, NO_NEGATIVE),
    "LongCat-Image": Family(long_cat, {"enable_prompt_rewrite": False}),
    "Lumina-Next": Family(lumina, PLAIN, LARGER),
    "NucleusMoE-Image": Family(nucleus, {"return_index": -1}),
    "PixArt-Sigma with PAG": Family(pixart_sigma_pag, {**OWN_SIZE, **PLAIN, **SHORT}),
    "PRX": Family(prx, {**OWN_SIZE, "skip_text_cleaning": True}, one_by_one=True),
    "PRXPixel": Family(prx_pixel, OWN_SIZE, signed=True, one_by_one=True),
    "Qwen-Image 2.1": Family(qwen_image_2_1, {}, LARGER, keeps=True),
    "Qwen-Image 2.1, without its cache": Family(qwen_image_2_1, {"use_kv_cache": False}, LARGER),
    "Sana with PAG": Family(sana_pag, SANA, LARGER),
    "Sana-Sprint": Family(usual.sana_sprint, {**SANA, "intermediate_timesteps": None}, LARGER, NO_NEGATIVE),
    "Semantic Guidance": Family(partial(of_stable_diffusion, "SemanticStableDiffusionPipeline")),
    "Self-Attention Guidance": Family(partial(of_stable_diffusion, "StableDiffusionSAGPipeline")),
    "Stable Diffusion 3 with PAG": Family(stable_diffusion_3_pag, SHORT),
    "Stable Diffusion with PAG": Family(stable_diffusion_pag),
    "Stable Diffusion XL with PAG": Family(stable_diffusion_xl_pag),
    "Stable unCLIP": Family(stable_unclip, PRIOR),
    "TIME": Family(partial(of_stable_diffusion, "StableDiffusionModelEditingPipeline")),
    "Z-Image-Omni": Family(z_image_omni),
}
"""Name -> a pipeline that works, and what its recipe says."""

# of two views side by side, which each count as a step unless they are one batch
LAST_STEP = {"MultiDiffusion": Family(panorama, {"view_batch_size": 2}, (16, 576))}
"""Name -> a pipeline of which only the last step can be trained."""

REFUSED = {
    "aMUSEd": (Family(amused, one_by_one=True), OFF, "leaves the graph between its steps"),
    "Cosmos-Predict2": (Family(cosmos, SHORT), FULL, "disabled the safety checker.*without its safety_checker"),
    "GLIGEN": (Family(gligen), FULL, r"gligen\.py, line \d+\) with TypeError: .*go into pipeline\.options\.call"),
    "Hunyuan-DiT with PAG": (Family(hunyuan_dit_pag, OWN_SIZE, LARGER), OFF, "with RuntimeError: Sizes of tensors"),
    "Kandinsky 2.2": (Family(kandinsky_2_2, PRIOR, (64, 64)), FULL, r"pipelines of its own \(prior_pipe, decoder_pipe"),
    "Latent Consistency Models": (Family(partial(lcm, diffusers.DDIMScheduler)), FULL, "TypeError: DDIMScheduler"),
    "LDM3D": (Family(ldm3d), FULL, "leaves the graph on its way to the image: Can't call numpy"),
    "ParaDiGMS": (Family(paradigms), FULL, "takes 0 steps where its scheduler has 4"),
    "MultiDiffusion": (Family(panorama, {}, (16, 576)), FULL, "leaves the graph between its steps"),
    "PRX": (Family(prx, {**OWN_SIZE, "skip_text_cleaning": True}), FULL, r"pipeline\.options\.one_by_one: true"),
    "Safe Stable Diffusion": (
        Family(partial(of_stable_diffusion, "StableDiffusionPipelineSafe")), FULL, "leaves the graph on its way to"
    ),
    "Sana-Sprint": (Family(usual.sana_sprint, SANA, LARGER), NEGATIVE, "takes no negative prompt"),
}  # fmt: skip
"""Name -> a pipeline, a guidance with which it is refused, and the words."""
