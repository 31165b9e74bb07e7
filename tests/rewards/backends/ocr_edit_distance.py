"""`ocr-edit-distance`: real weights, those of the package rapidocr, on pictures with words."""

import torch
from backend import Backend
from PIL import Image, ImageDraw, ImageFont

from rewardtune.data.images import to_tensor
from rewardtune.types import Prompt

WORDS = ("CAT", "REWARD", "42")


def prompts() -> list[Prompt]:
    return [Prompt(f'a sign that says "{word}"', {"text": word}) for word in WORDS]


def images() -> torch.Tensor:
    pictures = []
    for word in ("CAT", "RAWRD", "42"):
        picture = Image.new("RGB", (192, 96), (230, 220, 200))
        ImageDraw.Draw(picture).text((20, 20), word, fill=(30, 20, 60), font=ImageFont.load_default(40))
        pictures.append(picture)
    return to_tensor(pictures)


BACKEND = Backend("ocr-edit-distance", lambda folder: {}, prompts=prompts, images=images)
