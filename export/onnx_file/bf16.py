"""Simulates bf16 arithmetic in a graph, for a machine that has none."""

from __future__ import annotations

import onnx_ir as ir

_LAYERS = ("MatMul", "Gemm", "Conv")


def round_to_bf16(graph: ir.Graph) -> int:
    """Rounds operands and results of projections and convolutions, as quantize/bf16_simulation.py does in torch.

    Returns the number of layers. The graph must run without optimizations, which may remove pairs of casts.
    """
    layers = [node for node in graph if node.op_type in _LAYERS]
    for node in layers:
        for index in (0, 1):
            value = node.inputs[index]
            if value is not None:
                first, second = _casts(value, f"{node.name}_{index}")
                graph.insert_before(node, [first, second])
                node.replace_input_with(index, second.outputs[0])
        uses = tuple(node.outputs[0].uses())
        first, second = _casts(node.outputs[0], f"{node.name}_result")
        graph.insert_after(node, [first, second])
        for user, index in uses:
            user.replace_input_with(index, second.outputs[0])
    return len(layers)


def _casts(value: ir.Value, name: str) -> tuple[ir.Node, ir.Node]:
    down = ir.node("Cast", [value], {"to": ir.DataType.BFLOAT16.value}, name=f"{name}_bf16")
    up = ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}_fp32")
    return down, up
