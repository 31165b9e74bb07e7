"""Writes hpsv2.json and aesthetic.json beside it: figures of the authors' code with seeded weights. Not a test.

python record_clip.py HPSV2 V2 V1    # checkouts of the three repositories at the commits below
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers  # noqa: F401  before the stand-in for torchvision, of which it would ask more
from torch import nn

HPSV2 = ("github.com/tgxs002/HPSv2", "866735ecaae999fa714bd9edfa05aa2672669ee3")
HEAD_2 = ("github.com/christophschuhmann/improved-aesthetic-predictor", "6934dd81792f086e613a121dbce43082cb8be85e")
FEATURES = ("image_features", "text_features")
HEAD_1 = ("github.com/LAION-AI/aesthetic-predictor", "6d122adad522ab246644d9dc1c6d7a3810ee255f")


def seeded(module: nn.Module, seed: int) -> tuple[list, dict[str, torch.Tensor]]:
    drawn = np.random.RandomState(seed)
    keys = [[name, list(tensor.shape)] for name, tensor in module.state_dict().items()]
    tensors = {n: torch.from_numpy(np.asarray(drawn.standard_normal(s) * 0.08, dtype=np.float32)) for n, s in keys}
    return keys, tensors


def clip(checkout: Path) -> dict:
    """Of open_clip's model file alone; torchvision's part in it is a batch norm that a ViT has not."""
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = nn.Identity  # type: ignore[attr-defined]
    package = types.ModuleType("theirs")
    package.__path__ = [str(checkout / "hpsv2/src/open_clip")]
    sys.modules["theirs"] = package
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 99, "width": 128, "heads": 2, "layers": 2},
    }
    model = importlib.import_module("theirs.model").CLIP(**config, output_dict=True).eval()
    keys, tensors = seeded(model, 0)
    for name in tensors:
        if "ln_" in name and name.endswith("weight"):
            tensors[name] += 1
    model.load_state_dict(tensors | {"logit_scale": torch.tensor(1.5)})
    drawn = np.random.RandomState(1)
    pixels = torch.from_numpy(drawn.standard_normal((3, 3, 28, 28)).astype(np.float32))
    ids = np.zeros((3, 77), dtype=np.int64)
    for row, words in enumerate((1, 5, 75)):
        ids[row, 0], ids[row, 1 + words] = 97, 98
        ids[row, 1 : 1 + words] = drawn.randint(1, 97, words)
    with torch.no_grad():
        out = model(pixels, torch.from_numpy(ids))
    features = {name: [[round(float(x), 8) for x in row] for row in out[name]] for name in FEATURES}
    return {
        "repository": HPSV2[0], "commit": HPSV2[1],
        "what": "hpsv2/src/open_clip CLIP, small ViT with heads as wide as ViT-H-14's", "config": config,
        "weights": "numpy.random.RandomState(0).standard_normal of each key in this order, times 0.08; plus 1 for the "
        "weights of ln_*; logit_scale 1.5",
        "inputs": "numpy.random.RandomState(1): standard_normal pixels (3, 3, 28, 28), normalised; then ids",
        "keys": keys, "ids": [[int(x) for x in row if x] for row in ids], **features,
        "cosine": [round(float(x), 8) for x in (out[FEATURES[0]] * out[FEATURES[1]]).sum(-1)],
        "logit_scale": float(out["logit_scale"]),
    }  # fmt: skip


def heads(second: Path, first: Path) -> dict:
    """The class of version 2 as it stands in its script, and the linear layer that version 1's README makes."""
    script = (second / "simple_inference.py").read_text()
    theirs: dict = {"pl": types.SimpleNamespace(LightningModule=nn.Module), "nn": nn, "torch": torch, "np": np}
    exec(script[script.index("class MLP") : script.index("model = MLP(768)")], theirs)
    embedding = np.random.RandomState(3).standard_normal((4, 24)).astype(np.float32)
    found: dict = {
        "weights": "numpy.random.RandomState(2).standard_normal of each key in this order, times 0.08",
        "inputs": "numpy.random.RandomState(3).standard_normal((4, 24)), before they are given unit length",
    }
    for version, source, head, file in (
        ("2", HEAD_2, theirs["MLP"](24).eval(), second / "sac+logos+ava1-l14-linearMSE.pth"),
        ("1", HEAD_1, nn.Linear(24, 1), first / "sa_0_4_vit_l_14_linear.pth"),
    ):
        keys, tensors = seeded(head, 2)
        head.load_state_dict(tensors)
        with torch.no_grad():
            values = head(torch.from_numpy(theirs["normalized"](embedding)).float())[:, 0]
        published = torch.load(file, weights_only=True, map_location="cpu")
        found[version] = {
            "repository": source[0], "commit": source[1], "keys": keys,
            "values": [round(float(x), 8) for x in values],
            "published_keys": {name: list(tensor.shape) for name, tensor in published.items()},
        }  # fmt: skip
    return found


def write(document: dict, name: str) -> None:
    text = json.dumps(document, indent=1)
    flat = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)
    (Path(__file__).parent / name).write_text(flat + "\n")


if __name__ == "__main__":
    hpsv2, second, first = map(Path, sys.argv[1:])
    write(clip(hpsv2), "hpsv2.json")
    write(heads(second, first), "aesthetic.json")
