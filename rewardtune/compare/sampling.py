"""Sides -> images on disk: the same prompts and seeds for each side, in batches of a fixed size.

`images/<side>/sampling.json` records everything that a plain diffusers script needs to draw the same images;
`reproduce.py` is that script. Images that are already there under the same record are kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rewardtune.compare.sides import Side, lora_file
from rewardtune.errors import RecipeError
from rewardtune.pages.files import sha256, write_bytes
from rewardtune.plugins import AnyPipeline, Guidance
from rewardtune.progress import Progress
from rewardtune.randomness import key
from rewardtune.recipe.sections import PipelineSection
from rewardtune.types import Prompt

RECORD = "sampling.json"


@dataclass(frozen=True)
class Plan:
    """What every side draws: `seeds` images of each prompt, prompt by prompt, `batch_size` at a time."""

    prompts: tuple[Prompt, ...]
    seeds: int = 2
    steps: int = 20
    guidance_scale: float = 4.0
    embedded_guidance: float | None = None
    batch_size: int = 4
    size: tuple[int, int] | None = None
    """Height and width; the pipeline's own when None."""

    @property
    def guidance(self) -> Guidance:
        """As `rewardtune.plugins` has it."""
        return Guidance("full", self.guidance_scale, embedded=self.embedded_guidance)

    @property
    def items(self) -> list[tuple[int, int]]:
        """(prompt, seed) indices in the order of drawing."""
        return [(p, k) for p in range(len(self.prompts)) for k in range(self.seeds)]


def image_seed(prompt: int, seed: int) -> int:
    """The seed of image `seed` of prompt `prompt`: 32 bits, so that every tool and JSON reader keeps it exactly."""
    return key(0, "compare", prompt, seed) & 0xFFFFFFFF


def image_file(prompt: int, seed: int) -> str:
    return f"{prompt:04d}-{seed}.png"


def require_pipelines(sides: Sequence[Side]) -> None:
    """Look whether each side's pipeline is one, before others are drawn for hours: its `model_index.json` is read, and
    fetched where it is the hub's; weights are not. Raises RecipeError, which names the side."""
    from rewardtune.build import choose_family

    known: list[PipelineSection] = []  # of those that sides share, the hub is asked once
    for side in sides:
        if side.pipeline in known:
            continue
        try:
            choose_family(side.pipeline)
        except RecipeError as error:
            raise RecipeError(f"{side.given}: {error}") from error
        known.append(side.pipeline)


def sample_sides(sides: Sequence[Side], plan: Plan, out: Path, *, device: str) -> None:
    """Draw what is missing under `out/images/<side>/`. A pipeline that several sides share is loaded once."""
    from torch import nn

    from rewardtune.diffusion import lora

    progress = Progress("drawing images", len(sides) * len(plan.items))
    loaded: tuple[Any, AnyPipeline] | None = None
    for side in sides:
        folder = out / "images" / side.name
        missing = _missing(folder, _fingerprint(side, plan, device), plan)
        progress.advance(len(plan.items) - sum(map(len, missing)))
        if not missing:
            continue
        if loaded is None or loaded[0] != side.pipeline:
            from rewardtune.build import load_pipeline

            loaded = None  # the old one is freed before the next is loaded
            loaded = (side.pipeline, load_pipeline(side.pipeline, device=device))
        pipeline = loaded[1]
        if side.lora is not None:
            lora.load(pipeline, side.lora)
            if isinstance(side.scale, float) and side.scale != 1.0:
                lora.set_scale([m for m in pipeline.pipe.components.values() if isinstance(m, nn.Module)], side.scale)
        _draw(pipeline, side, plan, folder, missing, device=device, progress=progress)
        if side.lora is not None:
            lora.unload(pipeline)


def _draw(
    pipeline: AnyPipeline,
    side: Side,
    plan: Plan,
    folder: Path,
    batches: Sequence[Sequence[tuple[int, int]]],
    *,
    device: str,
    progress: Progress,
) -> None:
    import torch

    from rewardtune.data.images import to_pil
    from rewardtune.diffusion.rollout import sample

    size = plan.size or pipeline.image_size
    record = {**_fingerprint(side, plan, device), **_provenance(pipeline, side, folder, size, plan.guidance)}
    _write_record(folder, record)
    for batch in batches:
        images = sample(
            pipeline,
            [str(plan.prompts[p]) for p, _ in batch],
            [torch.Generator().manual_seed(image_seed(p, k)) for p, k in batch],
            num_steps=plan.steps,
            guidance=plan.guidance,
            size=size,
            annealed=side.scale == "linear",
        )
        for (p, k), picture in zip(batch, to_pil(images), strict=True):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            write_bytes(folder / image_file(p, k), buffer.getvalue())
        progress.advance(len(batch))
    record["sha256"] = {image_file(p, k): sha256(folder / image_file(p, k)) for p, k in plan.items}
    _write_record(folder, record)


def _missing(folder: Path, wanted: dict[str, Any], plan: Plan) -> list[list[tuple[int, int]]]:
    """The batches to draw. Images of another record are removed first."""
    items = plan.items
    batches = [items[i : i + plan.batch_size] for i in range(0, len(items), plan.batch_size)]
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    if any(record.get(name) != value for name, value in json.loads(json.dumps(wanted)).items()):
        for file in folder.glob("*.png") if folder.is_dir() else ():
            if re.fullmatch(r"\d{4,}-\d+\.png", file.name):
                file.unlink()
        (folder / RECORD).unlink(missing_ok=True)
        return batches
    digests = record.get("sha256", {})

    def there(item: tuple[int, int]) -> bool:
        file = folder / image_file(*item)
        return file.is_file() and digests.get(file.name) in (None, sha256(file))

    return [batch for batch in batches if not all(map(there, batch))]


def _fingerprint(side: Side, plan: Plan, device: str) -> dict[str, Any]:
    """What the images depend on. Equal fingerprints: the images on disk can stay."""
    import torch

    return {
        "format": 1,
        # where parts wait changes no image
        "pipeline": {**side.pipeline.model_dump(exclude={"offload"}), "weights": _weights(side.pipeline.model)},
        "lora_sha256": sha256(file) if side.lora and (file := lora_file(side.lora)) else None,
        **({} if side.scale == 1.0 else {"lora_scale": side.scale}),
        "sampling": {
            "num_inference_steps": plan.steps,
            "guidance_scale": plan.guidance_scale,
            **({} if plan.embedded_guidance is None else {"embedded_guidance": plan.embedded_guidance}),
            "batch_size": plan.batch_size,
            "size": plan.size,
            "device": device,
            "threads": torch.get_num_threads(),
        },
        "images": [
            {"file": image_file(p, k), "prompt": str(plan.prompts[p]), "seed": image_seed(p, k)} for p, k in plan.items
        ],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _provenance(
    pipeline: AnyPipeline, side: Side, folder: Path, size: tuple[int, int], guidance: Guidance
) -> dict[str, Any]:
    """What the script needs beside the fingerprint."""
    from rewardtune.data.references import resolve

    path = resolve(side.pipeline.model)
    return {
        "side": side.name,
        "given": side.given,
        "load": {
            "path": str(Path(path).resolve()) if Path(path).exists() else path,
            "revision": side.pipeline.revision,
            "class": type(pipeline.pipe).__name__,
            "without": sorted(name for name, part in pipeline.pipe.components.items() if part is None),
        },
        # relative to this folder, so that a run folder can be moved as a whole
        "lora": os.path.relpath(side.lora.resolve(), folder.resolve()) if side.lora else None,
        "call": {"height": size[0], "width": size[1], **pipeline.call(guidance)},
        "python": platform.python_version(),
    }


def _weights(model: str) -> str | None:
    """A cheap mark of a local pipeline's files (names, sizes, times); None for a hub id, whose revision says enough."""
    from rewardtune.data.references import resolve

    folder = Path(resolve(model))
    if not folder.is_dir():
        return None
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    listing = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(listing).encode()).hexdigest()


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_bytes(folder / RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
