"""`ocr`: real weights, those of the package rapidocr."""

from backend import Backend

from rewardtune.types import Prompt


def prompts() -> list[Prompt]:
    return [Prompt(f"a sign of number {i}", {"text": text}) for i, text in enumerate(("CAT", "REWARD", "42"))]


BACKEND = Backend("ocr", lambda folder: {}, prompts=prompts)
