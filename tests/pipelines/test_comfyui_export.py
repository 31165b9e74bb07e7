"""`export --format comfyui` of trained runs: what lies in the file are the run's weights under the names of ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import like_comfyui
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from families import stable_diffusion, z_image
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from rewardtune.cli.app import app
from rewardtune.diffusion import export
from rewardtune.recipe.file import load_recipe
from rewardtune.training.run import export_run, train_recipe

RANK, ALPHA = 2, 6
CASES = {
    # family, modules with adapters, and how a layer's name begins in the file
    "kohya": (stable_diffusion.FAMILY, {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_"}),
    "diffusers": (z_image.FAMILY, {"transformer": "transformer."}),
}


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    """(how the family is named, its run folder, its base): three steps of SFT with averaged weights."""
    family, modules = CASES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    family.make().save_pretrained(root / "base")
    Image.new("RGB", (16, 16), "red").save(root / "a.png")
    (root / "manifest.jsonl").write_text(json.dumps({"image": "a.png", "caption": "dog"}) + "\n")
    document = {
        "task": "sft", "pipeline": {"model": str(root / "base")}, "data": {"manifest": str(root / "manifest.jsonl")},
        "lora": {"rank": RANK, "alpha": ALPHA, "modules": list(modules)}, "optimizer": {"lr": 0.1},
        "train": {"steps": 3, "batch_size": 2, "device": "cpu", "ema_decay": 0.5}, "samples": {"prompts": []},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(document))
    return request.param, train_recipe(load_recipe(str(root / "recipe.yaml")), out=root / "run"), root / "base"


def deltas(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(module, layer) -> what the run's averaged adapters add to the layer's weight: alpha / rank * B A."""
    kept = load_file(folder / "checkpoints/step-000003/ema.safetensors")
    found = {}
    for path, b in kept.items():
        if ".lora_B." in path:
            module, _, layer = path.partition(".lora_B.")[0].partition(".")
            found[module, layer] = ALPHA / RANK * b @ kept[path.replace(".lora_B.", ".lora_A.")]
    return found


def in_file(named: str, module: str, layer: str) -> tuple[str, str, str, str]:
    """Keys of a layer: what its name is, and those of down, up and alpha."""
    start = CASES[named][1][module]
    if named == "kohya":
        # transformers 5 has dropped the outer name of CLIP's text model; where it is still there it is not said twice
        name = start + layer.removeprefix("text_model.").replace(".", "_")
        return name, f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"
    name = start + layer
    return name, f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"


def assert_holds(file: Path, named: str, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    tensors = load_file(file)
    for (module, layer), delta in wanted.items():
        name, down, up, alpha = in_file(named, module, layer)
        a, b, scale = tensors.pop(down), tensors.pop(up), tensors.pop(alpha)
        assert scale.shape == () and float(scale) == len(a) == RANK, name
        assert b.shape[0] == delta.shape[0] and a.shape[1:] == delta.shape[1:]
        torch.testing.assert_close(b @ a * float(scale) / RANK, delta, rtol=1e-5, atol=1e-7)
    assert not tensors, "keys that belong to no adapter"


def test_the_file_holds_the_runs_weights_at_full_strength(trained, capsys):
    named, run, _ = trained
    with pytest.raises(SystemExit) as left:
        app(["export", str(run), "--format", "comfyui"])
    assert left.value.code in (0, None)
    folder = Path(capsys.readouterr().out.strip())
    assert folder == run / "export-comfyui" and [file.name for file in folder.iterdir()] == ["comfyui_lora.safetensors"]
    wanted = deltas(run)
    assert {module for module, _ in wanted} == set(CASES[named][1])
    assert all(delta.abs().max() > 1e-3 for delta in wanted.values())
    assert_holds(folder / "comfyui_lora.safetensors", named, wanted)
    with safe_open(folder / "comfyui_lora.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["rewardtune.step"] == "3"
    assert json.loads(metadata["rewardtune.recipe"])["lora"]["alpha"] == ALPHA


def test_half_the_strength_is_half_of_every_weight(trained):
    named, run, _ = trained
    folder = export_run(run, format="comfyui", scale=0.5)
    assert folder == run / "export-comfyui-0.5"
    halves = {place: delta / 2 for place, delta in deltas(run).items()}
    assert_holds(folder / "comfyui_lora.safetensors", named, halves)


def test_it_draws_what_the_runs_own_export_draws(trained, tmp_path):
    """By ComfyUI's rules of loading, written out in like_comfyui.py, beside diffusers' loader."""
    named, run, base = trained
    family, modules = CASES[named]
    drawn = []
    for how in ("base", "diffusers", "comfyui"):
        pipe = DiffusionPipeline.from_pretrained(base)
        pipe.set_progress_bar_config(disable=True)
        if how == "diffusers":
            pipe.load_lora_weights(str(run / "export"))
        elif how == "comfyui":
            tensors = load_file(export_run(run, out=tmp_path / "c", format="comfyui") / "comfyui_lora.safetensors")
            like_comfyui.load(family.adapter, pipe, list(modules), tensors)
        drawn.append(export.probe(family.adapter(pipe)))
    untouched, wanted, found = drawn
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(wanted, untouched, atol=1e-3)
