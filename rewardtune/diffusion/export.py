"""Trained weights -> files that diffusers loads, with card and provenance; reloaded and compared before it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.data.references import PREFIX, resolve
from rewardtune.diffusion.rollout import sample
from rewardtune.errors import CheckFailed
from rewardtune.plugins import AnyPipeline, Guidance

LORA_FILE = "pytorch_lora_weights.safetensors"
_THIS = '"path/to/this/folder"'
"""How a card's example names the folder that it lies in: folders are moved and uploaded."""
_PROBE_STEPS = 2


def lora(
    pipeline: AnyPipeline, modules: Sequence[str], folder: Path, provenance: Mapping[str, str], *, base: str
) -> None:
    """Write the adapters in diffusers' keys, with alpha = rank so that every loader applies them at full strength.

    Raises CheckFailed when a fresh pipeline with the file does not give the trained pipeline's images.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    layers: dict[str, Any] = {}
    for name in modules:
        module: Any = pipeline.trainable[name]
        config = module.peft_config["default"].to_dict()
        scale = config["lora_alpha"] / config["r"]
        state = get_peft_model_state_dict(module)
        layers[f"{name}_lora_layers"] = {
            k: (v * scale if "lora_B" in k else v).detach().cpu().contiguous() for k, v in state.items()
        }
        # peft keeps a set; sorted, the same run says the same in every process
        targets = sorted(config["target_modules"])
        layers[f"{name}_lora_adapter_metadata"] = {**config, "lora_alpha": config["r"], "target_modules": targets}
    type(pipeline.pipe).save_lora_weights(str(folder), **layers)
    file = folder / LORA_FILE
    with _open(file) as handle:
        metadata = handle.metadata() or {}
    save_file(load_file(file), file, metadata={**metadata, **_flat(provenance, base)})
    _check_lora(pipeline, modules, folder, base)
    _write_card(folder, provenance, base=base, adapters=True)


def pipeline(trained: AnyPipeline, folder: Path, provenance: Mapping[str, str], *, base: str) -> None:
    """Write the whole pipeline. Raises CheckFailed when it does not reload to the same images."""
    trained.pipe.save_pretrained(folder, safe_serialization=True)
    fresh = type(trained.pipe).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    for name, module in trained.trainable.items():
        _assert_same(name, module, getattr(fresh, name))
    (folder / "rewardtune.json").write_text(json.dumps(_flat(provenance, base), indent=1) + "\n")
    _write_card(folder, provenance, base=base, adapters=False)


def probe(pipe: AnyPipeline) -> Tensor:
    """A small fixed image, (1, 3, H, W): equal weights give an equal image."""
    generators = [torch.Generator().manual_seed(0)]
    return sample(pipe, ["a dog"], generators, num_steps=_PROBE_STEPS, guidance=Guidance("off"))


def _check_lora(trained: AnyPipeline, modules: Sequence[str], folder: Path, base: str) -> None:
    """Wrong keys load nothing in diffusers, silently: so load into a fresh pipeline and look at an image."""
    options = getattr(trained, "options", None)
    device = next(next(iter(trained.trainable.values())).parameters()).device
    dtype = next(p.dtype for n, p in trained.trainable[modules[0]].named_parameters() if "lora_" not in n)
    family: Any = type(trained)
    fresh = family.load(resolve(base), options, revision=None, dtype=dtype, device=str(device))
    fresh.pipe.set_progress_bar_config(disable=True)
    untouched = probe(fresh)
    fresh.pipe.load_lora_weights(str(folder), weight_name=LORA_FILE)
    loaded, wanted = probe(fresh), probe(trained)
    if not torch.allclose(loaded, wanted, atol=1e-5):
        raise CheckFailed(
            f"the exported adapters in {folder} do not give the trained pipeline's image when diffusers loads them "
            f"(largest difference {(loaded - wanted).abs().max():.2g}). The checkpoints of the run are untouched; "
            "please report this with the output of `rewardtune env`."
        )
    changed = any(bool(p.any()) for m in modules for n, p in trained.trainable[m].named_parameters() if "lora_B" in n)
    if changed and torch.equal(loaded, untouched):
        raise CheckFailed(f"diffusers loads {folder / LORA_FILE} without any effect; please report this.")


def _assert_same(name: str, left: nn.Module, right: nn.Module) -> None:
    other = right.state_dict()
    different = [k for k, v in left.state_dict().items() if not torch.equal(v.cpu(), other[k].to(v.dtype).cpu())]
    if different:
        raise CheckFailed(
            f"the exported {name} does not reload equal: {len(different)} tensors differ ({different[0]})"
        )


def _flat(provenance: Mapping[str, str], base: str) -> dict[str, str]:
    """Flat string metadata, safetensors' only kind, with the ModelSpec keys that model managers read."""
    return {
        **{f"rewardtune.{k}": str(v) for k, v in provenance.items()},
        "rewardtune.base": base,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": provenance.get("name", "rewardtune"),
    }


def _write_card(folder: Path, provenance: Mapping[str, str], *, base: str, adapters: bool) -> None:
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
    how = [*imports, "", f"pipe = DiffusionPipeline.from_pretrained({start})"]
    if adapters:
        how.append(f"pipe.load_lora_weights({_THIS})")
    example = "\n".join(how)
    facts = "\n".join(f"| {k} | `{str(v)[:200]}` |" for k, v in sorted(provenance.items()))
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n\n# {provenance.get('name', 'rewardtune')}\n\n"
        f"Trained with rewardtune from `{base}`.\n\n```python\n{example}\n```\n\n"
        f"| | |\n| --- | --- |\n{facts}\n"
    )


def _open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")
