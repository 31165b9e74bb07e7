from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import nn

from rewardtune.errors import MissingExtra, RecipeError
from rewardtune.training import optim, runtime


def test_devices() -> None:
    assert runtime.start(device="cpu").device == torch.device("cpu")
    best = runtime.start().device.type
    assert best == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    for name in ("cuda:99", "gpu", "xpu", "mps" if best != "mps" else "cuda"):
        with pytest.raises(RecipeError, match=rf"train\.device '{name}'"):
            runtime.start(device=name)


def test_precision() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with runtime.start(device="cpu", precision=precision).autocast():
            assert layer(x).dtype == dtype


def test_one_process_is_its_own_group() -> None:
    where = runtime.start(device="cpu")
    assert where.main and where.world == 1
    assert where.gather({"a": 1}) == [{"a": 1}] and where.broadcast("x") == "x"
    assert torch.equal(where.mean(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    assert where.peak_memory() > 50 * 2**20


def test_attention_that_does_not_load_is_one_line_and_native(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[128, 16, 16],
    ).eval()  # fmt: skip
    inputs = ([torch.ones(4, 1, 8, 8)], torch.tensor([0.5]), [torch.ones(5, 16)])
    with torch.no_grad():
        before = model(*inputs, return_dict=False)[0][0]
    assert runtime.set_attention([model], "native") == "native"
    assert capsys.readouterr().err == ""
    if torch.cuda.is_available():
        return
    for backend in ("xformers", "flash", "sage"):
        assert runtime.set_attention([model, nn.Linear(2, 2)], backend) == "native"
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"attention: {backend} is not used here (")
    with torch.no_grad():
        assert torch.equal(model(*inputs, return_dict=False)[0][0], before)
    with pytest.raises(RecipeError, match=r"pipeline\.attention 'xformer' is unknown; .*xformers"):
        runtime.set_attention([model], "xformer")


SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8}


def test_optimisers_by_name() -> None:
    weight = nn.Parameter(torch.ones(3))
    assert type(optim.build({"weight": weight}, name="adamw", **SETTINGS)) is torch.optim.AdamW
    with pytest.raises(RecipeError, match="adamw, adamw8bit, muon, prodigy"):
        optim.build({"weight": weight}, name="adam", **SETTINGS)
    for name, package in (("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")):
        try:
            __import__(package)
        except ImportError:
            with pytest.raises(MissingExtra, match=package):
                optim.build({"weight": weight}, name=name, **SETTINGS)


def test_muon_turns_the_matrices_of_blocks_and_leaves_the_rest_to_adamw() -> None:
    """The same numbers as torch's own two optimisers side by side, with a schedule."""

    def weights() -> dict[str, nn.Parameter]:
        torch.manual_seed(0)
        shapes = {
            "model.embed.weight": (7, 4),
            "model.mlp.0.weight": (4, 4),
            "model.layers.0.attention.to_q.weight": (4, 4),
            "model.layers.0.norm.weight": (4,),
        }
        return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}

    ours, theirs = weights(), weights()
    built = optim.build(ours, name="muon", **SETTINGS)
    block = theirs.pop("model.layers.0.attention.to_q.weight")
    muon = torch.optim.Muon([block], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(list(theirs.values()), **SETTINGS)
    theirs["model.layers.0.attention.to_q.weight"] = block
    schedule = optim.build_schedule(built, name="linear", warmup_steps=0, steps=4)
    for step in range(3):
        for name in ours:
            gradient = torch.randn(ours[name].shape, generator=torch.Generator().manual_seed(step))
            ours[name].grad, theirs[name].grad = gradient, gradient.clone()
        for one in (muon, adamw):
            one.param_groups[0]["lr"] = 0.1 * (1 - step / 4)
            one.step()
        built.step()
        optim.advance(schedule)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Wrapped(torch.optim.AdamW):
    """Keeps its tensors in a mapping inside each parameter's state, as bitsandbytes 0.50 does."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        inner = {i: {k: v for k, v in s.items() if k != "step"} for i, s in state["state"].items()}
        return {**state, "state": {i: {"step": s["step"], "__inner__": inner[i]} for i, s in state["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = {i: {"step": s["step"], **s["__inner__"]} for i, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})


@pytest.mark.parametrize("kind", ["Muon", "AdamW", "SGD", "Adagrad", "RMSprop", "Adamax", "wrapped", "adamw8bit"])
def test_the_state_of_any_optimiser_survives_json(kind: str) -> None:
    import json

    def make() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
        if kind == "wrapped":
            return weights, Wrapped(weights, lr=0.01)
        if kind == "adamw8bit":
            pytest.importorskip("bitsandbytes")
            weights.append(nn.Parameter(torch.randn(64, 128)))  # smaller ones stay in 32 bits
            return weights, optim.build(dict(zip("abc", weights, strict=True)), name="adamw8bit", **SETTINGS)
        options = {"AdamW": {"amsgrad": True}, "SGD": {"momentum": 0.9}}.get(kind, {})
        if kind == "Muon":
            names = ("layers.0.norm.weight", "layers.0.linear.weight")
            return weights, optim.build(dict(zip(names, weights, strict=True)), name="muon", **SETTINGS)
        return weights, getattr(torch.optim, kind)(weights, lr=0.01, **options)

    def steps(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, count: int) -> None:
        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = sum((w.square().sum() for w in weights), torch.zeros(()))
            value.backward()
            return value

        for _ in range(count):
            optimizer.step(loss)

    weights, optimizer = make()
    steps(weights, optimizer, 3)
    tensors, rest = optim.pack(optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    rest = json.loads(json.dumps(rest))
    middle = [w.detach().clone() for w in weights]
    steps(weights, optimizer, 3)
    others, other = make()
    for mine, w in zip(others, middle, strict=True):
        mine.data.copy_(w)
    optim.unpack(other, tensors, rest)
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    steps(others, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
