"""`vqascore`: Qwen2.5-VL, small."""

from backend import Backend
from tiny_vlm import write_vlm

BACKEND = Backend("vqascore", lambda folder: {"checkpoint": str(write_vlm(folder, "qwen2_5_vl")), "dtype": "float32"})
