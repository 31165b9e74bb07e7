from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from rewardtune.diffusion import lora
from rewardtune.errors import RecipeError

TARGETS = {"transformer": ["to_q", "to_v"], "text_encoder": ["q_proj", "down_proj"]}


def transformer() -> nn.Module:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[128, 16, 16],
    )  # fmt: skip
    # Layers that start at zero would hide what the adapters do.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def text_encoder() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return Qwen3Model(config).eval()


def call(modules: dict[str, nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    images, captions = [torch.ones(4, 1, 8, 8)], [torch.ones(5, 16)]
    out: Any = modules["transformer"](images, torch.tensor([0.5]), captions, return_dict=False)[0][0]
    words: Any = modules["text_encoder"](input_ids=torch.arange(6)[None]).last_hidden_state
    return out, words


def both() -> dict[str, nn.Module]:
    return {"transformer": transformer(), "text_encoder": text_encoder()}


def train_a_little(modules: dict[str, nn.Module]) -> None:
    torch.manual_seed(1)
    for module in modules.values():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)


def test_adapters_start_at_nothing_and_only_they_are_trained() -> None:
    modules = both()
    before = call(modules)
    lora.attach(modules, rank=4, targets=TARGETS, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(before, call(modules), strict=True))
    trained = {f"{n}.{p}" for n, m in modules.items() for p, t in m.named_parameters() if t.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == {"to_q", "to_v", "q_proj", "down_proj"}
    layers = sum(p.rpartition(".")[2] in TARGETS[n] for n, m in both().items() for p, _ in m.named_modules())
    assert len(trained) == 2 * layers
    for path, parameter in modules["transformer"].named_parameters():
        if ".lora_A." in path:
            bound = parameter.shape[1] ** -0.5
            assert parameter.abs().max() <= bound and parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.3)


def test_the_start_depends_on_the_seed_and_nothing_else() -> None:
    starts = []
    for seed, names in ((3, ["transformer", "text_encoder"]), (3, ["text_encoder", "transformer"]), (4, TARGETS)):
        modules = both()
        torch.manual_seed(len(starts))
        lora.attach({name: modules[name] for name in names}, rank=4, targets=TARGETS, seed=seed)
        starts.append(lora.state(modules))
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert not any(torch.equal(t, starts[2][name]) for name, t in starts[0].items() if "lora_A" in name)


def test_disabled_is_the_frozen_start_and_comes_back() -> None:
    modules = both()
    before = call(modules)
    lora.attach(modules, rank=4, targets=TARGETS)
    train_a_little(modules)
    trained, flags = call(modules), [p.requires_grad for m in modules.values() for p in m.parameters()]
    with lora.disabled(modules):
        assert all(torch.equal(a, b) for a, b in zip(before, call(modules), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trained, call(modules), strict=True))
    assert not torch.equal(trained[0], before[0]) and not torch.equal(trained[1], before[1])
    assert [p.requires_grad for m in modules.values() for p in m.parameters()] == flags


def test_alpha_scales() -> None:
    outs = []
    for alpha in (None, 4, 8):
        modules = {"transformer": transformer(), "text_encoder": text_encoder()}
        lora.attach(modules, rank=4, alpha=alpha, targets=TARGETS)
        train_a_little(modules)
        outs.append(call(modules)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])


def test_adapters_of_a_bf16_model_are_fp32() -> None:
    module = transformer().bfloat16()
    lora.attach({"transformer": module}, rank=2, targets=TARGETS)
    kinds = {(p.requires_grad, p.dtype) for p in module.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_the_state_loads_into_a_fresh_model_through_diffusers() -> None:
    modules = both()
    lora.attach(modules, rank=4, targets=TARGETS)
    train_a_little(modules)
    state = lora.state({"transformer": modules["transformer"]})
    assert all(name.startswith("transformer.") and ".default." not in name for name in state)
    assert {name.split(".", 1)[1].rpartition("lora_")[2] for name in state} == {"A.weight", "B.weight"}
    fresh: Any = transformer()
    fresh.load_lora_adapter(dict(state), prefix="transformer")
    assert torch.equal(call({**modules, "transformer": fresh})[0], call(modules)[0])


def test_a_target_that_matches_nothing_is_named() -> None:
    with pytest.raises(RecipeError, match=r"transformer has no layer .*'to_queue'.*to_q, "):
        lora.attach({"transformer": transformer()}, rank=2, targets={"transformer": ["to_q", "to_queue"]})


def test_a_target_that_is_a_block_in_one_place_is_refused():
    with pytest.raises(
        RecipeError, match=r"lora\.targets: transformer takes no adapters of to_q, attention: .*supported"
    ):
        lora.attach({"transformer": transformer()}, rank=2, targets={"transformer": ["to_q", "attention"]})
