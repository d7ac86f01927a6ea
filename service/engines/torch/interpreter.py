"""Runs a bundle's ONNX graph in torch, with one torch call per operator.

torch runs the verified graph instead of a network that is rebuilt from a checkpoint. Supported are the operators that
vitserve exports: https://onnx.ai/onnx/operators, opset 23.
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

from vitserve.service.engines.engine import EngineUnavailableError
from vitserve.service.engines.graph_shapes import shapes_of
from vitserve.service.engines.torch import fp8
from vitserve.service.engines.torch.fused_kernels import fused_kernel
from vitserve.service.engines.torch.fusion import ADD_NORM, FP8_PRODUCT, LINEAR, LINEAR_GELU, QUANTIZE, Step, fuse

Attributes = dict[str, Any]
# An omitted optional input is None. An operator with several outputs returns a tuple.
Operator = Callable[[Sequence[Any], Attributes], Any]


class TorchGraph(nn.Module):
    """uint8 pixels [n, H, W, C] → float32 logits [n, classes] and embedding [n, width].

    Computes in ``dtype`` where the graph has float32.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Raises EngineUnavailableError for an unsupported operator."""
        super().__init__()
        self._dtype = dtype
        graph = ir.load(path).graph
        self.image_shape = shapes_of(path).image
        self._inputs = [str(value.name) for value in graph.inputs]
        self._outputs = [str(value.name) for value in graph.outputs]
        dimensions = {str(name): len(value.shape or ()) for name, value in graph.initializers.items()}
        self._steps = fuse([_step(node) for node in graph], dimensions, self._outputs)
        unsupported = sorted({step.operator for step in self._steps} - OPERATORS.keys() - {"Cast"})
        if unsupported:
            raise EngineUnavailableError(f"torch cannot run the operators {', '.join(unsupported)} of {path.name}")
        self._numbers = dict[str, list[Any]]()  # shapes, axes and padding values: read on the host only
        self._add_initializers(graph)

    def _add_initializers(self, graph: ir.Graph) -> None:
        products = [step for step in self._steps if step.operator == FP8_PRODUCT]
        weights = {str(step.inputs[2]): str(step.inputs[3]) for step in products}  # and their scales
        scales = {str(step.inputs[index]) for step in products for index in (1, 3)}
        read = {name for step in self._steps for name in step.inputs}
        for name, value in graph.initializers.items():
            assert value.const_value is not None
            is_padding_value = any(user.op_type == "Pad" and index == 2 for user, index in value.uses())
            if value.const_value.dtype == ir.DataType.INT64 or is_padding_value:
                self._numbers[name] = value.const_value.numpy().reshape(-1).tolist()
            elif name in weights:
                self._add_tensor(name, fp8.stored_weight(_tensor(value), _tensor(graph.initializers[weights[name]])))
            elif name in read:
                tensor = _tensor(value)
                cast = tensor.is_floating_point() and name not in scales
                self._add_tensor(name, tensor.to(self._dtype) if cast else tensor)

    def _add_tensor(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(_attribute(name), tensor)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        values: dict[str, Any] = {**self._numbers, self._inputs[0]: pixels}

        def read(name: str | None) -> Any:
            return None if name is None else values[name] if name in values else getattr(self, _attribute(name))

        for step in self._steps:
            inputs = [read(name) for name in step.inputs]
            if step.operator == "Cast":
                result = inputs[0].to(self._dtype)
            else:
                result = OPERATORS[step.operator](inputs, step.attributes)
            values.update(zip(step.outputs, result if isinstance(result, tuple) else (result,), strict=True))
        logits, embedding = (values[name] for name in self._outputs)
        return logits.float(), embedding.float()


def _step(node: ir.Node) -> Step:
    inputs = [None if value is None else str(value.name) for value in node.inputs]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == QUANTIZE and node.outputs[0].dtype != ir.DataType.FLOAT8E4M3FN:
        raise EngineUnavailableError(f"torch quantizes to {ir.DataType.FLOAT8E4M3FN}, not to {node.outputs[0].dtype}")
    return Step(node.op_type, inputs, attributes, [str(value.name) for value in node.outputs])


def _tensor(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().copy())


def _attribute(name: str) -> str:
    """torch does not allow dots in the names of buffers."""
    return "value_" + name.replace(".", "_dot_")


def _attention(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """Q, K, V [n, tokens, width] → [n, queries, width]."""
    heads = attributes["q_num_heads"]
    query, key, value = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in inputs[:3])
    mask = inputs[3] if len(inputs) > 3 else None
    mixed = functional.scaled_dot_product_attention(query, key, value, mask, scale=attributes.get("scale"))
    return mixed.transpose(1, 2).flatten(2)


def _conv(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, pads = inputs[0], attributes.get("pads", (0, 0, 0, 0))
    if tuple(pads[:2]) != tuple(pads[2:]):
        x, pads = functional.pad(x, (pads[1], pads[3], pads[0], pads[2])), (0, 0)
    weight, bias = inputs[1], inputs[2] if len(inputs) > 2 else None
    kernel, strides = tuple(weight.shape[2:]), tuple(attributes["strides"])
    splits_into_patches = x.shape[2] % kernel[0] == x.shape[3] % kernel[1] == 0
    if kernel == strides and not any(pads) and attributes["group"] == 1 and splits_into_patches:
        return _project_patches(x, weight, bias)
    return functional.conv2d(x, weight, bias, strides, tuple(pads[:2]), attributes["dilations"], attributes["group"])


def _project_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution without overlap, as one matrix product. It takes a sixth of cuDNN's time (docs/gpu.md)."""
    n, channels, (high, wide) = len(x), x.shape[1], weight.shape[2:]
    rows, columns = x.shape[2] // high, x.shape[3] // wide
    patches = (
        x.reshape(n, channels, rows, high, columns, wide)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(n, rows * columns, channels * high * wide)
    )
    return functional.linear(patches, weight.flatten(1), bias).transpose(1, 2).view(n, -1, rows, columns)


def _max_pool(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    x = functional.pad(inputs[0], (left, right, top, bottom), value=-math.inf)
    pooled: Tensor = functional.max_pool2d(x, attributes["kernel_shape"], attributes["strides"])
    return pooled


def _gemm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    left, right = (
        matrix.T if attributes.get(transposed) else matrix
        for matrix, transposed in zip(inputs, ("transA", "transB"), strict=False)
    )
    product: Tensor = attributes.get("alpha", 1.0) * (left @ right)
    return product if len(inputs) < 3 else product + attributes.get("beta", 1.0) * inputs[2]


def _slice(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x: Tensor = inputs[0]
    starts, ends = inputs[1:3]
    axes = inputs[3] if len(inputs) > 3 else range(len(starts))
    steps = inputs[4] if len(inputs) > 4 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = x[(slice(None),) * (axis % x.ndim) + (slice(start, min(end, x.shape[axis]), step),)]
    return x


def _split(inputs: Sequence[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    axis = attributes.get("axis", 0)
    if len(inputs) > 1:
        return tuple(torch.split(inputs[0], inputs[1], axis))
    return tuple(torch.chunk(inputs[0], attributes["num_outputs"], axis))


def _concat(inputs: Sequence[Any], attributes: Attributes) -> Any:
    if all(isinstance(part, list) for part in inputs):  # a shape
        return [number for part in inputs for number in part]
    return torch.cat(list(inputs), attributes["axis"])


def _reshape(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, shape = inputs
    copies_zeros = not attributes.get("allowzero")
    sizes = [x.shape[axis] if size == 0 and copies_zeros else size for axis, size in enumerate(shape)]
    reshaped: Tensor = x.reshape(sizes)
    return reshaped


def _expand(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """A size of 1, in the tensor or in the shape, becomes the other's size."""
    x, shape = inputs
    sizes = [current if size == 1 else size for current, size in zip(x.shape, shape, strict=True)]
    expanded: Tensor = x.expand(sizes)
    return expanded


def _reduce_mean(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    return torch.mean(inputs[0], dim=inputs[1], keepdim=bool(attributes.get("keepdims", 1)))


def _gather(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """Only with a single index, which removes the axis."""
    (index,) = inputs[1]
    selected: Tensor = inputs[0].select(attributes.get("axis", 0), index)
    return selected


def _pad(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, pads = inputs[:2]
    (value,) = inputs[2] if len(inputs) > 2 and inputs[2] is not None else (0.0,)
    last_axis_first = [pad for axis in reversed(range(x.ndim)) for pad in (pads[axis], pads[x.ndim + axis])]
    return functional.pad(x, last_axis_first, value=value)


def _group_norm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    return functional.group_norm(inputs[0], attributes["num_groups"], inputs[1], inputs[2], attributes["epsilon"])


def _batch_norm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, scale, bias, mean, variance = inputs
    return functional.batch_norm(x, mean, variance, scale, bias, eps=attributes["epsilon"])


def _linear_gelu(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """In bf16 on a GPU, the kernel of the product applies GELU in its tanh form.

    It differs from the exact form by at most 5e-4, which bf16 does not resolve above 1/8.
    """
    x, weight, bias = inputs
    if x.is_cuda and x.dtype == torch.bfloat16:
        flat: Tensor = torch._addmm_activation(bias, x.flatten(0, -2), weight, use_gelu=True)
        return flat.view(*x.shape[:-1], -1)
    return functional.gelu(functional.linear(x, weight.T, bias), approximate=attributes.get("approximate", "none"))


def _add_norm(inputs: Sequence[Any], attributes: Attributes) -> tuple[Tensor, Tensor]:
    x, y, *parameters = inputs
    kernel = fused_kernel("add_norm") if x.is_cuda else None
    if kernel is not None and len(parameters) == 2 and x.shape == y.shape and x.is_contiguous() and y.is_contiguous():
        total, normed = kernel(x, y, *parameters, attributes["epsilon"])
        return total, normed
    total = x + y
    return total, _layer_norm([total, *parameters], attributes)


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
    ADD_NORM: _add_norm,
    FP8_PRODUCT: fp8.product,
    LINEAR_GELU: _linear_gelu,
    LINEAR: lambda inputs, _: functional.linear(inputs[0], inputs[1].T, inputs[2]),
    "MaxPool": _max_pool,
    "Mul": lambda inputs, _: inputs[0] * inputs[1],
    "Pad": _pad,
    QUANTIZE: fp8.quantize,
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
