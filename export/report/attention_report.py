"""Reports which kernels run a graph's attention, read from the graph that the runtime optimized."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vitserve.model.bundle.bundle import AttentionKernels
from vitserve.service.engines.engine import Engine

if TYPE_CHECKING:
    from vitserve.service.engines.openvino_engine import OpenVinoEngine

# ONNX Runtime's operators that compute attention in one node. The second one computes it step by step inside.
_ONNXRUNTIME_KERNELS = ("MultiHeadAttention", "Attention")
_OPENVINO_LAYERS = ("Subgraph", "ScaledDotProductAttention", "MHA")


def attention_kernels(engine: Engine, graph: Path) -> AttentionKernels | None:
    """The kernels of an open engine that runs ``graph``; None if the engine does not report them."""
    match engine.name:
        case "openvino":
            return of_openvino(cast("OpenVinoEngine", engine).compiled)
        case "onnxruntime":
            return of_onnxruntime(graph)
        case _:
            return None


def of_openvino(compiled: Any) -> AttentionKernels:
    """Reads the runtime graph of a compiled model.

    A fused layer names the attention operator that it replaces, and leaves no separate softmax.
    """
    kernels: Counter[str] = Counter()
    softmaxes = 0
    for node in compiled.get_runtime_model().get_ops():
        info = {key: getattr(value, "value", value) for key, value in node.get_rt_info().items()}
        kind = info["layerType"]
        softmaxes += kind == "Softmax"
        if kind in _OPENVINO_LAYERS and "ScaledDotProductAttention" in info["originalLayersNames"]:
            kernels[f"{kind} {info['primitiveType']}"] += 1
    return AttentionKernels(kernels=dict(kernels), softmax_layers=softmaxes)


def of_onnxruntime(graph: Path) -> AttentionKernels:
    """Has ONNX Runtime optimize the graph for this CPU, and reads the result."""
    import onnx_ir as ir
    import onnxruntime

    with tempfile.TemporaryDirectory() as temporary:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # hides the warning that the optimized graph suits only this machine
        options.optimized_model_filepath = f"{temporary}/optimized.onnx"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        nodes = [(node.domain, node.op_type) for node in ir.load(f"{temporary}/optimized.onnx").graph]
    kernels = Counter(f"{domain or 'ai.onnx'}.{name}" for domain, name in nodes if name in _ONNXRUNTIME_KERNELS)
    return AttentionKernels(kernels=dict(kernels), softmax_layers=sum(name == "Softmax" for _, name in nodes))
