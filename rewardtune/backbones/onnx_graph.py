"""An ONNX file as a torch module: its weights, and its graph run node by node with torch operators, so with gradient.

For published models that exist only as ONNX. Knows the operators that small recognisers are made of (`OPERATORS`), two
spatial dimensions; anything else is an error that names it. Meanings: the ONNX operator list, opsets 10 to 21
(https://onnx.ai/onnx/operators/). What is computed about shapes stays on the CPU in integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardtune.errors import MissingExtra, RecipeError

Attributes = Mapping[str, Any]


class OnnxGraph(nn.Module):
    """The graph of an ONNX file with one input and one output; floating-point weights are frozen parameters."""

    def __init__(self, path: str | Path, *, before_softmax: bool = False) -> None:
        """path: the .onnx file. before_softmax: return what goes into the last node, which must be a Softmax.

        Raises MissingExtra without the package onnx, RecipeError for a file that is damaged, or whose graph is not one
        of those that this class runs.
        """
        super().__init__()
        model = _read(Path(path))
        graph = model.graph
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        unknown = sorted({node.op_type for node in graph.node} - OPERATORS.keys())
        inputs = [value.name for value in graph.input if value.name not in {i.name for i in graph.initializer}]
        if not graph.node or unknown or not 10 <= opset <= 21 or len(inputs) != 1 or len(graph.output) != 1:
            raise RecipeError(
                f"{path}: this ONNX graph cannot be run with gradient: {len(graph.node)} nodes, opset {opset} (10 to "
                f"21 are known), {len(inputs)} inputs and {len(graph.output)} outputs (one each is expected), "
                f"operators that are not known: {', '.join(unknown) or 'none'}."
            )
        self._input, self._output = inputs[0], graph.output[0].name
        self._weights: dict[str, str] = {}
        self._constants: dict[str, Tensor] = {}
        for initializer in graph.initializer:
            self._keep(initializer.name, initializer)
        self._nodes: list[tuple[Callable[..., Tensor], Attributes, list[str], str]] = []
        for node in graph.node:
            attributes = _attributes(node) | {"opset": opset}
            if node.op_type == "Constant":
                self._keep(node.output[0], attributes["value"])
            elif node.op_type == "Identity" and node.input[0] in self._weights | self._constants:
                # exporters share one tensor under many names
                table: dict[str, Any] = self._weights if node.input[0] in self._weights else self._constants
                table[node.output[0]] = table[node.input[0]]
            else:
                self._nodes.append((OPERATORS[node.op_type], attributes, list(node.input), node.output[0]))
        if before_softmax:
            last = graph.node[-1]
            if last.op_type != "Softmax" or last.output[0] != self._output:
                raise RecipeError(f"{path}: the last node is {last.op_type}, not the Softmax that was expected.")
            self._nodes.pop()
            self._output = last.input[0]
        self._last_use = {name: i for i, (_, _, names, _) in enumerate(self._nodes) for name in names}

    def forward(self, images: Tensor) -> Tensor:
        """The graph's output for its input, in the input's dtype, which must be that of the weights."""
        values: dict[str, Tensor] = {self._input: images}
        for i, (operator, attributes, names, output) in enumerate(self._nodes):
            values[output] = operator(attributes, *(self._value(name, values) for name in names))
            for name in names:
                if self._last_use[name] == i:
                    values.pop(name, None)
        return values[self._output]

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor | None:
        """None for an optional input that is left out."""
        if name in values:
            return values[name]
        if name in self._weights:
            weight: Tensor = getattr(self, self._weights[name])
            return weight
        return self._constants[name] if name else None

    def _keep(self, name: str, proto: Any) -> None:
        from onnx import numpy_helper

        tensor = torch.from_numpy(numpy_helper.to_array(proto).copy())
        if not tensor.is_floating_point():
            self._constants[name] = tensor
            return
        # the files' own names have dots, which modules do not allow
        self._weights[name] = f"weight_{len(self._weights)}"
        self.register_parameter(self._weights[name], nn.Parameter(tensor, requires_grad=False))


def _read(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingExtra(f"{path}: reading it needs onnx: pip install 'rewardtune[ocr]'.") from error
    try:
        model = onnx.load(path)
    except (OSError, DecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{path}: not a readable ONNX model ({reason}). Install it again, or give another.") from None
    return model


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def _axes(attributes: Attributes, given: Tensor | None) -> list[int] | None:
    """Older opsets have axes as an attribute, newer ones as an input."""
    axes: list[int] | None = attributes.get("axes") if given is None else given.tolist()
    return axes


def _padded(x: Tensor, attributes: Attributes, kernel: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad both spatial sides as `auto_pad` or `pads` says."""
    how = attributes.get("auto_pad", "NOTSET")
    if how in ("SAME_UPPER", "SAME_LOWER"):
        sides = []
        spacing = zip(attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1)), strict=True)
        for size, length, (stride, dilation) in zip(x.shape[2:], kernel, spacing, strict=True):
            over = max((-(-size // stride) - 1) * stride + (length - 1) * dilation + 1 - size, 0)
            small, large = over // 2, over - over // 2
            sides.append((small, large) if how == "SAME_UPPER" else (large, small))
        (top, bottom), (left, right) = sides
    else:
        top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    return F.pad(x, (left, right, top, bottom), value=value) if top or left or bottom or right else x


def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(
        _padded(x, attributes, weight.shape[2:]),
        weight,
        bias,
        stride=attributes.get("strides", (1, 1)),
        dilation=attributes.get("dilations", (1, 1)),
        groups=attributes.get("group", 1),
    )


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    return F.max_pool2d(
        _padded(x, attributes, kernel, float("-inf")),
        kernel,
        attributes.get("strides", (1, 1)),
        dilation=attributes.get("dilations", (1, 1)),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )


def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel, strides = attributes["kernel_shape"], attributes.get("strides", (1, 1))
    ceil = bool(attributes.get("ceil_mode", 0))
    total = F.avg_pool2d(_padded(x, attributes, kernel), kernel, strides, ceil_mode=ceil)
    if attributes.get("count_include_pad", 0):
        return total
    # the mean of what is not padding: the same window over ones says how much of it that is
    there = F.avg_pool2d(_padded(torch.ones_like(x[:1, :1]), attributes, kernel), kernel, strides, ceil_mode=ceil)
    return total / there


def _batch_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _reduce_mean(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.mean(_axes(attributes, axes), keepdim=bool(attributes.get("keepdims", 1)))


def _softmax(attributes: Attributes, x: Tensor) -> Tensor:
    old = attributes["opset"] < 13
    axis = attributes.get("axis", 1 if old else -1) % x.dim()
    # before opset 13 all axes from this one on were taken together
    return x.flatten(axis).softmax(-1).view(x.shape) if old else x.softmax(axis)


def _clip(attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    bounds = [attributes.get(name) if given is None else given for name, given in (("min", low), ("max", high))]
    return x.clamp(*bounds) if any(bound is not None for bound in bounds) else x


def _cast(attributes: Attributes, x: Tensor) -> Tensor:
    from onnx import helper

    kind = getattr(torch, str(helper.tensor_dtype_to_np_dtype(attributes["to"])))
    # a cast to float means the graph's own float, which may be another here
    return x if kind.is_floating_point and x.is_floating_point() else x.to(kind)


def _shape(attributes: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[attributes.get("start", 0) : attributes.get("end")])


def _slice(
    _: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    over = range(x.dim()) if axes is None else axes.tolist()
    index = [slice(None)] * x.dim()
    for i, axis in enumerate(over):
        step = 1 if steps is None else int(steps[i])
        if step < 1:
            raise RecipeError(f"the ONNX graph slices backwards (step {step}), which torch does not.")
        index[axis] = slice(int(starts[i]), int(ends[i]), step)
    return x[tuple(index)]


def _reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    if not attributes.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(attributes, axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


def _unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(attributes, axes) or []
    for axis in sorted(axis % (x.dim() + len(chosen)) for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _div(_: Attributes, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda _, a, b: a + b,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda attributes, *parts: torch.cat(parts, attributes["axis"]),
    "Constant": lambda attributes: attributes["value"],
    "Conv": _conv,
    "Div": _div,
    "Erf": lambda _, x: x.erf(),
    "GlobalAveragePool": lambda _, x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda a, x: (x * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1),
    "Identity": lambda _, x: x,
    "MatMul": lambda _, a, b: a @ b,
    "MaxPool": _max_pool,
    "Mul": lambda _, a, b: a * b,
    "Pow": lambda _, a, b: a**b,
    "ReduceMean": _reduce_mean,
    "Relu": lambda _, x: x.relu(),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": lambda _, x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": _softmax,
    "Sqrt": lambda _, x: x.sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda _, a, b: a - b,
    "Transpose": lambda attributes, x: x.permute(attributes.get("perm", tuple(reversed(range(x.dim()))))),
    "Unsqueeze": _unsqueeze,
}
"""By ONNX name; each takes the node's attributes, then its inputs."""
