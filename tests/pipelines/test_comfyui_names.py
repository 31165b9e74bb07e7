"""The names of adapters for ComfyUI against what its own code accepts, recorded in comfyui_names.json, and against
diffusers' conversion of the weights that it loads."""

from __future__ import annotations

import like_comfyui
import pytest
import torch
from families import flux_2, lumina_2, z_image

from rewardtune.diffusion import comfyui, export, lora
from rewardtune.errors import RecipeError

RANK, ALPHA = 2, 6


def adapted(family, targets=None, *, pipe=None, modules=("transformer",)):
    """The family's adapter with trained-looking LoRA on `targets`, its default ones when left out."""
    adapter = family.adapter(pipe or family.make())
    chosen = {name: targets or adapter.lora_targets[name] for name in modules}
    lora.attach({name: adapter.trainable[name] for name in modules}, rank=RANK, alpha=ALPHA, targets=chosen, seed=1)
    key = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in modules:
            for path, parameter in adapter.trainable[name].named_parameters():
                if "lora_B" in path:
                    parameter.normal_(0, 0.1, generator=key)
    return adapter


def added(adapter) -> dict[str, torch.Tensor]:
    """What merging the adapters adds to the transformer's weights, less those that it leaves."""
    start = {
        path.replace(".base_layer", ""): weight.detach().clone()
        for path, weight in adapter.pipe.transformer.named_parameters()
        if ".lora_" not in path
    }
    lora.merge({"transformer": adapter.pipe.transformer})
    after = dict(adapter.pipe.transformer.named_parameters())
    assert set(after) == set(start)
    return {path: after[path].detach() - start[path] for path in start if not torch.equal(after[path], start[path])}


def sums(tensors) -> dict[str, torch.Tensor]:
    """ComfyUI's own layer -> what its loader adds to the weight."""
    found = {}
    for path, b in tensors.items():
        if path.endswith(".lora_B.weight"):
            layer = path.removesuffix(".lora_B.weight")
            a, alpha = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.alpha"]
            found[layer.removeprefix("diffusion_model.") + ".weight"] = float(alpha) / len(a) * b @ a
    return found


def published_width():
    """Lumina 2 with the widths that diffusers' conversion takes its attention apart by, and little else."""
    from diffusers import Lumina2Transformer2DModel

    pipe = lumina_2.make()
    pipe.transformer = Lumina2Transformer2DModel(
        in_channels=4, num_layers=1, num_refiner_layers=1, ffn_dim_multiplier=0.01, multiple_of=16, cap_feat_dim=16
    ).requires_grad_(False)
    return pipe


@pytest.mark.parametrize(
    "family, make", [(flux_2.FAMILY, flux_2.make), (lumina_2.FAMILY, published_width)], ids=["flux_2", "lumina_2"]
)
def test_own_names_hold_what_merging_adds(family, make):
    """Every layer that has one: diffusers' conversion of published weights makes of it what merging adds."""
    targets = [part.replace("#", str(i)) for parts in family.adapter.comfyui.values() for part in parts for i in (0, 1)]
    pipe = make()
    there = {path for path, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    adapter = adapted(family, sorted(there & set(targets)), pipe=pipe)
    tensors = comfyui.keys(adapter, ["transformer"])
    wanted, found = added(adapter), like_comfyui.from_own(adapter.family, pipe, sums(tensors))
    assert set(found) == set(wanted) == {f"{path}.weight" for path in there & set(targets)}
    for path, weight in wanted.items():
        torch.testing.assert_close(found[path], weight, rtol=1e-4, atol=1e-6)


def test_layers_without_adapters_keep_their_rows():
    adapter = adapted(flux_2.FAMILY, ["attn.to_q", "attn.to_v"])
    tensors = comfyui.keys(adapter, ["transformer"])
    assert len(tensors["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"]) == 2 * RANK
    query, key, value = sums(tensors)["double_blocks.0.img_attn.qkv.weight"].chunk(3)
    wanted = added(adapter)
    assert not key.any() and len(wanted) == 2
    for found, name in ((query, "to_q"), (value, "to_v")):
        torch.testing.assert_close(found, wanted[f"transformer_blocks.0.attn.{name}.weight"], rtol=1e-4, atol=1e-6)


def test_diffusers_reads_flux_2s_file_to_the_same_image():
    """Its loader takes such files too, where alpha goes without saying."""
    adapter = adapted(flux_2.FAMILY)
    tensors = comfyui.keys(adapter, ["transformer"])
    pipe = flux_2.make()
    untouched = export.probe(flux_2.FAMILY.adapter(pipe))
    pipe.load_lora_weights({path: tensor for path, tensor in tensors.items() if not path.endswith(".alpha")})
    found = export.probe(flux_2.FAMILY.adapter(pipe))
    assert torch.allclose(found, export.probe(adapter), atol=1e-5)
    assert not torch.allclose(found, untouched, atol=1e-3)


@pytest.mark.parametrize(
    "family, layer",
    [
        (z_image.FAMILY, "transformer.layers.0.attention.to_x"),  # made up
        (lumina_2.FAMILY, "transformer.layers.0.attn.to_q"),  # diffusers' own
        (z_image.FAMILY, "diffusion_model.layers.0.attn.to_q"),
        (flux_2.FAMILY, "diffusion_model.transformer_blocks.0.attn.to_q"),
    ],
)
def test_the_check_refuses_a_layer_that_comfyui_does_not_know(family, layer):
    adapter = adapted(family)
    tensors = comfyui.keys(adapter, ["transformer"])
    like_comfyui.load(adapter, family.make(), ["transformer"], tensors)
    first = next(iter(tensors)).removesuffix(".lora_A.weight")
    renamed = {path.replace(first, layer): tensor for path, tensor in tensors.items()}
    with pytest.raises(AssertionError, match=f"lora key not loaded: {layer}"):
        like_comfyui.load(adapter, family.make(), ["transformer"], renamed)


def test_what_comfyui_has_no_name_for_is_refused():
    """It would leave such adapters out with a line in its log."""
    adapter = adapted(z_image.FAMILY, modules=("transformer", "text_encoder"))
    with pytest.raises(RecipeError, match=r"text_encoder\..*q_proj.*lora\.modules"):
        comfyui.keys(adapter, ["transformer", "text_encoder"])
    assert comfyui.keys(adapter, ["transformer"])
    with pytest.raises(RecipeError, match=r"norm_out\.linear"):
        comfyui.keys(adapted(flux_2.FAMILY, ["norm_out.linear"]), ["transformer"])
