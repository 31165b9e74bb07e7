"""What the authors of ImageReward publish, at a small size, with weights that are the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from reference_numbers import weights
from transformers import BertTokenizer

RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "reference/imagereward.json").read_text())
SHAPES = {name: shape for name, shape in RECORD["keys"].items() if not name.endswith("position_ids")}


def published(*, spread: float = RECORD["spread"]) -> dict[str, torch.Tensor]:
    state = weights(SHAPES, spread=spread)
    # the file holds these too
    positions = {name: torch.arange(shape[-1])[None] for name, shape in RECORD["keys"].items() if name not in SHAPES}
    return state | positions


def write_folder(folder: Path, *, spread: float = RECORD["spread"]) -> Path:
    """What the authors publish, at a small size, and a tokenizer of BERT's class."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(published(spread=spread), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(RECORD["med_config"]))
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), ",", "."]
    (folder / "vocab.txt").write_text("\n".join(vocab))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
