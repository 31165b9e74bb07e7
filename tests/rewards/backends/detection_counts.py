"""`detection-counts`: RT-DETR's own classes and processor, small, with random weights."""

from pathlib import Path
from typing import Any

import torch
from backend import Backend
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessorPil, RTDetrResNetConfig

from rewardtune.types import Prompt


def make(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, d_model=16, encoder_hidden_dim=16, encoder_in_channels=[8, 8, 8],
        feat_strides=[8, 16, 32], encoder_ffn_dim=16, encoder_attention_heads=2, num_queries=12, decoder_layers=1,
        decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16, decoder_attention_heads=2, num_denoising=0,
        id2label={0: "cat", 1: "dog", 2: "red balloon"}, label2id={"cat": 0, "dog": 1, "red balloon": 2},
    )  # fmt: skip
    RTDetrForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return {"checkpoint": str(folder), "threshold": 0.02}


def prompts() -> list[Prompt]:
    wanted = ({"cat": 2}, {"dog": 1, "red balloon": 0}, {"cat": 1, "dog": 3})
    return [Prompt(f"a picture of number {i}", {"objects": objects}) for i, objects in enumerate(wanted)]


BACKEND = Backend("detection-counts", make, prompts=prompts)
