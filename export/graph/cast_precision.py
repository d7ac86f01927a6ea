"""The cast graph: the reference graph in bf16, fp16 or fp8.

TensorRT 11 takes the precision from the graph alone, so all operands have one type. Inputs and outputs do not change:
uint8 pixels (0 … 255 are exact in every type) and float32 outputs.

- bf16 has float32's range, so the whole graph runs in it.
- fp16 has a smaller range. LayerNormalization is computed in float32, because sums of squares overflow
  (NVIDIA/TensorRT issues 2564 and 4493). Softmax is too (attribute softmax_precision of Attention).
- fp8 is bf16 with the matrix products that export/quantize/fp8.py has quantized.

    python -m vitserve.export.graph.cast_precision GRAPH TARGET PRECISION

writes the graph for ONNX Runtime on a GPU. service/engines/gpu_artifacts.py runs this command.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Literal, cast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vitserve.export.graph.initializers import add_initializer
from vitserve.export.quantize.fp8 import fold_weights

CastPrecision = Literal["bf16", "fp16", "fp8"]

_TYPES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16, "fp8": ir.DataType.BFLOAT16}


def cast_graph(source: Path, precision: CastPrecision) -> ir.Model:
    """The graph at ``source`` in ``precision``, with its weights in memory.

    ``source`` is the reference graph, or for fp8 the quantized graph. Raises ValueError if a node is a float constant.
    """
    model, dtype = ir.load(source), _TYPES[precision]
    graph = model.graph
    if precision == "fp8":
        fold_weights(graph, dtype)
    _remove_shape_computation(model)
    float32_norms = [node for node in graph if node.op_type == "LayerNormalization"] if precision == "fp16" else []
    for node in float32_norms:
        _copy_shared_parameters(graph, node)
    float32_names = {value.name for node in float32_norms for value in node.inputs[1:] if value is not None}
    for value in graph.initializers.values():
        _cast_initializer(value, ir.DataType.FLOAT if value.name in float32_names else dtype)
    for node in graph:
        _cast_node(node, dtype)
        if node.op_type == "Attention" and precision == "fp16":
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", ir.DataType.FLOAT.value)
    for node in float32_norms:
        _compute_in_float32(graph, node, dtype)
    for output in list(graph.outputs):
        _cast_output_to_float32(graph, output)
    return model


def _cast_initializer(value: ir.Value, dtype: ir.DataType) -> None:
    """Loads the value into memory, and casts it if it is float32."""
    assert value.const_value is not None
    target = dtype if value.dtype == ir.DataType.FLOAT else ir.DataType(value.const_value.dtype)
    value.const_value = ir.tensor(value.const_value.numpy().astype(target.numpy()), dtype=target, name=value.name)
    value.dtype = target


def _cast_node(node: ir.Node, dtype: ir.DataType) -> None:
    for output in node.outputs:
        if output.dtype == ir.DataType.FLOAT:
            output.dtype = dtype
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", dtype.value)
    tensor = node.attributes.get("value") if node.op_type == "Constant" else None
    if tensor is not None and tensor.as_tensor().dtype == ir.DataType.FLOAT:
        raise ValueError(f"node {node.name} is a float constant; expected an initializer")


def _remove_shape_computation(model: ir.Model) -> None:
    """Broadcasts the class token by adding it to a zero tensor of shape [n, 1, width] instead of with Expand.

    Expand needs the batch size, which is computed on the host. ONNX Runtime would then run the graph on two devices.
    """
    graph = model.graph
    for concat in [node for node in graph if node.op_type == "Concat"]:
        producers = [value.producer() for value in concat.inputs if value is not None]
        expands = [node for node in producers if node is not None and node.op_type == "Expand"]
        if not expands:
            continue
        tokens = concat.inputs[-1]
        start, end, zero = (
            add_initializer(graph, f"cast_{name}", np.asarray(value))
            for name, value in (("start", [0]), ("end", [1]), ("zero", np.float32(0)))
        )
        first_token = ir.node("Slice", [tokens, start, end, end], name="first_token")
        zeros = ir.node("Mul", [first_token.outputs[0], zero], name="zeros")
        additions = [ir.node("Add", [node.inputs[0], zeros.outputs[0]], name=node.name) for node in expands]
        for node in (first_token, zeros, *additions):
            node.outputs[0].dtype = ir.DataType.FLOAT
        graph.insert_before(concat, [first_token, zeros, *additions])
        for expand, addition in zip(expands, additions, strict=True):
            addition.outputs[0].name, addition.outputs[0].shape = expand.outputs[0].name, expand.outputs[0].shape
            expand.outputs[0].replace_all_uses_with(addition.outputs[0])
            graph.remove(expand, safe=True)
    RemoveUnusedNodesPass()(model)


def _copy_shared_parameters(graph: ir.Graph, norm: ir.Node) -> None:
    """Copies a norm's scale and shift if other operators read them too, because the norm's will have another type.

    The exporter stores equal tensors once.
    """
    for index, value in enumerate(norm.inputs[1:], 1):
        if value is not None and any(user.op_type != norm.op_type for user, _ in value.uses()):
            assert value.const_value is not None
            norm.replace_input_with(index, add_initializer(graph, f"{norm.name}_{index}", value.const_value.numpy()))


def _compute_in_float32(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    """Casts the node's first input to float32 and its first output back to ``dtype``."""
    before = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{node.name}_in")
    graph.insert_before(node, before)
    node.replace_input_with(0, before.outputs[0])
    before.outputs[0].dtype, before.outputs[0].shape = ir.DataType.FLOAT, node.outputs[0].shape
    output = node.outputs[0]
    after = ir.node("Cast", [output], {"to": dtype.value}, name=f"{node.name}_out")
    after.outputs[0].dtype, after.outputs[0].shape, output.dtype = dtype, output.shape, ir.DataType.FLOAT
    graph.insert_after(node, after)
    for user, index in tuple(output.uses()):
        if user is not after:
            user.replace_input_with(index, after.outputs[0])


def _cast_output_to_float32(graph: ir.Graph, output: ir.Value) -> None:
    """Appends a cast, so that the graph's output keeps its name and type."""
    name, shape = output.name, output.shape
    output.name = f"{name}_{output.dtype.name.lower() if output.dtype else ''}"
    cast = ir.node("Cast", [output], {"to": ir.DataType.FLOAT.value}, name=f"{name}_cast")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].dtype = name, shape, ir.DataType.FLOAT
    graph.append(cast)
    graph.outputs[graph.outputs.index(output)] = cast.outputs[0]


def write_cast_graph(source: Path, target: Path, precision: CastPrecision) -> None:
    """Writes the graph to ``target`` and its weights to ``target``.data. Each file appears complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        graph, weights = Path(temporary) / target.name, f"{target.name}.data"
        ir.save(cast_graph(source, precision), graph, external_data=weights)
        (Path(temporary) / weights).replace(target.parent / weights)
        graph.replace(target)


if __name__ == "__main__":
    write_cast_graph(Path(sys.argv[1]), Path(sys.argv[2]), cast("CastPrecision", sys.argv[3]))
