"""The canonical graph in bf16 or fp16, every operand of one type: TensorRT 11 takes precision from the graph alone. Imported by to_tensorrt.py; no torch.

bf16 has float32's range, so everything runs in it. fp16 has not: LayerNormalization is computed in float32 (sums of squares overflow, NVIDIA/TensorRT
#2564, #4493), and softmax too (the operator's softmax_precision). Pixels become the type directly: 0 … 255 are exact in either. Outputs are float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx_ir as ir

_TYPES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}


def typed(canonical: Path, precision: Literal["bf16", "fp16"]) -> ir.Model:
    """The graph at ``canonical`` in ``precision``, with its weights in memory. Raises ValueError for a float constant where none is expected."""
    model, dtype = ir.load(canonical), _TYPES[precision]
    graph = model.graph
    norms = [node for node in graph if node.op_type == "LayerNormalization"] if precision == "fp16" else []
    in_float32 = {value.name for node in norms for value in node.inputs[1:] if value is not None}
    for value in graph.initializers.values():
        assert value.const_value is not None
        kept = value.dtype != ir.DataType.FLOAT or value.name in in_float32
        wanted = value.const_value.dtype if kept else dtype
        value.const_value = ir.tensor(value.const_value.numpy().astype(wanted.numpy()), dtype=wanted, name=value.name)
        value.dtype = wanted
    for node in graph:
        for made in node.outputs:
            if made.dtype == ir.DataType.FLOAT:
                made.dtype = dtype
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", dtype.value)
        elif node.op_type == "Attention" and precision == "fp16":
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", ir.DataType.FLOAT.value)
        elif node.op_type == "Constant" and (tensor := node.attributes.get("value")) is not None and tensor.as_tensor().dtype == ir.DataType.FLOAT:
            raise ValueError(f"node {node.name} is a float constant; the exporter makes initializers of them")
    for node in norms:
        _in_float32(graph, node, dtype)
    for output in list(graph.outputs):
        _float32_output(graph, output)
    return model


def _in_float32(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    """Casts around a node: its first input to float32, its first output back."""
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


def _float32_output(graph: ir.Graph, output: ir.Value) -> None:
    """The same name and type as before, from a cast at the very end."""
    producer = output.producer()
    assert producer is not None
    name, shape = output.name, output.shape
    output.name = f"{name}_{output.dtype.name.lower() if output.dtype else ''}"
    cast = ir.node("Cast", [output], {"to": ir.DataType.FLOAT.value}, name=f"{name}_cast")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].dtype = name, shape, ir.DataType.FLOAT
    graph.append(cast)
    graph.outputs[graph.outputs.index(output)] = cast.outputs[0]
