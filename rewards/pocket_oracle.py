"""`pocket-oracle`, the held-out judge of the pocket world: reads a picture's facts back and measures cleanliness.

Named by `compare`; no shipped recipe trains on it. It shares nothing with the scorer but the artwork.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from rewardtune.errors import DataError
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.pocket.oracle import Oracle, Reading
    from rewardtune.types import Score

FACTS_SHARE = 0.75
"""Weight of the facts in the verdict, the rest is cleanliness. Ours, fixed before any method was run: what a caption
asks for comes first, so that no gain in sharpness makes up for a whole missing object (three facts or more), yet two
pictures with the same facts are still told apart by how well they are drawn."""

TIE_BAND = 0.02
"""Two verdicts closer than this are a tie. Ours, fixed before the first comparison: a single fact weighs at least
0.75 / 13 = 0.058 (a caption makes at most 13 claims) and so always decides when cleanliness is equal; differences in
cleanliness alone count from 0.08 on, about twice the reading's spread over redrawings of one and the same fault."""

PART_TIE_BANDS = {"facts": 0.0, "all_facts": 0.0, "cleanliness": 0.08}
"""The same for the parts that `compare` reports apart: facts are counts and differ or do not."""

KINDS = ("object", "count", "colour", "size", "relation", "background")


class PocketOracle:
    """The loaded judge."""

    card = RewardCard(
        name="pocket-oracle",
        summary="held-out judge of the pocket world: facts of the caption (objects, counts, colours, sizes, relations, "
        "background) and cleanliness, read by a detector of its own",
        differentiable=False,
        needs_prompt=True,
        range=(0.0, 1.0),
        licence_code="Apache-2.0",
        native_resolution=64,
        licence_weights="Apache-2.0",
        held_out=True,
        metadata=("facts",),
        models={"pocket:oracle": "shipped"},
    )
    TIE_BAND = TIE_BAND
    PART_TIE_BANDS = PART_TIE_BANDS

    class Config(Options):
        """No options: a judge that could be adjusted would not be one."""

    def __init__(self, model: Oracle, *, device: str | torch.device) -> None:
        self._model, self._device = model, device

    @classmethod
    def load(cls, config: Options, *, device: str | torch.device = "cpu") -> Self:
        """The shipped weights. DataError when they are damaged."""
        from rewardtune.data.references import pocket_path
        from rewardtune.pocket.oracle import load

        model = load(pocket_path("pocket:oracle"), device=device)
        return cls(model, device=device)

    def read(self, images: Tensor, claims: Sequence[Sequence[Mapping[str, Any]]] | None = None) -> list[Reading]:
        """What it sees in images (B, 3, H, W) in [0, 1], each with the facts of its caption, against whose artwork it
        compares; sizes other than 64 x 64 are resized."""
        from rewardtune.pocket.oracle import read

        if tuple(images.shape[-2:]) != (64, 64):
            from rewardtune.data.images import resize

            images = resize(images, (64, 64))
        return read(self._model, images.detach().to(self._device), claims)

    def check(self, reading: Reading, facts: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Whether each fact holds in a reading."""
        from rewardtune.pocket.oracle import check

        return check(reading, facts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """Graded verdict of images (B, 3, H, W) in [0, 1]; each prompt carries its facts as metadata.

        value: 0.75 x share of facts that hold + 0.25 x cleanliness, in [0, 1]. parts: `facts`, `all_facts` (0 or 1),
        `cleanliness`, and `facts/<kind>` (NaN where a prompt has no fact of the kind). No gradient. DataError for a
        prompt without facts.
        """
        import torch

        from rewardtune.types import Score

        claims = [facts_of(prompt) for prompt in prompts]
        if len(claims) != len(images):
            raise DataError(f"pocket-oracle: {len(images)} images came with {len(claims)} prompts; give one an image.")
        readings = self.read(images, claims)
        rows: list[dict[str, float]] = []
        for reading, facts in zip(readings, claims, strict=True):
            held = self.check(reading, facts)
            row = {"facts": sum(held) / len(held), "all_facts": float(all(held)), "cleanliness": reading.cleanliness}
            for kind in KINDS:
                own = [h for h, fact in zip(held, facts, strict=True) if fact["kind"] == kind]
                row[f"facts/{kind}"] = sum(own) / len(own) if own else float("nan")
            rows.append(row)
        parts = {name: torch.tensor([row[name] for row in rows], device=images.device) for name in rows[0]}
        value = FACTS_SHARE * parts["facts"] + (1 - FACTS_SHARE) * parts["cleanliness"]
        return Score(value=value, parts=parts)


def facts_of(prompt: str) -> Sequence[Mapping[str, Any]]:
    """The facts that a prompt carries. DataError when it has none."""
    facts = getattr(prompt, "metadata", {}).get("facts")
    if not isinstance(facts, list | tuple) or not facts or not all(isinstance(f, Mapping) for f in facts):
        raise DataError(
            f"pocket-oracle: the prompt {str(prompt)!r} carries no facts. This judge is for prompts of the pocket "
            "world, whose lines have a `facts` list beside `prompt`: use `pocket:prompts/heldout` or a JSONL file of "
            "that form, or another judge."
        )
    return facts
