"""Put together the untrained pocket pipeline: word tokenizer, small Qwen3, small Z-Image transformer, trained VAE.

Run by `make pocket`; `rewardtune train pocket/base-sft` trains what this writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from rewardtune.pocket.scenes import vocabulary

WIDTH = 160
TEXT_WIDTH = 128


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; unknown words become <unk>. The chat template adds an end mark, as small as one can be."""
    words = ["<pad>", "<unk>", "<start>", "<end>", *vocabulary()]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", bos_token="<start>",
        padding_side="right", model_max_length=512,
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<end>"]})
    tokenizer.chat_template = "{% for m in messages %}<start> {{ m['content'] }} <end>{% endfor %}"
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = word_tokenizer()
    # Z-Image reads the last hidden layer but one, so of three layers two are used
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=512, use_cache=False,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, dtype="float32",
        )
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=8, dim=WIDTH, n_layers=6, n_refiner_layers=1,
        n_heads=4, n_kv_heads=4, cap_feat_dim=TEXT_WIDTH, axes_dims=[8, 16, 16], axes_lens=[512, 64, 64],
        t_scale=1000.0,
    )  # fmt: skip
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=AutoencoderKL.from_pretrained(args.vae),
        text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip
    pipe.save_pretrained(args.out)
    for name in ("transformer", "text_encoder", "vae"):
        print(name, f"{sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6:.2f} M")


if __name__ == "__main__":
    main()
