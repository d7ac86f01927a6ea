"""Skips tokens that nothing reads: a read of token 0 moves up through all operators that work token by token.

It passes through Attention to the queries. It stops where another operator reads the other tokens: keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from vitserve.export.graph.initializers import add_initializer

# Operator → its inputs in which a token's row affects only the same row of the output. The others are constants, or for
# Attention keys and values.
_ROW_INPUTS = {
    "LayerNormalization": (0,),
    "MatMul": (0,),
    "Add": (0, 1),
    "Mul": (0, 1),
    "Gelu": (0,),
    "Relu": (0,),
    "Sigmoid": (0,),
    "Tanh": (0,),
    "Attention": (0,),
    "Slice": (0,),
}


def skip_unread_tokens(graph: ir.Graph) -> int:
    """Returns the number of operators that compute only token 0 now."""
    reads = {node: number for node in graph if (number := _tokens_of_read(node)) > 1}
    if len(set(reads.values())) != 1:
        return 0
    (tokens,) = set(reads.values())
    trimmed = _trimmed(graph, reads, tokens)
    limits = [add_initializer(graph, f"first_token_{name}", np.array([at])) for name, at in _LIMITS.items()]
    sliced = dict[int, ir.Value]()
    for node in trimmed:
        for index in _ROW_INPUTS[node.op_type]:
            value = node.inputs[index]
            if value is None or value.producer() in trimmed or not _has_tokens(value, tokens):
                continue
            if id(value) not in sliced:
                sliced[id(value)] = _first_of(graph, value, limits)
            node.replace_input_with(index, sliced[id(value)])
    for node in trimmed:
        output = node.outputs[0]
        assert output.shape is not None
        output.shape = ir.Shape([output.shape[0], 1, output.shape[2]])
    return len(trimmed)


_LIMITS = {"start": 0, "end": 1, "axis": 1}


def _tokens_of_read(node: ir.Node) -> int:
    """The number of tokens from which a Gather reads token 0, of [n, tokens, width]. 0 for any other operator."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1 or node.inputs[0] is None:
        return 0
    index = node.inputs[1].const_value if node.inputs[1] is not None else None
    shape = node.inputs[0].shape
    first = index is not None and index.numpy().ndim == 0 and int(index.numpy()) == 0
    tokens = shape[1] if shape is not None and len(shape) == 3 else None
    return tokens if first and isinstance(tokens, int) else 0


def _trimmed(graph: ir.Graph, reads: Iterable[ir.Node], tokens: int) -> list[ir.Node]:
    """The operators all of whose users read token 0 of their result only, the last one first."""
    wanted, trimmed = set(reads), list[ir.Node]()
    for node in reversed(list(graph)):
        if node.op_type not in _ROW_INPUTS or not _is_by_row(node, tokens):
            continue
        uses = node.outputs[0].uses()
        if uses and all(_takes_row(user, index, wanted) for user, index in uses):
            wanted.add(node)
            trimmed.append(node)
    return trimmed


def _takes_row(user: ir.Node, index: int, wanted: set[ir.Node]) -> bool:
    return user in wanted and (user.op_type == "Gather" or index in _ROW_INPUTS[user.op_type])


def _is_by_row(node: ir.Node, tokens: int) -> bool:
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output() or not _has_tokens(node.outputs[0], tokens):
        return False
    if node.op_type == "Slice":  # of the width only
        axes = node.inputs[3].const_value if len(node.inputs) > 3 and node.inputs[3] is not None else None
        return axes is not None and axes.numpy().tolist() == [2]
    if node.op_type == "Attention":
        return all(value is None for value in node.inputs[3:])
    if node.op_type == "MatMul":
        return node.inputs[1] is not None and node.inputs[1].const_value is not None
    return True


def _has_tokens(value: ir.Value, tokens: int) -> bool:
    return value.shape is not None and len(value.shape) == 3 and value.shape[1] == tokens


def _first_of(graph: ir.Graph, value: ir.Value, limits: list[ir.Value]) -> ir.Value:
    """Token 0 of a value; of a constant, another constant."""
    if value.const_value is not None:
        return add_initializer(graph, f"{value.name}_first", np.ascontiguousarray(value.const_value.numpy()[:, :1]))
    first = ir.node("Slice", [value, *limits], name=f"{value.name}_first")
    assert value.shape is not None
    first.outputs[0].name, first.outputs[0].type = f"{value.name}_first_token", value.type
    first.outputs[0].shape = ir.Shape([value.shape[0], 1, value.shape[2]])
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, first)
    else:
        graph.insert_before(graph[0], first)
    return first.outputs[0]
