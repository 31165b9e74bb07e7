"""`hpsv2` on a small checkpoint in open_clip's layout, a pickle of torch as the published one."""

import json
from pathlib import Path

import numpy as np
import tiny_clip
import torch
from backend import Backend

FIGURES = json.loads((Path(__file__).parents[1] / "reference/hpsv2.json").read_text())


def weights(vocabulary: int | None = None) -> dict[str, torch.Tensor]:
    """Those that the stored figures were made with; with more words where a tokenizer needs them."""
    drawn = np.random.RandomState(0)
    found = {}
    for name, shape in FIGURES["keys"]:
        if vocabulary is not None and name == "token_embedding.weight":
            shape = [vocabulary, shape[1]]
        found[name] = tiny_clip.normal(drawn, tuple(shape), 0.08)
        if "ln_" in name and name.endswith("weight"):
            found[name] += 1
    return found | {"logit_scale": torch.tensor(1.5)}


def make(folder: Path) -> dict[str, str]:
    words = tiny_clip.tokenizer()
    words.save_pretrained(folder)
    torch.save({"state_dict": weights(len(words))}, folder / "HPS_v2.1_compressed.pt")
    return {"model": str(folder), "tokenizer": str(folder)}


BACKEND = Backend("hpsv2", make)
