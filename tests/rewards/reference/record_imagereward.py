"""How imagereward.json was made: the code of THUDM/ImageReward, run once at a small size. Not a test; run it as

    python record_imagereward.py CHECKOUT TIMM OUT.json

with transformers 4.45.2 and, for `timm`, the folder of timm 0.6.13's wheel. Only what that code imports and does not
use for a score is stood in for (fairscale, torchvision, the optimisers of timm); PatchEmbed is timm's own.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import torch
import transformers.models.bert.modeling_bert  # noqa: F401 # before the stand-ins, which it would take for the real packages
from transformers import BertTokenizer  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2]))
from reference_numbers import uniform, weights

VISION = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
TEXT = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 64, "model_type": "bert", "num_attention_heads": 1,
    "num_hidden_layers": 2, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 120, "encoder_width": 768,
    "add_cross_attention": True,
}  # fmt: skip
LENGTHS = (35, 9, 1)


def stand_in(name: str, **members: object) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    module.__path__ = []  # type: ignore[attr-defined]
    sys.modules[name] = module


def main(checkout: Path, timm: Path, out: Path) -> None:
    for name, folder in (("timm", timm / "timm"), ("timm.models", timm / "timm/models")):
        stand_in(name)
        sys.modules[name].__path__ = [str(folder)]  # type: ignore[attr-defined]
    layers = importlib.import_module("timm.models.layers")
    stand_in("timm.models.vision_transformer", _cfg=dict, PatchEmbed=layers.PatchEmbed)
    stand_in("timm.models.registry", register_model=lambda f: f)
    stand_in("timm.models.helpers", named_apply=None, adapt_input_conv=None)
    stand_in("timm.models.hub", download_cached_file=None)
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        stand_in(name)
    stand_in("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=lambda m: m)
    stand_in("torchvision")
    nothing = lambda *a, **k: None  # noqa: E731
    stand_in("torchvision.transforms", Compose=nothing, Resize=nothing, CenterCrop=nothing, ToTensor=nothing,
             Normalize=nothing, InterpolationMode=types.SimpleNamespace(BICUBIC=3))  # fmt: skip
    # these packages' __init__ also imports CLIP and diffusers
    for name in ("ImageReward", "ImageReward.models"):
        stand_in(name)
        sys.modules[name].__path__ = [str(checkout / name.replace(".", "/"))]  # type: ignore[attr-defined]
    pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")
    reference = importlib.import_module("ImageReward.ImageReward")
    # the published sizes are written into these functions; the small ones take their place
    pretrain.create_vit = lambda *a, **k: (vit.VisionTransformer(**VISION), VISION["embed_dim"])
    pretrain.init_tokenizer = lambda: None
    config = out.parent / "med_config.tmp.json"
    config.write_text(json.dumps(TEXT))
    model = reference.ImageReward(str(config))
    config.unlink()
    model.mlp = reference.MLP(TEXT["hidden_size"])
    model.eval()
    stored = {name: list(value.shape) for name, value in model.state_dict().items()}
    numbers = {name: shape for name, shape in stored.items() if not name.endswith("position_ids")}
    lacking, unknown = model.load_state_dict(weights(numbers, spread=0.25), strict=False)
    assert not unknown and all(name.endswith("position_ids") for name in lacking), (lacking, unknown)

    count = len(LENGTHS)
    pixels = 4 * uniform("pixels", (count, 3, 32, 32)) - 2
    ids = (1 + (TEXT["vocab_size"] - 1) * uniform("ids", (count, 35))).long()
    mask = torch.tensor([[1] * length + [0] * (35 - length) for length in LENGTHS])
    ids = ids * mask
    pixels.requires_grad_(True)
    with torch.enable_grad():
        scores = model.score_gard(ids, mask, pixels)[:, 0]
        (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    with torch.no_grad():
        seen = model.blip.visual_encoder(pixels)
    commit = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    document = {
        "source": "https://github.com/THUDM/ImageReward",
        "commit": (sys.argv[4] if len(sys.argv) > 4 else commit.stdout.strip()),
        "ran": "ImageReward.score_gard and blip.visual_encoder at small sizes, transformers 4.45.2, timm 0.6.13",
        "med_config": TEXT, "vision": VISION, "spread": 0.25, "lengths": LENGTHS, "keys": stored,
        "scores": scores.tolist(), "gradient_norms": gradient.flatten(1).norm(dim=1).tolist(),
        "gradient": gradient[:, :, 3, 5].tolist(), "class_features": seen[:, 0, :8].tolist(),
    }  # fmt: skip
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(scores.tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
