"""A bundle's graph as torch runs it: ONNX operators, one torch call each. Imported by torch_engine.py.

The graph is what was proven, so torch runs that, and not a network built anew from a checkpoint. Operators: https://onnx.ai/onnx/operators, as of opset 23;
those that this project's networks are exported to, and no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from service.engines.engine import EngineUnavailable
from service.engines.graph_shapes import shapes_of

Attributes = dict[str, Any]
Operator = Callable[[Sequence[Any], Attributes], Any]  # inputs, None where one is left out; a tuple where there are several outputs


class TorchGraph(nn.Module):
    """uint8 pixels [n, H, W, 3] → float32 logits [n, classes], embedding [n, width]; computed in ``dtype`` where the graph says float32."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Raises EngineUnavailable for an operator that is not known here."""
        super().__init__()
        self._dtype = dtype
        graph = ir.load(path).graph
        unknown = sorted({node.op_type for node in graph} - OPERATORS.keys() - {"Cast"})
        if unknown:
            raise EngineUnavailable(f"no torch call is known for {', '.join(unknown)} of {path.name}")
        self._numbers = dict[str, list[Any]]()  # what says shapes, axes and what padding is filled with: read on the host, and never on the device
        for name, value in graph.initializers.items():
            assert value.const_value is not None
            filling = any(user.op_type == "Pad" and index == 2 for user, index in value.uses())
            if value.const_value.dtype == ir.DataType.INT64 or filling:
                self._numbers[name] = value.const_value.numpy().reshape(-1).tolist()
            else:
                held = torch.from_numpy(value.const_value.numpy().copy())
                self.register_buffer(_attribute(name), held.to(dtype) if held.is_floating_point() else held)
        self.image_shape = shapes_of(path).image
        self._inputs = [str(each.name) for each in graph.inputs]
        self._outputs = [str(each.name) for each in graph.outputs]
        self._steps = [
            (
                node.op_type,
                [None if value is None else str(value.name) for value in node.inputs],
                {name: attribute.value for name, attribute in node.attributes.items()},
                [str(value.name) for value in node.outputs],
            )
            for node in graph
        ]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        values: dict[str, Any] = {**self._numbers, self._inputs[0]: pixels}

        def read(name: str | None) -> Any:
            return None if name is None else values[name] if name in values else getattr(self, _attribute(name))

        for operator, inputs, attributes, outputs in self._steps:
            made = read(inputs[0]).to(self._dtype) if operator == "Cast" else OPERATORS[operator]([read(name) for name in inputs], attributes)
            values.update(zip(outputs, made if isinstance(made, tuple) else (made,), strict=True))
        logits, embedding = (values[name] for name in self._outputs)
        return logits.float(), embedding.float()


def _attribute(name: str) -> str:
    """Buffers' names hold no dots."""
    return "value_" + name.replace(".", "_dot_")


def _attention(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """Q, K, V [n, tokens, width] → [n, queries, width]."""
    heads = attributes["q_num_heads"]
    query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in inputs[:3])
    mask = inputs[3] if len(inputs) > 3 else None
    mixed = functional.scaled_dot_product_attention(query, key, value, mask, scale=attributes.get("scale"))
    return mixed.transpose(1, 2).flatten(2)


def _conv(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, pads = inputs[0], attributes.get("pads", (0, 0, 0, 0))
    if tuple(pads[:2]) != tuple(pads[2:]):
        x, pads = functional.pad(x, (pads[1], pads[3], pads[0], pads[2])), (0, 0)
    bias = inputs[2] if len(inputs) > 2 else None
    return functional.conv2d(x, inputs[1], bias, attributes["strides"], tuple(pads[:2]), attributes["dilations"], attributes["group"])


def _max_pool(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    x = functional.pad(inputs[0], (left, right, top, bottom), value=-math.inf)
    pooled: Tensor = functional.max_pool2d(x, attributes["kernel_shape"], attributes["strides"])
    return pooled


def _gemm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    left, right = (each.T if attributes.get(transposed) else each for each, transposed in zip(inputs, ("transA", "transB"), strict=False))
    product: Tensor = attributes.get("alpha", 1.0) * (left @ right)
    return product if len(inputs) < 3 else product + attributes.get("beta", 1.0) * inputs[2]


def _slice(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x: Tensor = inputs[0]
    starts, ends = inputs[1:3]
    axes = inputs[3] if len(inputs) > 3 else range(len(starts))
    steps = inputs[4] if len(inputs) > 4 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        taken = slice(start, min(end, x.shape[axis]), step)
        x = x[(slice(None),) * (axis % x.ndim) + (taken,)]
    return x


def _split(inputs: Sequence[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    axis = attributes.get("axis", 0)
    if len(inputs) > 1:
        return tuple(torch.split(inputs[0], inputs[1], axis))
    return tuple(torch.chunk(inputs[0], attributes["num_outputs"], axis))


def _concat(inputs: Sequence[Any], attributes: Attributes) -> Any:
    if all(isinstance(each, list) for each in inputs):  # a shape
        return [number for each in inputs for number in each]
    return torch.cat(list(inputs), attributes["axis"])


def _reshape(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, shape = inputs
    sizes = [x.shape[place] if size == 0 and not attributes.get("allowzero") else size for place, size in enumerate(shape)]
    shaped: Tensor = x.reshape(sizes)
    return shaped


def _expand(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """A size of 1 on either side takes the other's."""
    x, shape = inputs
    expanded: Tensor = x.expand([there if wanted == 1 else wanted for there, wanted in zip(x.shape, shape, strict=True)])
    return expanded


def _reduce_mean(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    return torch.mean(inputs[0], dim=inputs[1], keepdim=bool(attributes.get("keepdims", 1)))


def _gather(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """One place of an axis, which then is gone."""
    (place,) = inputs[1]
    taken: Tensor = inputs[0].select(attributes.get("axis", 0), place)
    return taken


def _pad(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, pads = inputs[:2]
    (value,) = inputs[2] if len(inputs) > 2 and inputs[2] is not None else (0.0,)
    ends = [each for place in reversed(range(x.ndim)) for each in (pads[place], pads[x.ndim + place])]
    return functional.pad(x, ends, value=value)


def _group_norm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    return functional.group_norm(inputs[0], attributes["num_groups"], inputs[1], inputs[2], attributes["epsilon"])


def _batch_norm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, scale, bias, mean, variance = inputs
    return functional.batch_norm(x, mean, variance, scale, bias, eps=attributes["epsilon"])


def _layer_norm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    bias = inputs[2] if len(inputs) > 2 else None
    return functional.layer_norm(inputs[0], inputs[1].shape, inputs[1], bias, attributes["epsilon"])


OPERATORS: dict[str, Operator] = {
    "Add": lambda inputs, _: inputs[0] + inputs[1],
    "Attention": _attention,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "Div": lambda inputs, _: inputs[0] / inputs[1],
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": lambda inputs, attributes: functional.gelu(inputs[0], approximate=attributes.get("approximate", "none")),
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda inputs, _: inputs[0] @ inputs[1],
    "MaxPool": _max_pool,
    "Mul": lambda inputs, _: inputs[0] * inputs[1],
    "Pad": _pad,
    "Reciprocal": lambda inputs, _: torch.reciprocal(inputs[0]),
    "ReduceMean": _reduce_mean,
    "Relu": lambda inputs, _: torch.relu(inputs[0]),
    "Reshape": _reshape,
    "Shape": lambda inputs, attributes: list(inputs[0].shape[attributes.get("start", 0) : attributes.get("end")]),
    "Sigmoid": lambda inputs, _: torch.sigmoid(inputs[0]),
    "Slice": _slice,
    "Split": _split,
    "Sqrt": lambda inputs, _: torch.sqrt(inputs[0]),
    "Sub": lambda inputs, _: inputs[0] - inputs[1],
    "Tanh": lambda inputs, _: torch.tanh(inputs[0]),
    "Transpose": lambda inputs, attributes: inputs[0].permute(attributes["perm"]),
}
