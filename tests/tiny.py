"""Small pipelines of the real classes with random weights, for tests that need no trained model."""

from __future__ import annotations

import torch


def z_image(seed: int = 0):
    """A ZImagePipeline of about 60 thousand parameters: 16 x 16 pixels, 4 latent channels, word tokenizer."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    text = "a dog red cat on the left of two birds and one very long prompt"
    words = ["<pad>", "<unk>", *sorted(set(text.split()))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}a {{ m['content'] }}{% endfor %}"
    text = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1, sample_size=16, scaling_factor=0.6, shift_factor=0.1,
        ),
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=24, n_layers=2, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[512, 32, 32],
        ),
    )  # fmt: skip
    # the final layer starts at zero, which would hide every mistake behind it
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.2)
    pipe.set_progress_bar_config(disable=True)
    for component in (pipe.vae, pipe.text_encoder, pipe.transformer):
        component.eval().requires_grad_(False)
    return pipe
