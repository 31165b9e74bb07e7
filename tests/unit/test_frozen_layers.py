"""Frozen layers keep less, and nothing else changes: values and gradients, to the bit where nothing is done again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from peft import LoraConfig
from torch import Tensor, nn

from rewardtune.diffusion import frozen_layers
from rewardtune.diffusion.frozen_layers import keep_less
from rewardtune.training.live_bytes import peak_live_bytes


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_layers, "SMALL", 0)


def unet() -> nn.Module:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).requires_grad_(False)  # fmt: skip
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return model


def decoder() -> nn.Module:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=4, sample_size=32, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).requires_grad_(False)  # fmt: skip


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def denoise(model: nn.Module, latents: Tensor) -> Tensor:
    out: Tensor = model(latents, torch.tensor(5), encoder_hidden_states=draw(2, 8, 32), return_dict=False)[0]
    return out


def decode(model: nn.Module, latents: Tensor) -> Tensor:
    out: Tensor = model.decode(latents, return_dict=False)[0]  # type: ignore[operator]
    return out


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "unet": (unet, denoise), "decoder": (decoder, decode),
}  # fmt: skip


def bf16(enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def gradients(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], autocast: bool = False) -> list[Tensor]:
    """The output, and its gradients at the latents and at what is trained; the way back is outside autocast."""
    latents = draw(2, 4, 16, 16).requires_grad_(True)
    with bf16(autocast):
        out = run(model, latents)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * draw(*out.shape)).sum(), [latents, *trained])]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_stay(name, recompute, autocast):
    make, run = MODELS[name]
    thrifty = make()
    keep_less(thrifty, recompute=recompute)
    keep_less(thrifty, recompute=recompute)  # a second time changes nothing
    wanted, found = gradients(make(), run, autocast), gradients(thrifty, run, autocast)
    assert len(found) == len(wanted) and torch.equal(found[0], wanted[0])
    for mine, plain in zip(found, wanted, strict=True):
        if recompute:  # a unit's two gradients meet in one product in place of two
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
        else:
            assert torch.equal(mine, plain)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_it_keeps_much_less(name, autocast):
    make, run = MODELS[name]
    kept = {}
    for way in ("plain", "convolutions", "all"):
        model = make()
        if way != "plain":
            keep_less(model, recompute=way == "all")
        with bf16(autocast):
            kept[way] = peak_live_bytes(lambda model=model: run(model, draw(2, 4, 16, 16).requires_grad_(True)))
    assert kept["convolutions"] < 0.85 * kept["plain"]
    assert kept["all"] < {"unet": 0.6, "decoder": 0.5}[name] * kept["plain"]


def test_a_trained_layer_works_as_before():
    plain = decoder().requires_grad_(True)
    thrifty = copy.deepcopy(plain)
    keep_less(thrifty, recompute=True)
    inputs = draw(1, 4, 8, 8).requires_grad_(True)
    for model in (plain, thrifty):
        decode(model, inputs).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad)), name


def test_with_checkpointing_inside():
    plain, thrifty = unet(), unet()
    keep_less(thrifty, recompute=True)
    thrifty.train().enable_gradient_checkpointing()  # type: ignore[operator]
    for mine, wanted in zip(gradients(thrifty, denoise), gradients(plain, denoise), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_unit_against_finite_differences(bias):
    torch.manual_seed(0)
    layer = nn.Sequential(GEGLU(3, 5, bias=bias)).double().requires_grad_(False)
    keep_less(layer, recompute=True)
    inputs = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert type(layer(inputs).grad_fn).__name__ == "_GegluBackward"
    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("settings", [{"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2, "bias": False}])
def test_a_convolution_against_finite_differences(settings):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(4, 6, 3, **settings)).double().requires_grad_(False)
    keep_less(layer, recompute=False)
    inputs = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    assert type(layer(inputs).grad_fn).__name__ == "_ConvolutionBackward"
    assert torch.autograd.gradcheck(layer, inputs)


def test_small_inputs_are_left_alone(monkeypatch):
    layer = nn.Sequential(nn.Conv2d(2, 2, 1)).requires_grad_(False)
    keep_less(layer, recompute=False)
    inputs = draw(1, 2, 4, 4).requires_grad_(True)
    monkeypatch.setattr(frozen_layers, "SMALL", inputs.nbytes + 1)
    assert type(layer(inputs).grad_fn).__name__ == "ConvolutionBackward0"


def test_a_layer_that_computes_in_its_own_way_is_left_alone():
    """As the convolutions of Qwen-Image 2.1's decoder, which pad in their own way and take a second argument."""

    class Padded(nn.Conv2d):
        def forward(self, inputs: Tensor, before: Tensor | None = None) -> Tensor:
            return super().forward(nn.functional.pad(inputs, (2, 0, 2, 0)) + (0 if before is None else before))

    class Doubled(nn.SiLU):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    model = nn.Sequential(Padded(4, 4, 3), nn.GroupNorm(2, 4), Doubled()).requires_grad_(False)
    inputs = draw(1, 4, 8, 8).requires_grad_(True)
    wanted, second = model(inputs), model[0](inputs, torch.ones(()))
    keep_less(model, recompute=True)
    assert torch.equal(model(inputs), wanted) and torch.equal(model[0](inputs, torch.ones(())), second)
