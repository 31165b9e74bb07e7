"""Trained weights -> files that diffusers loads, with card and provenance; reloaded and compared before it is done."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.data.references import PREFIX, resolve
from rewardtune.diffusion import lora as lora_module
from rewardtune.diffusion import lora_files, offload
from rewardtune.diffusion.rollout import sample
from rewardtune.errors import CheckFailed
from rewardtune.plugins import AnyPipeline, Guidance

LORA_FILE = lora_files.DIFFUSERS
_THIS = '"path/to/this/folder"'
"""How a card's example names the folder that it lies in: folders are moved and uploaded."""
_PROBE_STEPS = 2
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of a pixel of the probe, by the frozen weights' dtype; bfloat16 has 8 bits, as a pixel has."""


def lora(
    pipeline: AnyPipeline,
    modules: Sequence[str],
    folder: Path,
    provenance: Mapping[str, str],
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Write the adapters in diffusers' keys, with alpha = rank so that every loader applies them at full strength.

    base, revision: the pipeline that they were trained on, as a recipe names it. Where diffusers has no loader for the
    family's adapters, the folder is peft's. Raises CheckFailed when a fresh pipeline with the file does not give the
    trained pipeline's images.
    """
    from safetensors.torch import load_file, save_file

    states, configs = {}, {}
    for name in modules:
        module: Any = pipeline.trainable[name]
        states[name] = lora_module.folded(module)
        config = copy.copy(module.peft_config[lora_module.ADAPTER])
        config.lora_alpha = config.r
        # peft keeps a set; sorted, the same run says the same in every process
        config.target_modules = sorted(config.target_modules)
        configs[name] = config
    if lora_module.has_loader(pipeline):
        layers = {f"{name}_lora_layers": state for name, state in states.items()}
        settings = {f"{name}_lora_adapter_metadata": config.to_dict() for name, config in configs.items()}
        pipeline.pipe.save_lora_weights(str(folder), **layers, **settings)
        file = folder / LORA_FILE
    else:
        (name,) = modules
        configs[name].save_pretrained(str(folder))
        file = folder / lora_files.PEFT
        save_file({f"base_model.model.{k}": v for k, v in states[name].items()}, file, metadata={"format": "pt"})
    with _open(file) as handle:
        metadata = handle.metadata() or {}
    save_file(load_file(file), file, metadata={**metadata, **provenance_metadata(provenance, base, revision)})
    _check_lora(pipeline, modules, folder, base, revision)
    _write_card(folder, provenance, pipeline, base=base, revision=revision, adapters=True)


def pipeline(
    trained: AnyPipeline, folder: Path, provenance: Mapping[str, str], *, base: str, revision: str | None = None
) -> None:
    """Write the whole pipeline. Raises CheckFailed when it does not reload to the same images."""
    trained.pipe.save_pretrained(folder, safe_serialization=True)
    without = dict.fromkeys(absent(trained.pipe))
    fresh = type(trained.pipe).from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **without)
    for name, module in trained.trainable.items():
        _assert_same(name, module, getattr(fresh, name))
    metadata = provenance_metadata(provenance, base, revision)
    (folder / "rewardtune.json").write_text(json.dumps(metadata, indent=1) + "\n")
    _write_card(folder, provenance, trained, base=base, revision=revision, adapters=False)


def merged(
    trained: AnyPipeline,
    modules: Sequence[str],
    folder: Path,
    provenance: Mapping[str, str],
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Fold the adapters into the weights, for good, and write the whole pipeline.

    Raises CheckFailed when that changes the images beyond rounding.
    """
    before = probe(trained)
    lora_module.merge({name: trained.trainable[name] for name in modules})
    after = probe(trained)
    if not torch.allclose(before, after, atol=1e-3):
        raise CheckFailed(
            "the merged weights do not give the adapters' image (largest difference "
            f"{(before - after).abs().max():.2g}); the run's checkpoints are untouched. Please report this with the "
            "output of `rewardtune env`."
        )
    pipeline(trained, folder, provenance, base=base, revision=revision)


def absent(pipe: Any) -> list[str]:
    """Components that a pipeline was loaded without though its class asks for them; loading again must say so again."""
    return sorted(n for n, part in pipe.components.items() if part is None and n not in pipe._optional_components)


def probe(pipe: AnyPipeline) -> Tensor:
    """A small fixed image, (1, 3, H, W): equal weights give an equal image."""
    generators = [torch.Generator().manual_seed(0)]
    return sample(pipe, ["a dog"], generators, num_steps=_PROBE_STEPS, guidance=Guidance("off"))


def _check_lora(trained: AnyPipeline, modules: Sequence[str], folder: Path, base: str, revision: str | None) -> None:
    """Wrong keys load nothing in diffusers, silently: so load into a fresh pipeline and look at an image."""
    options = getattr(trained, "options", None)
    adapted = {name: trained.trainable[name] for name in modules}
    parameters = [p for module in adapted.values() for name, p in module.named_parameters() if "lora_" not in name]
    dtype, device, away = parameters[0].dtype, parameters[0].device, offload.applied(trained)
    family: Any = type(trained)
    with lora_module.as_exported(adapted):
        wanted = probe(trained)
    with offload.aside(trained):  # the largest pipelines fit on a device once, not twice
        place = "cpu" if away else str(device)
        fresh = family.load(resolve(base), options, revision=revision, dtype=dtype, device=place)
        fresh.pipe.set_progress_bar_config(disable=True)
        if away:
            offload.apply(fresh, device=away, stay={fresh.denoiser})
        untouched = probe(fresh)
        lora_module.load(fresh, folder)
        loaded = probe(fresh)
        del fresh
    if not torch.allclose(loaded, wanted, atol=_TOLERANCE[dtype]):
        raise CheckFailed(
            f"the exported adapters in {folder} do not give the trained pipeline's image when they are loaded "
            f"(largest difference {(loaded - wanted).abs().max():.2g}). The checkpoints of the run are untouched; "
            "please report this with the output of `rewardtune env`."
        )
    changed = any(bool(p.any()) for module in adapted.values() for n, p in module.named_parameters() if "lora_B" in n)
    if changed and torch.equal(loaded, untouched):
        raise CheckFailed(f"the exported adapters in {folder} load without any effect; please report this.")


def _assert_same(name: str, left: nn.Module, right: nn.Module) -> None:
    other = right.state_dict()
    different = [k for k, v in left.state_dict().items() if not torch.equal(v.cpu(), other[k].to(v.dtype).cpu())]
    if different:
        raise CheckFailed(
            f"the exported {name} does not reload equal: {len(different)} tensors differ ({different[0]})"
        )


def provenance_metadata(provenance: Mapping[str, str], base: str, revision: str | None = None) -> dict[str, str]:
    """Flat string metadata, safetensors' only kind, with the ModelSpec keys that model managers read."""
    return {
        **{f"rewardtune.{k}": str(v) for k, v in provenance.items()},
        "rewardtune.base": base,
        **({} if revision is None else {"rewardtune.base_revision": revision}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": provenance.get("name", "rewardtune"),
    }


def _write_card(
    folder: Path,
    provenance: Mapping[str, str],
    trained: AnyPipeline,
    *,
    base: str,
    revision: str | None,
    adapters: bool,
) -> None:
    import yaml

    shipped = base.startswith(PREFIX)
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "rewardtune", *(["lora", "template:diffusion-lora"] if adapters else [])],
    }
    if not shipped and not Path(base).expanduser().exists():
        front["base_model"] = base
    imports, start = ["from diffusers import DiffusionPipeline"], f'"{base}"' if adapters else _THIS
    if adapters and shipped:
        imports, start = [*imports, "from rewardtune.data.references import resolve"], f"resolve({start})"
    peft = adapters and not lora_module.has_loader(trained)
    if peft:
        imports.append("from peft import PeftModel")
    without = "".join(f", {name}=None" for name in absent(trained.pipe))
    at = "" if revision is None else f" at `{revision}`"
    commit = f', revision="{revision}"' if adapters and revision is not None else ""
    how = [*imports, "", f"pipe = DiffusionPipeline.from_pretrained({start}{commit}{without})"]
    if peft:
        how.append(f"pipe.{trained.denoiser} = PeftModel.from_pretrained(pipe.{trained.denoiser}, {_THIS})")
    elif adapters:
        how.append(f"pipe.load_lora_weights({_THIS})")
    example = "\n".join(how)
    # the whole recipe is in the metadata of the weights, and no line of a table
    facts = "\n".join(f"| {k} | `{v}` |" for k, v in sorted(provenance.items()) if k != "recipe")
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n\n# {provenance.get('name', 'rewardtune')}\n\n"
        f"Trained with rewardtune from `{base}`{at}.\n\n```python\n{example}\n```\n\n"
        f"| | |\n| --- | --- |\n{facts}\n"
    )


def _open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")
