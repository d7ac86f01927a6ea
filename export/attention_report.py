"""Which kernels run a graph's attention, read from what the runtime made of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from vitserve.model.bundle.bundle import AttentionKernels

_CPU_KERNELS = (
    "MultiHeadAttention",
    "Attention",
)  # ONNX Runtime's own names; the second computes it step by step, inside one node


def of_openvino(compiled: Any) -> AttentionKernels:
    """From the compiled model's runtime graph: a fused layer is one that names the attention it came from, and took its softmax in."""
    kernels: Counter[str] = Counter()
    softmaxes = 0
    for node in compiled.get_runtime_model().get_ops():
        info = {key: getattr(value, "value", value) for key, value in node.get_rt_info().items()}
        kind = info["layerType"]
        softmaxes += kind == "Softmax"
        if (
            kind in ("Subgraph", "ScaledDotProductAttention", "MHA")
            and "ScaledDotProductAttention" in info["originalLayersNames"]
        ):
            kernels[f"{kind} {info['primitiveType']}"] += 1
    return AttentionKernels(kernels=dict(kernels), softmax_layers=softmaxes)


def of_onnxruntime(graph: Path) -> AttentionKernels:
    """From the graph as ONNX Runtime optimized it for this CPU."""
    import onnx_ir as ir
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = (
            3  # it warns that the optimized graph is for this machine alone, which is what is wanted
        )
        options.optimized_model_filepath = f"{directory}/optimized.onnx"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        nodes = [(node.domain, node.op_type) for node in ir.load(f"{directory}/optimized.onnx").graph]
    kernels = Counter(f"{domain or 'ai.onnx'}.{name}" for domain, name in nodes if name in _CPU_KERNELS)
    return AttentionKernels(kernels=dict(kernels), softmax_layers=sum(name == "Softmax" for _, name in nodes))
