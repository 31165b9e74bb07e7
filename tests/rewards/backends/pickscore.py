"""`pickscore` on a small CLIPModel."""

import tiny_clip
from backend import Backend

BACKEND = Backend("pickscore", lambda folder: {"model": tiny_clip.save(folder)})
