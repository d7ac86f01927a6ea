"""Counts the layers that a quantized artifact really computes in its precision. Layers are those with weights.

Quantization tools may keep any layer in floating point, even all of them, and the result still runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vitserve.model.bundle.bundle import Quantization
from vitserve.service.engines.engine import Engine

if TYPE_CHECKING:
    import onnx_ir as ir

    from vitserve.service.engines.openvino_engine import OpenVinoEngine

_OPENVINO_LAYERS, _OPENVINO_INT8 = ("FullyConnected", "Convolution"), ("i8", "u8")
_ONNX_LAYERS = ("MatMul", "Gemm", "Conv")
_ONNX_INT8 = ("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "QLinearConv", "QGemm")


def quantization(engine: Engine, graph: Path) -> Quantization:
    """Of an open engine that runs ``graph``."""
    if engine.name == "openvino":
        return of_openvino(cast("OpenVinoEngine", engine).compiled)
    return of_onnx(graph)


def of_openvino(compiled: Any) -> Quantization:
    """Reads the runtime graph, in which each layer has the precision that it is computed in."""
    layers = total = 0
    for node in compiled.get_runtime_model().get_ops():
        info = {key: getattr(value, "value", value) for key, value in node.get_rt_info().items()}
        if info["layerType"] in _OPENVINO_LAYERS:
            total += 1
            layers += info["runtimePrecision"] in _OPENVINO_INT8
    return Quantization(layers, total)


def of_onnx(graph: Path) -> Quantization:
    """Counts integer operators, and operators both of whose inputs were quantized and dequantized."""
    import onnx_ir as ir

    layers = total = 0
    for node in ir.load(graph).graph:
        restored = node.op_type in _ONNX_LAYERS and all(_is_restored(value) for value in node.inputs[:2])
        quantized = node.op_type in _ONNX_INT8 or restored
        layers += quantized
        total += quantized or (node.op_type in _ONNX_LAYERS and _is_constant(node.inputs[1]))
    return Quantization(layers, total)


def _is_restored(value: ir.Value | None) -> bool:
    """Whether it comes from DequantizeLinear, if need be through a Transpose or Reshape."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type in ("Transpose", "Reshape"):
        return _is_restored(producer.inputs[0])
    return producer is not None and producer.op_type == "DequantizeLinear"


def _is_constant(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type in ("Transpose", "Reshape", "Cast"):
        return _is_constant(producer.inputs[0])
    return value is not None and (value.const_value is not None or value.is_initializer())
