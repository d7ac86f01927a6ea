"""The fp8 form of the reference graph, for TensorRT: the blocks' products in E4M3, ranges from calibration images.

One scale a tensor, from the greatest magnitude seen, as in NVIDIA's recipe for ViT (github.com/NVIDIA/Model-Optimizer, pull requests 1289 and 1569). The patch
projection, the head and the attention stay in bf16: they are a small part of the arithmetic, and attention is one operator that TensorRT fuses as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime

from vitserve.export.graph.initializers import initializer
from vitserve.model.arrays import Pixels

GREATEST = 448.0  # that E4M3 can say; arXiv:2209.05433
_BATCH = 8


def calibrated(reference_graph: Path, path: Path, images: Pixels) -> None:
    """Writes the graph at ``reference`` to ``path``, in the same directory, whose weights it shares, with both operands of the blocks' products quantized.

    Still in float32, so that any CPU can show what fp8 costs: typed() makes bf16 and fp8 of it. Raises ValueError where there is no such product.
    """
    model = ir.load(reference_graph)
    products = [
        node
        for node in model.graph
        if node.op_type == "MatMul" and _weight(node) is not None and not node.outputs[0].is_graph_output()
    ]
    if not products:
        raise ValueError("the graph has no blocks whose products could be in fp8")
    zero = initializer(model.graph, "fp8_zero", np.zeros((), ml_dtypes.float8_e4m3fn))
    read = list(dict.fromkeys(value for node in products if (value := node.inputs[0]) is not None))
    seen = _greatest_magnitudes(reference_graph, [str(value.name) for value in read], images)
    for value in read:
        _quantize(
            model.graph, value, seen[str(value.name)], [node for node in products if node.inputs[0] is value], 0, zero
        )
    for value in dict.fromkeys(weight for node in products if (weight := _weight(node)) is not None):
        assert value.const_value is not None
        magnitude = float(np.abs(value.const_value.numpy()).max())
        _quantize(model.graph, value, magnitude, [node for node in products if node.inputs[1] is value], 1, zero)
    ir.save(model, path)


def fold_weights(graph: ir.Graph, scale_type: ir.DataType) -> None:
    """Weights that are quantized in the graph become fp8 there; their scales are rounded to ``scale_type`` first, in which they will be multiplied back."""
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if value is None or value.const_value is None:
            continue
        scale = node.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        rounded = scale.const_value.numpy().astype(scale_type.numpy()).astype(np.float32)
        folded = np.clip(value.const_value.numpy() / rounded, -GREATEST, GREATEST).astype(ml_dtypes.float8_e4m3fn)
        kept = initializer(graph, f"{value.name}_weight", folded)
        for user, index in tuple(node.outputs[0].uses()):
            user.replace_input_with(index, kept)
        graph.remove(node, safe=True)
        if not value.uses():
            del graph.initializers[str(value.name)]


def _weight(node: ir.Node) -> ir.Value | None:
    second = node.inputs[1]
    return (
        second if second is not None and second.const_value is not None and len(second.const_value.shape) == 2 else None
    )


def _quantize(
    graph: ir.Graph, value: ir.Value, magnitude: float, users: Sequence[ir.Node], index: int, zero: ir.Value
) -> None:
    """``users`` read ``value``, as their input ``index``, through QuantizeLinear and DequantizeLinear."""
    scale = initializer(graph, f"{value.name}_scale", np.asarray(magnitude / GREATEST if magnitude else 1, np.float32))
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}_quantize")
    restore = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{value.name}_restore")
    for node, suffix, dtype in ((quantize, "fp8", ir.DataType.FLOAT8E4M3FN), (restore, "restored", ir.DataType.FLOAT)):
        made = node.outputs[0]
        made.name, made.dtype, made.shape = f"{value.name}_{suffix}", dtype, value.shape
    graph.insert_before(users[0], [quantize, restore])
    for user in users:
        user.replace_input_with(index, restore.outputs[0])


def _greatest_magnitudes(reference_graph: Path, names: Sequence[str], images: Pixels) -> dict[str, float]:
    """Of each of these values, over all images."""
    model, probe = ir.load(reference_graph), reference_graph.with_name("probe.onnx")
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.clear()
    for name in names:
        magnitudes = ir.node("Abs", [values[name]])
        greatest = ir.node("ReduceMax", [magnitudes.outputs[0]], {"keepdims": 0})
        greatest.outputs[0].name, greatest.outputs[0].dtype, greatest.outputs[0].shape = (
            f"{name}_greatest",
            ir.DataType.FLOAT,
            ir.Shape([]),
        )
        model.graph.extend([magnitudes, greatest])
        model.graph.outputs.append(greatest.outputs[0])
    try:
        ir.save(model, probe)
        session = onnxruntime.InferenceSession(probe, providers=["CPUExecutionProvider"])
        runs = [
            session.run(None, {"pixels": images[start : start + _BATCH]}) for start in range(0, len(images), _BATCH)
        ]
    finally:
        probe.unlink(missing_ok=True)
    return dict(zip(names, np.max(np.asarray(runs, np.float32), axis=0).tolist(), strict=True))
