"""The reference graph in bf16, fp16 or fp8, every operand of one type: TensorRT 11 takes precision from the graph alone.

bf16 has float32's range, so everything runs in it. fp16 has not: LayerNormalization is computed in float32 (sums of squares overflow, NVIDIA/TensorRT
#2564, #4493), and softmax too (the operator's softmax_precision). Pixels become the type directly: 0 … 255 are exact in either. Outputs are float32.
fp8 is bf16 with the products that export/quantize/fp8.py has quantized.

    python -m vitserve.export.graph.cast_precision GRAPH TARGET PRECISION

writes it for ONNX Runtime on a GPU; run by service/engines/gpu_artifacts.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Literal, cast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vitserve.export.graph.initializers import initializer
from vitserve.export.quantize.fp8 import fold_weights

Typed = Literal["bf16", "fp16", "fp8"]

_TYPES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16, "fp8": ir.DataType.BFLOAT16}


def cast_graph(source: Path, precision: Typed) -> ir.Model:
    """The reference graph, or for fp8 the quantized one, in ``precision``, with its weights in memory.

    Raises ValueError for a float constant where none is expected.
    """
    model, dtype = ir.load(source), _TYPES[precision]
    graph = model.graph
    if precision == "fp8":
        fold_weights(graph, dtype)
    _without_shapes(model)
    norms = [node for node in graph if node.op_type == "LayerNormalization"] if precision == "fp16" else []
    for node in norms:
        _own_parameters(graph, node)
    in_float32 = {value.name for node in norms for value in node.inputs[1:] if value is not None}
    for value in graph.initializers.values():
        assert value.const_value is not None
        kept = value.dtype != ir.DataType.FLOAT or value.name in in_float32
        wanted = ir.DataType(value.const_value.dtype) if kept else dtype
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
        elif (
            node.op_type == "Constant"
            and (tensor := node.attributes.get("value")) is not None
            and tensor.as_tensor().dtype == ir.DataType.FLOAT
        ):
            raise ValueError(f"node {node.name} is a float constant; the exporter makes initializers of them")
    for node in norms:
        _in_float32(graph, node, dtype)
    for output in list(graph.outputs):
        _float32_output(graph, output)
    return model


def _without_shapes(model: ir.Model) -> None:
    """The class token and its like are added to nothing at all, [n, 1, width], instead of expanded to a size that is read from the input.

    Shapes are computed on the host, and ONNX Runtime then runs a graph's nodes in two places.
    """
    graph = model.graph
    for concat in [node for node in graph if node.op_type == "Concat"]:
        prefixes = [
            each
            for value in concat.inputs
            if value is not None and (each := value.producer()) is not None and each.op_type == "Expand"
        ]
        if not prefixes:
            continue
        tokens = concat.inputs[-1]
        start, end, zero = (
            initializer(graph, f"typed_{name}", np.asarray(value))
            for name, value in (("start", [0]), ("end", [1]), ("zero", np.float32(0)))
        )
        first = ir.node("Slice", [tokens, start, end, end], name="first_token")
        nothing = ir.node("Mul", [first.outputs[0], zero], name="nothing")
        added = [ir.node("Add", [node.inputs[0], nothing.outputs[0]], name=node.name) for node in prefixes]
        for made in (first, nothing, *added):
            made.outputs[0].dtype = ir.DataType.FLOAT
        graph.insert_before(concat, [first, nothing, *added])
        for node, replacement in zip(prefixes, added, strict=True):
            replacement.outputs[0].name, replacement.outputs[0].shape = node.outputs[0].name, node.outputs[0].shape
            node.outputs[0].replace_all_uses_with(replacement.outputs[0])
            graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)


def _own_parameters(graph: ir.Graph, norm: ir.Node) -> None:
    """A norm's scale and shift that others read as well (the exporter keeps one of equal tensors) are copied, for they will be of another type."""
    for index, value in enumerate(norm.inputs[1:], 1):
        if value is not None and any(user.op_type != norm.op_type for user, _ in value.uses()):
            assert value.const_value is not None
            norm.replace_input_with(index, initializer(graph, f"{norm.name}_{index}", value.const_value.numpy()))


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


def write_cast_graph(source: Path, target: Path, precision: Typed) -> None:
    """The graph at ``target``, its weights beside it; each is there at once or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made, weights = Path(directory) / target.name, f"{target.name}.data"
        ir.save(cast_graph(source, precision), made, external_data=weights)
        (Path(directory) / weights).replace(target.parent / weights)
        made.replace(target)


if __name__ == "__main__":
    write_cast_graph(Path(sys.argv[1]), Path(sys.argv[2]), cast("Typed", sys.argv[3]))
