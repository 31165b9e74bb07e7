"""How hpsv3.json was made: the code of MizzenAI/HPSv3 (PyPI hpsv3 1.0.0), run once at a small size. Not a test; run

    python record_hpsv3.py FOLDER_OF_THE_WHEEL OUT.json

with transformers 4.45.2, which that package pins. What its module imports for training alone is stood in for.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration  # noqa: F401 # before the stand-ins

sys.path.insert(0, str(Path(__file__).parents[2]))
from reference_numbers import uniform, weights

IMAGE, PAD, REWARD = 100, 99, 119
TEXT = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
}  # fmt: skip
MROPE = [2, 3, 3]
VISION = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14,
          "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}  # fmt: skip
GRIDS = [[1, 4, 4], [1, 2, 6]]


def main(wheel: Path, out: Path) -> None:
    for name in ("matplotlib", "matplotlib.pyplot", "matplotlib.patches", "pandas", "datasets", "peft", "torchvision",
                 "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io", "requests",
                 "torch.utils.tensorboard", "hpsv3.utils.training_utils", "transformers.trainer",
                 "transformers.trainer_pt_utils", "transformers.training_args"):  # fmt: skip
        sys.modules[name] = MagicMock()
    callback = types.ModuleType("transformers.trainer_callback")
    callback.TrainerCallback = callback.TrainerControl = callback.TrainerState = object  # type: ignore[attr-defined]
    sys.modules["transformers.trainer_callback"] = callback
    trl = types.ModuleType("trl")
    trl.RewardTrainer = object  # type: ignore[attr-defined]
    sys.modules["trl"] = trl
    package = types.ModuleType("hpsv3")
    package.__path__ = [str(wheel / "hpsv3")]  # type: ignore[attr-defined]
    sys.modules["hpsv3"] = package
    reference = importlib.import_module("hpsv3.model.qwen2vl_trainer").Qwen2VLRewardModelBT
    words = importlib.import_module("hpsv3.dataset.data_collator_qwen")

    config = Qwen2VLConfig(
        **TEXT, vision_config=VISION, rope_scaling={"type": "mrope", "mrope_section": MROPE}, image_token_id=IMAGE,
        video_token_id=98, vision_start_token_id=97, vision_end_token_id=96, pad_token_id=PAD, use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = reference(config, output_dim=2, special_token_ids=[REWARD], rm_head_type="ranknet").eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(weights(shapes, spread=0.2), strict=True)

    counts = [t * h * w for t, h, w in GRIDS]
    patches = 4 * uniform("patches", (sum(counts), 1176)) - 2
    rows = []
    for n, count in enumerate(counts):
        said = (90 * uniform(f"words {n}", (11 + 7 * n,))).long().tolist()
        rows.append([*said[:5], 97, *[IMAGE] * (count // 4), 96, *said[5:], REWARD, 7, 8])
    longest = max(map(len, rows))
    # the reference pads on the right
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    patches.requires_grad_(True)
    read = model(input_ids=ids, attention_mask=mask, pixel_values=patches, image_grid_thw=torch.tensor(GRIDS),
                 return_dict=True)["logits"]  # fmt: skip
    (gradient,) = torch.autograd.grad(read[:, 0].sum(), patches)
    text = words.INSTRUCTION.format(text_prompt="a red fox") + words.prompt_with_special_token
    document = {
        "source": "https://github.com/MizzenAI/HPSv3",
        "version": "PyPI hpsv3 1.0.0; the same forward as model/qwen2vl_trainer.py at d232ff8",
        "ran": "Qwen2VLRewardModelBT.forward at small sizes, transformers 4.45.2",
        "text": TEXT, "mrope_section": MROPE, "vision": VISION, "image_token_id": IMAGE, "reward_token_id": REWARD,
        "spread": 0.2, "keys": shapes, "rows": rows, "grids": GRIDS, "read": read.tolist(),
        "gradient_norm": gradient.norm().item(), "gradient": gradient[[0, 9, 20], :6].tolist(),
        "said_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }  # fmt: skip
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(read)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
