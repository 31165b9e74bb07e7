"""ONNX graphs run by torch: every operator against onnxruntime, PP-OCR's recogniser against onnxruntime, and errors."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rewardtune.backbones.onnx_graph import OPERATORS, OnnxGraph
from rewardtune.errors import RecipeError

onnx = pytest.importorskip("onnx", reason="the extra `ocr` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `ocr` is not installed")
HELPER = onnx.helper
FLOAT, INT = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def ints(name: str, values: list[int]):
    return HELPER.make_tensor(name, INT, [len(values)], values)


def floats(name: str, tensor: torch.Tensor):
    return HELPER.make_tensor(name, FLOAT, tensor.shape, tensor.flatten().tolist())


def write(folder, nodes, constants=(), *, opset=13, shape=("B", 3, "H", "W")):
    """A model whose input is x and whose output is y."""
    ends = [HELPER.make_tensor_value_info(name, FLOAT, size) for name, size in (("x", shape), ("y", None))]
    graph = HELPER.make_graph(nodes, "g", ends[:1], ends[1:], list(constants))
    model = HELPER.make_model(graph, opset_imports=[HELPER.make_opsetid("", opset)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def reference(path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def node(kind: str, *inputs: str, **attributes):
    return HELPER.make_node(kind, ["x", *inputs], ["y"], **attributes)


def chain(*steps):
    return [HELPER.make_node(kind, names.split(), [out], **more) for kind, names, out, more in steps]


WEIGHT = floats("w", noise(6, 3, 3, 3))
GROUPED = floats("w", noise(6, 1, 2, 3))
FOUR = [floats(name, noise(3).abs() + 0.1) for name in ("scale", "bias", "mean", "var")]
CASES = {
    "conv": ([node("Conv", "w", pads=[1, 0, 2, 1], strides=[2, 1], kernel_shape=[3, 3])], [WEIGHT], 13),
    "conv bias": ([node("Conv", "w", "b", dilations=[2, 1])], [WEIGHT, floats("b", noise(6))], 13),
    "conv groups": ([node("Conv", "w", group=3, auto_pad="SAME_UPPER", strides=[2, 2])], [GROUPED], 13),
    "conv lower": ([node("Conv", "w", group=3, auto_pad="SAME_LOWER")], [GROUPED], 13),
    "max pool": ([node("MaxPool", kernel_shape=[2, 2], auto_pad="SAME_UPPER")], [], 11),
    "max pool ceil": ([node("MaxPool", kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1)], [], 13),
    "average pool": ([node("AveragePool", kernel_shape=[3, 2], strides=[3, 2])], [], 11),
    "average pool pads": ([node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])], [], 13),
    "average pool counts": (
        [node("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)],
        [],
        13,
    ),
    "global pool": ([node("GlobalAveragePool")], [], 13),
    "batch norm": ([node("BatchNormalization", "scale", "bias", "mean", "var", epsilon=1e-3)], FOUR, 13),
    "arithmetic": (
        chain(
            ("Mul", "x w", "a", {}), ("Add", "a x", "b", {}), ("Sub", "b w", "c", {}), ("Div", "c w", "d", {}),
            ("Pow", "d two", "e", {}), ("Sqrt", "e", "f", {}), ("Identity", "f", "y", {}),
        ),
        [floats("w", noise(3, 1, 1).abs() + 1), floats("two", torch.tensor(2.0))],
        13,
    ),
    "activations": (
        chain(
            ("Relu", "x", "a", {}), ("Sigmoid", "a", "b", {}), ("HardSigmoid", "x", "c", {"alpha": 0.3}),
            ("Erf", "x", "d", {}), ("Clip", "x low high", "e", {}), ("Add", "b c", "f", {}), ("Add", "d e", "g", {}),
            ("Mul", "f g", "y", {}),
        ),
        [floats("low", torch.tensor(-0.4)), floats("high", torch.tensor(0.7))],
        13,
    ),
    "clip above": (chain(("Clip", "x  high".replace("  ", " "), "y", {})), [floats("high", torch.tensor(0.1))], 13),
    "clip of old": ([node("Clip", min=-0.5, max=0.5)], [], 10),
    "softmax": ([node("Softmax", axis=1)], [], 13),
    "softmax of old": ([node("Softmax", axis=2)], [], 11),
    "mean": ([node("ReduceMean", axes=[2, 3], keepdims=0)], [], 13),
    "mean over an input": ([node("ReduceMean", "axes")], [ints("axes", [-1])], 18),
    "transpose": ([node("Transpose", perm=[0, 2, 3, 1])], [], 13),
    "transpose all": ([node("Transpose")], [], 13),
    "squeezes": (
        chain(("Unsqueeze", "x two", "a", {}), ("Squeeze", "a one", "y", {})),
        [ints("two", [1, -1]), ints("one", [5])],
        13,
    ),
    "squeezes of old": (chain(("Unsqueeze", "x", "a", {"axes": [0, 3]}), ("Squeeze", "a", "y", {"axes": [0]})), [], 11),
    "slices": (
        [node("Slice", "starts", "ends", "axes", "steps")],
        [ints("starts", [1, -4]), ints("ends", [3, 1 << 60]), ints("axes", [1, -1]), ints("steps", [1, 2])],
        13,
    ),
    "reshape by shape": (
        chain(
            ("Shape", "x", "s", {}), ("Slice", "s zero one", "b", {}), ("Cast", "b", "c", {"to": FLOAT}),
            ("Cast", "c", "d", {"to": INT}), ("Constant", "", "m", {"value": ints("m", [-1])}),
            ("Concat", "d m", "r", {"axis": 0}), ("Reshape", "x r", "a", {}), ("MatMul", "a w", "y", {}),
        ),
        [ints("zero", [0]), ints("one", [1]), floats("w", noise(3 * 7 * 10, 4))],
        13,
    ),
    "reshape keeps": ([node("Reshape", "r")], [ints("r", [0, 3, -1])], 13),
    "concat": ([HELPER.make_node("Concat", ["x", "x"], ["y"], axis=-1)], [], 13),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_operator_is_onnxruntimes(case, tmp_path):
    nodes, constants, opset = CASES[case]
    path = write(tmp_path, nodes, constants, opset=opset)
    x = noise(2, 3, 7, 10)
    torch.testing.assert_close(OnnxGraph(path)(x), reference(path, x), rtol=1e-5, atol=1e-5)


def test_every_operator_has_its_case():
    assert {node.op_type for nodes, _, _ in CASES.values() for node in nodes} == set(OPERATORS)


def test_it_is_frozen_has_gradient_and_follows_its_dtype(tmp_path):
    path = write(tmp_path, [node("Conv", "w", pads=[1, 1, 1, 1])], [WEIGHT])
    graph = OnnxGraph(path).double()
    assert not any(parameter.requires_grad for parameter in graph.parameters())
    assert sum(parameter.numel() for parameter in graph.parameters()) == 6 * 3 * 9
    x = noise(1, 3, 5, 6).double().requires_grad_(True)
    assert torch.autograd.gradcheck(graph, x)


def test_before_the_softmax(tmp_path):
    path = write(tmp_path, chain(("Relu", "x", "a", {}), ("Softmax", "a", "y", {"axis": -1})))
    x = noise(1, 3, 4, 5)
    assert torch.equal(OnnxGraph(path, before_softmax=True)(x), x.relu())
    with pytest.raises(RecipeError, match="last node is Relu"):
        OnnxGraph(write(tmp_path, [node("Relu")]), before_softmax=True)


def test_other_graphs_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="not known: Sin"):
        OnnxGraph(write(tmp_path, [node("Sin")]))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\xff" * 100)
    for path in (broken, tmp_path / "nowhere.onnx"):
        with pytest.raises(RecipeError, match="not a readable ONNX model"):
            OnnxGraph(path)


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None, reason="the extra `ocr` is not installed")
@pytest.mark.parametrize(("batch", "width"), [(1, 320), (3, 96), (2, 501)])
def test_the_recogniser_is_onnxruntimes(batch, width):
    from rewardtune.backbones.text_reader import shipped_recogniser

    path = shipped_recogniser()
    x = torch.rand(batch, 3, 48, width, generator=torch.Generator().manual_seed(width)) * 2 - 1
    with torch.no_grad():
        ours = OnnxGraph(path)(x)
    theirs = reference(path, x)
    assert ours.shape == theirs.shape == (batch, -(-width // 8), 18710)
    assert (ours - theirs).abs().max() < 2e-5  # measured: 6e-6
