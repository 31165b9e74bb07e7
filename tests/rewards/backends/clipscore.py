"""`clipscore` on a small CLIPModel."""

import tiny_clip
from backend import Backend

BACKEND = Backend("clipscore", lambda folder: {"model": tiny_clip.save(folder)})
