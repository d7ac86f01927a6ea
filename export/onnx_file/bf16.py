"""Simulates bf16 arithmetic in a graph, for a machine that has none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vitserve.export.graph.initializers import add_initializer

_LAYERS = ("MatMul", "Gemm", "Conv")
_FIRST_OPSET = 13  # whose Cast has bf16


def round_to_bf16(graph: ir.Graph) -> int:
    """Rounds operands and results of projections and convolutions, as quantize/bf16_simulation.py does in torch.

    Returns the number of layers. The graph must run without optimizations, which may remove pairs of casts.
    """
    layers = [node for node in graph if node.op_type in _LAYERS]
    for node in layers:
        for index in (0, 1):
            value = node.inputs[index]
            if value is not None:
                rounding = _rounding(graph, value, f"{node.name}_{index}")
                graph.insert_before(node, rounding)
                node.replace_input_with(index, rounding[-1].outputs[0])
        uses = tuple(node.outputs[0].uses())
        rounding = _rounding(graph, node.outputs[0], f"{node.name}_result")
        graph.insert_after(node, rounding)
        for user, index in uses:
            user.replace_input_with(index, rounding[-1].outputs[0])
    return len(layers)


def _rounding(graph: ir.Graph, value: ir.Value, name: str) -> list[ir.Node]:
    """Before opset 13, Cast has no bf16: there, Veltkamp's splitting gives the 8 leading bits.

    T. J. Dekker, A floating-point technique for extending the available precision, 1971.
    """
    if graph.opset_imports.get("", 0) < _FIRST_OPSET:
        factor = add_initializer(graph, f"{name}_factor", np.array(2**16 + 1, np.float32))
        large = ir.node("Mul", [value, factor], name=f"{name}_large")
        rest = ir.node("Sub", [large.outputs[0], value], name=f"{name}_rest")
        return [large, rest, ir.node("Sub", [large.outputs[0], rest.outputs[0]], name=f"{name}_rounded")]
    down = ir.node("Cast", [value], {"to": ir.DataType.BFLOAT16.value}, name=f"{name}_bf16")
    up = ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}_fp32")
    return [down, up]
