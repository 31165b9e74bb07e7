"""`hpsv3`: Qwen2-VL and the head under the published names, small; the base gives config and tokenizer alone."""

from backend import Backend
from tiny_hpsv3 import write_files

BACKEND = Backend("hpsv3", write_files)
