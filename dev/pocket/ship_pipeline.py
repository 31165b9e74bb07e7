"""Copy the trained pocket pipeline into the package, the transformer in bfloat16: what ships is what is compared.

Run by `make pocket`. The text encoder and the autoencoder stay float32: transformers loads a checkpoint in the dtype it
was stored in, and plain `DiffusionPipeline.from_pretrained` must give one dtype throughout.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = target / "transformer/diffusion_pytorch_model.safetensors"
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    total = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"{target}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
