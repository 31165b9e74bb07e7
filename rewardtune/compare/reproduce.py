"""Draw the images of this comparison again with diffusers alone, and compare them with the ones in images/.

    python reproduce.py [SIDE ...]

Needs torch and diffusers (and peft for LoRA sides); rewardtune is not imported. New images go to reproduced/<side>/.
Exit status 0 when every pixel is equal, 1 otherwise. Equal pixels need the same machine type, versions, device, number
of threads and batch size; all of them are in images/<side>/sampling.json, and what differs here is named.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def draw(side: str) -> int:
    """Draw one side; returns the number of images that differ."""
    import diffusers
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    folder, target = HERE / "images" / side, HERE / "reproduced" / side
    record: dict[str, Any] = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))
    sampling, images = record["sampling"], record["images"]
    for module in (torch, diffusers, transformers):
        recorded = record["versions"][module.__name__]
        if module.__version__ != recorded:
            print(f"note: {module.__name__} {module.__version__} here, {recorded} then")
    torch.set_num_threads(sampling["threads"])

    load = record["load"]
    dtype = record["pipeline"].get("dtype", "float32")
    if dtype != "float32":
        print(f"note: {dtype} weights; the pictures were drawn with latents in float32, which diffusers may round")
    family: Any = diffusers.DiffusionPipeline
    pipe = family.from_pretrained(
        load["path"], revision=load["revision"], dtype=getattr(torch, dtype), use_safetensors=True,
        **dict.fromkeys(load.get("without", ())),
    ).to(sampling["device"])  # fmt: skip
    if getattr(pipe, "watermark", None) is not None:
        pipe.watermark = None  # the images to compare with have none
    lora = folder / record["lora"] if record["lora"] else None
    if lora and not (lora / "adapter_model.safetensors").is_file():
        pipe.load_lora_weights(str(lora), weight_name="pytorch_lora_weights.safetensors")
    elif lora:
        from peft import PeftModel

        name = "unet" if getattr(pipe, "transformer", None) is None else "transformer"
        setattr(pipe, name, PeftModel.from_pretrained(getattr(pipe, name), str(lora)))
    pipe.set_progress_bar_config(disable=True)
    scale = record.get("lora_scale", 1.0)
    if scale == "linear":
        anneal(pipe)
    elif scale != 1.0:
        set_scale(pipe.components.values(), scale)

    target.mkdir(parents=True, exist_ok=True)
    different, largest, size = 0, 0, sampling["batch_size"]
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        call = dict(record["call"])
        if "negative_prompt" in call:  # some pipelines want one for each prompt
            call["negative_prompt"] = [call["negative_prompt"]] * len(batch)
        pictures = pipe(
            prompt=[image["prompt"] for image in batch],
            generator=[torch.Generator().manual_seed(image["seed"]) for image in batch],
            num_inference_steps=sampling["num_inference_steps"],
            **call,
        )[0]  # not every pipeline calls them images
        for image, drawn in zip(batch, pictures, strict=True):
            picture = drawn
            if drawn.mode == "RGBA":  # the pictures to compare with lie over white
                picture = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)
            picture.save(target / image["file"])
            old = np.asarray(Image.open(folder / image["file"]).convert("RGB"), dtype=int)
            gap = int(np.abs(old - np.asarray(picture.convert("RGB"), dtype=int)).max())
            different, largest = different + (gap > 0), max(largest, gap)
    print(f"{side}: {len(images) - different} of {len(images)} images equal, largest difference {largest} of 255")
    return different


def set_scale(modules: Any, scale: float) -> None:
    """Let the adapters of all modules add `scale` times what they do."""
    for module in modules:
        for layer in module.modules() if hasattr(module, "modules") else ():
            if hasattr(layer, "set_scale") and hasattr(layer, "lora_A"):
                for adapter in layer.active_adapters:
                    layer.set_scale(adapter, scale)


def anneal(pipe: Any) -> None:
    """Raise the scale of the denoiser's adapters to i / T before step i of T."""
    denoiser = pipe.unet if getattr(pipe, "transformer", None) is None else pipe.transformer
    scheduler, done = pipe.scheduler, [0]
    step, set_timesteps = scheduler.step, scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # pipelines ask for its signature
    def start(*given: Any, **named: Any) -> Any:
        done[0] = 0
        set_scale([denoiser], 0.0)
        return set_timesteps(*given, **named)

    @functools.wraps(step)
    def counted(*given: Any, **named: Any) -> Any:
        after = step(*given, **named)
        done[0] += 1
        set_scale([denoiser], done[0] / len(scheduler.timesteps))
        return after

    scheduler.set_timesteps, scheduler.step = start, counted


if __name__ == "__main__":
    known = sorted(path.parent.name for path in (HERE / "images").glob("*/sampling.json"))
    unknown = [side for side in sys.argv[1:] if side not in known]
    if unknown:
        sys.exit(f"no side {', '.join(unknown)} here; there are: {', '.join(known)}")
    sys.exit(1 if sum(draw(side) for side in sys.argv[1:] or known) else 0)
