"""The rules by which TensorRT rejects a graph, as the double applies them, with the library's own words.

tests/export/tensorrt/test_rejected_graphs.py holds both the double and the genuine library to one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

Capability = tuple[int, int]

ONE_TYPE = {"Add": "ElementWiseOperation SUM", "MatMul": "IMatrixMultiplyLayer", "Mul": "ElementWiseOperation PROD"}
HARDWARE_TYPES = {  # type → (its name in messages, the first compute capability that has it)
    TensorProto.BFLOAT16: ("b16", (8, 0)),
    TensorProto.FLOAT8E4M3FN: ("fp8_e4m3", (8, 9)),
}
HEAD_SIZES = range(16, 257)  # for which there is a fused kernel; smaller ones crash TensorRT for RTX 1.7.1
NO_KERNEL = (
    "MyelinCheckException: decompose_composite_ops.cpp:59: CHECK(composite_op->is_decomposable()) failed. "
    "Attention operation was not supported by a dedicated kernel."
)


@dataclass(frozen=True)
class Rejected:
    operator: str
    node: str
    reason: str


def parser_rejections(model: onnx.ModelProto) -> Iterator[Rejected]:
    types = types_of(model)
    for node in model.graph.node:
        for reason in _reasons(node, types):
            yield Rejected(node.op_type, node.name, reason)


def _reasons(node: onnx.NodeProto, types: dict[str, int]) -> Iterator[str]:
    attributes = {attribute.name for attribute in node.attribute}
    if node.domain or not onnx.defs.has(node.op_type) or node.op_type == "NonZero":
        yield f'creator && "Plugin not found, are the plugin name, version, and namespace correct?" ({node.op_type})'
    if node.op_type == "Attention" and "softmax_precision" in attributes:
        yield '!hasSoftmaxPrecision && "Setting softmax precision is not supported in TensorRT Attention."'
    if node.op_type == "Attention" and len(node.output) != 1:
        yield "node.output().size() == 1: TensorRT only supports Attention nodes with one output."
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) < 2:
        yield f"This version of TensorRT requires at least 2 inputs for the {node.op_type} operator."
    operands = {types[name] for name in node.input if name in types}
    if node.op_type in ONE_TYPE and len(operands) > 1:
        yield f"{node.name}: {ONE_TYPE[node.op_type]} must have same input types."


def builder_rejection(
    model: onnx.ModelProto, capabilities: Sequence[Capability], smallest_batches: Sequence[int]
) -> str | None:
    """``smallest_batches`` of the profiles."""
    types = types_of(model)
    for kind, (name, first) in HARDWARE_TYPES.items():
        unfit = [f"sm{major}{minor}" for major, minor in capabilities if (major, minor) < first]
        if unfit and kind in types.values():
            return (
                f"Cannot compile for target(s) {', '.join(unfit)}, because the model contains HW-specific datatypes: "
                f"{name}"
            )
    shapes = shapes_of(model)
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    for node in attentions:
        heads, queries, size = _attention_shape(node, shapes)
        read = types.get(casts.get(node.input[0], node.input[0]))  # a cast to float32 is part of the kernel
        fewest = heads * min(smallest_batches)
        if fewest < (4 if queries == 1 else 2) or size not in HEAD_SIZES or read == TensorProto.FLOAT:
            return NO_KERNEL
    return None


def _attention_shape(node: onnx.NodeProto, shapes: dict[str, list[Any]]) -> tuple[int, int, int]:
    """Heads, queries, head size."""
    shape = shapes[node.input[0]]
    if len(shape) == 4:
        return shape[1], shape[2], shape[3]
    heads = next(attribute.i for attribute in node.attribute if attribute.name == "q_num_heads")
    return heads, shape[1], shape[2] // heads


def _values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:  # of an invalid graph: the values that it declares
        inferred = model
    return [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    types = {value.name: value.type.tensor_type.elem_type for value in _values(model)}
    return types | {initializer.name: initializer.data_type for initializer in model.graph.initializer}


def shapes_of(model: onnx.ModelProto) -> dict[str, list[Any]]:
    shapes = {
        value.name: [each.dim_value or each.dim_param for each in value.type.tensor_type.shape.dim]
        for value in _values(model)
    }
    return shapes | {each.name: list(np.asarray(each.dims)) for each in model.graph.initializer}
