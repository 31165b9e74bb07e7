"""`detection-counts`: are there as many of each object as the prompt wants? Counted by a detector, without gradient.

GenEval's counting (arXiv 2310.11513) with transformers' own object detectors. Named by `compare` and `guard`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from rewardtune.data.references import version, why_not_loaded
from rewardtune.errors import DataError, RecipeError
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.types import Score

CHECKPOINT = "PekingU/rtdetr_r50vd"
# the hub's page shows df939e6 as the head; in full as several public projects pin it
PINNED = {CHECKPOINT: "df939e661d8c52e80608d1ec566561aabd25a4e7"}


class DetectionCounts:
    """The loaded reward: a detector with a fixed list of classes, and the processor that its checkpoint comes with."""

    card = RewardCard(
        name="detection-counts",
        summary="share of the objects in the prompt's metadata `objects`, e.g. {cat: 2, dog: 1}, of which an object "
        "detector finds exactly as many; 0 means that there should be none",
        differentiable=False,
        needs_prompt=True,
        range=(0.0, 1.0),
        licence_code="Apache-2.0",
        pillow_difference=None,
        licence_weights="Apache-2.0",
        requires=("transformers",),
        models=PINNED,
        metadata=("objects",),
        gpu_memory_gib=0.2,
        reference="counting as in GenEval (arXiv 2310.11513), which uses Mask2Former of mmdetection",
    )

    class Config(Options):
        """Options of `detection-counts`."""

        checkpoint: str = CHECKPOINT
        """Folder or hub id of an object detector of transformers (RT-DETR, DETR, YOLOS and their kind)."""
        revision: str | None = None
        """Commit, tag or branch of a hub id."""
        threshold: float = Field(default=0.5, gt=0, lt=1)
        """Detections less certain than this do not count. The default is transformers' own."""

    def __init__(self, model: Any, processor: Any, config: Config) -> None:
        self._model, self._processor, self.config = model, processor, config
        self.names = {int(i): str(name).lower() for i, name in model.config.id2label.items()}
        loaded = version(config.checkpoint, config.revision or PINNED.get(config.checkpoint))
        self.card = replace(type(self).card, models={config.checkpoint: loaded})

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Load detector and processor, frozen. RecipeError where the checkpoint is no object detector."""
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        from rewardtune.backbones.weights import check_all_there

        revision = config.revision or PINNED.get(config.checkpoint)
        where = f"reward 'detection-counts': checkpoint {config.checkpoint!r}"
        try:
            # the processors that go through Pillow: those of torchvision are not for here
            processor = AutoImageProcessor.from_pretrained(config.checkpoint, revision=revision, backend="pil")
            loaded: Any = AutoModelForObjectDetection.from_pretrained(
                config.checkpoint, revision=revision, output_loading_info=True
            )
        except Exception as error:  # huggingface_hub, safetensors and transformers each raise their own
            raise RecipeError(
                f"{where} is no object detector of transformers that can be loaded: "
                f"{why_not_loaded(error, config.checkpoint)} Give the folder or hub id of one, such as "
                f"{CHECKPOINT}, or fetch its files again where they are damaged."
            ) from error
        model, report = loaded
        check_all_there(model, report["missing_keys"], what=where)
        return cls(model.to(device).eval().requires_grad_(False), processor, config)

    def count(self, images: Tensor) -> list[Counter[str]]:
        """How many of each class are seen in each of (B, 3, H, W) in [0, 1]. One image at a time: DETR pads a batch."""
        import torch

        from rewardtune.data.images import to_pil

        found = []
        for picture in to_pil(images):
            inputs = self._processor(images=[picture], return_tensors="pt").to(self._model.device)
            with torch.no_grad():
                outputs = self._model(**inputs)
            (seen,) = self._processor.post_process_object_detection(
                outputs, threshold=self.config.threshold, target_sizes=[picture.size[::-1]]
            )
            found.append(Counter(self.names[i] for i in seen["labels"].tolist()))
        return found

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. parts: `exact` (1 where every count is right), `off` (mean of |seen - wanted|).

        Raises DataError for a prompt whose `objects` are not names with counts, or a name that the detector lacks.
        """
        import torch

        from rewardtune.types import Score

        wanted = [self._wanted(prompt) for prompt in prompts]
        rows = []
        for counts, objects in zip(self.count(images), wanted, strict=True):
            off = [abs(counts[name] - number) for name, number in objects.items()]
            right = sum(distance == 0 for distance in off) / len(off)
            rows.append((right, float(right == 1), sum(off) / len(off)))
        value, exact, distance = torch.tensor(rows, device=images.device).unbind(1)
        return Score(value=value, parts={"exact": exact, "off": distance})

    def _wanted(self, prompt: str) -> dict[str, int]:
        from rewardtune.recipe.suggest import closest

        objects = getattr(prompt, "metadata", {}).get("objects")
        where = f"detection-counts: the prompt {str(prompt)[:80]!r}"
        if not isinstance(objects, Mapping) or not objects or not all(_is_count(n) for n in objects.values()):
            raise DataError(
                f"{where} has `objects` {objects!r}; expected names with how many of each there should be, such as "
                '{"cat": 2}.'
            )
        known = sorted(set(self.names.values()))
        for name in objects:
            if str(name).lower() not in known:
                raise DataError(
                    f"{where} wants {name!r}, which is not among the {len(known)} classes of "
                    f"{self.config.checkpoint}{closest(str(name).lower(), known) or '.'}"
                )
        return {str(name).lower(): number for name, number in objects.items()}


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
