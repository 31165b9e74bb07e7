"""`imagereward`: BLIP of transformers under the published names, small."""

from __future__ import annotations

from pathlib import Path

from backend import Backend
from tiny_blip import write_folder


def make(folder: Path) -> dict[str, str]:
    # the figures of its authors' code are recorded with weights so large that a rounded pixel moves the score
    return {"checkpoint": str(write_folder(folder, spread=0.1)), "tokenizer": str(folder)}


BACKEND = Backend("imagereward", make)
