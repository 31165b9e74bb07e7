"""Small pipelines of the real classes with random weights, for tests that need no trained model."""

from __future__ import annotations

import torch


def z_image(seed: int = 0):
    """A ZImagePipeline of about 60 thousand parameters: 16 x 16 pixels, 4 latent channels, word tokenizer."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    tokenizer = words(chat_template="{% for m in messages %}a {{ m['content'] }}{% endfor %}")
    text = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=0.6, shift_factor=0.1),
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=24, n_layers=2, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[512, 32, 32],
        ),
    )  # fmt: skip
    return ready(pipe)


def stable_diffusion(scheduler):
    """A StableDiffusionPipeline of about 60 thousand parameters: 16 x 16 pixels, 4 latent channels."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=autoencoder(scaling_factor=0.6),
        text_encoder=CLIPTextModel(clip()),
        tokenizer=words(length=16),
        unet=UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=4,
        ),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return ready(pipe)


def stable_diffusion_xl(scheduler, *, force_zeros: bool = True, vae: dict | None = None, unet: dict | None = None):
    """A StableDiffusionXLPipeline of about 120 thousand parameters: 16 x 16 pixels, 4 latent channels."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.6, **(vae or {})),
        text_encoder=CLIPTextModel(clip()),
        text_encoder_2=CLIPTextModelWithProjection(clip()),
        tokenizer=words(length=16),
        tokenizer_2=words(length=16),
        unet=UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
            cross_attention_dim=32, attention_head_dim=(2, 4), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
            **(unet or {}),
        ),
        scheduler=scheduler, force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
    )  # fmt: skip
    return ready(pipe)


def stable_diffusion_3(*, t5: bool = True, scheduler: dict | None = None, transformer: dict | None = None):
    """A StableDiffusion3Pipeline of about 60 thousand parameters: 16 x 16 pixels, 4 latent channels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=32,
            pos_embed_max_size=8, **(transformer or {}),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **(scheduler or {})}),
        vae=autoencoder(scaling_factor=0.6, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip()),
        tokenizer=words(length=16),
        text_encoder_2=CLIPTextModelWithProjection(clip()),
        tokenizer_2=words(length=16),
        text_encoder_3=t5_encoder(40) if t5 else None,
        tokenizer_3=words(end_only=True) if t5 else None,
    )  # fmt: skip
    return ready(pipe)


def pixart_sigma():
    """A PixArtSigmaPipeline of about 40 thousand parameters: 16 x 16 pixels, 4 latent channels and their variance."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    pipe = PixArtSigmaPipeline(
        tokenizer=words(end_only=True),
        text_encoder=t5_encoder(24),
        vae=autoencoder(scaling_factor=0.6),
        transformer=PixArtTransformer2DModel(
            sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
            cross_attention_dim=16, caption_channels=24, use_additional_conditions=False,
        ),
        # written out, though these are the defaults: a value that was left out would be taken for the class's own later
        scheduler=DPMSolverMultistepScheduler(
            num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", solver_order=2,
            prediction_type="epsilon", algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True,
            timestep_spacing="linspace", use_karras_sigmas=False,
        ),
    )  # fmt: skip
    return ready(pipe)


def t5_encoder(width: int):
    """A small T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    return T5EncoderModel(config)


def clip():
    """Configuration of a small CLIP text encoder."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=0, projection_dim=16,
    )  # fmt: skip


def words(*, length: int = 512, chat_template: str | None = None, end_only: bool = False):
    """A tokenizer of whole words: `<s> words </s>` (T5 has only the end's token), padded on the right."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    text = "a dog red cat on the left of two birds and one very long prompt"
    vocabulary = ["<pad>", "<unk>", "<s>", "</s>", *sorted(set(text.split()))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if chat_template is None:
        form = "$A </s>" if end_only else "<s> $A </s>"
        core.post_processor = processors.TemplateProcessing(form, None, [("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=length, chat_template=chat_template, padding_side="right",
    )  # fmt: skip


def autoencoder(**config):
    """An AutoencoderKL that halves the sides, 4 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, sample_size=16, **config,
    )  # fmt: skip


def ready(pipe):
    """Frozen, in eval mode, without progress bars, and no layer at zero, which would hide every mistake behind it."""
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
            for parameter in component.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.2)
    return pipe
