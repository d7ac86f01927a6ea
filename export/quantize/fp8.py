"""The fp8 form of the reference graph, for TensorRT: the matrix products of the blocks in E4M3, calibrated on images.

Each tensor has one scale, from the greatest magnitude seen, as in NVIDIA's recipe for ViT
(github.com/NVIDIA/Model-Optimizer, pull requests 1289 and 1569). The patch projection, the head and the attention stay
in bf16. They are a small part of the arithmetic, and TensorRT fuses the attention operator as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from vitserve.export.graph.initializers import add_initializer
from vitserve.model.arrays import Pixels

GREATEST_E4M3 = 448.0  # the largest finite value of E4M3; arXiv:2209.05433
_BATCH_SIZE = 8


def write_fp8_graph(reference_graph: Path, path: Path, images: Pixels) -> None:
    """Writes the reference graph with both operands of the blocks' products quantized.

    ``path`` is in the same directory, and shares the weights. Arithmetic stays in float32, so that any CPU can measure
    the loss that fp8 causes. cast_graph() converts the graph to bf16 and fp8. Raises ValueError if there is no such
    product.
    """
    model = ir.load(reference_graph)
    products = [
        node
        for node in model.graph
        if node.op_type == "MatMul" and _weight(node) is not None and not node.outputs[0].is_graph_output()
    ]
    if not products:
        raise ValueError("cannot quantize to fp8: the graph has no matrix product inside a block")
    zero = add_initializer(model.graph, "fp8_zero", np.zeros((), ml_dtypes.float8_e4m3fn))
    activations = list(dict.fromkeys(value for node in products if (value := node.inputs[0]) is not None))
    magnitudes = _greatest_magnitudes(reference_graph, [str(value.name) for value in activations], images)
    for value in activations:
        users = [node for node in products if node.inputs[0] is value]
        _quantize(model.graph, value, magnitudes[str(value.name)], users, 0, zero)
    for value in dict.fromkeys(weight for node in products if (weight := _weight(node)) is not None):
        assert value.const_value is not None
        magnitude = float(np.abs(value.const_value.numpy()).max())
        _quantize(model.graph, value, magnitude, [node for node in products if node.inputs[1] is value], 1, zero)
    ir.save(model, path)


def fold_weights(graph: ir.Graph, scale_type: ir.DataType) -> None:
    """Stores quantized weights as fp8 in the graph, in place of float32 weights with a QuantizeLinear node.

    Scales are rounded to ``scale_type`` first, because the weights will be dequantized with the rounded scale.
    """
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if value is None or value.const_value is None:
            continue
        scale = node.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        rounded = scale.const_value.numpy().astype(scale_type.numpy()).astype(np.float32)
        scaled = np.clip(value.const_value.numpy() / rounded, -GREATEST_E4M3, GREATEST_E4M3)
        weight = add_initializer(graph, f"{value.name}_weight", scaled.astype(ml_dtypes.float8_e4m3fn))
        for user, index in tuple(node.outputs[0].uses()):
            user.replace_input_with(index, weight)
        graph.remove(node, safe=True)
        if not value.uses():
            del graph.initializers[str(value.name)]


def _weight(node: ir.Node) -> ir.Value | None:
    """The second operand, if it is a constant matrix."""
    operand = node.inputs[1]
    if operand is None or operand.const_value is None or len(operand.const_value.shape) != 2:
        return None
    return operand


def _quantize(
    graph: ir.Graph, value: ir.Value, magnitude: float, users: Sequence[ir.Node], index: int, zero: ir.Value
) -> None:
    """Inserts QuantizeLinear and DequantizeLinear between ``value`` and input ``index`` of ``users``."""
    scale_array = np.asarray(magnitude / GREATEST_E4M3 if magnitude else 1, np.float32)
    scale = add_initializer(graph, f"{value.name}_scale", scale_array)
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}_quantize")
    restore = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{value.name}_restore")
    for node, suffix, dtype in ((quantize, "fp8", ir.DataType.FLOAT8E4M3FN), (restore, "restored", ir.DataType.FLOAT)):
        output = node.outputs[0]
        output.name, output.dtype, output.shape = f"{value.name}_{suffix}", dtype, value.shape
    graph.insert_before(users[0], [quantize, restore])
    for user in users:
        user.replace_input_with(index, restore.outputs[0])


def _greatest_magnitudes(reference_graph: Path, names: Sequence[str], images: Pixels) -> dict[str, float]:
    """The greatest magnitude of each named value over all images."""
    try:
        import onnxruntime  # here, because fold_weights() also runs where only TensorRT is installed
    except ImportError as error:
        raise ImportError(f"calibrating fp8 needs onnxruntime ({error}): pip install 'vitserve[export]'") from error

    probe = reference_graph.with_name("probe.onnx")
    try:
        ir.save(_with_magnitudes_as_outputs(ir.load(reference_graph), names), probe)
        session = onnxruntime.InferenceSession(probe, providers=["CPUExecutionProvider"])
        batches = [images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE)]
        magnitudes = [session.run(None, {"pixels": batch}) for batch in batches]
    finally:
        probe.unlink(missing_ok=True)
    return dict(zip(names, np.max(np.asarray(magnitudes, np.float32), axis=0).tolist(), strict=True))


def _with_magnitudes_as_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    graph.outputs.clear()
    for name in names:
        absolute = ir.node("Abs", [values[name]])
        greatest = ir.node("ReduceMax", [absolute.outputs[0]], {"keepdims": 0})
        output = greatest.outputs[0]
        output.name, output.dtype, output.shape = f"{name}_greatest", ir.DataType.FLOAT, ir.Shape([])
        graph.extend([absolute, greatest])
        graph.outputs.append(output)
    return model
