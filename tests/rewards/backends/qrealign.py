"""`qrealign`: Qwen3.5, small."""

from backend import Backend
from tiny_vlm import write_vlm

BACKEND = Backend("qrealign", lambda folder: {"checkpoint": str(write_vlm(folder, "qwen3_5")), "dtype": "float32"})
