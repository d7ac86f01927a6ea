"""The cast graph with its attention in the form for which TensorRT has one fused kernel.

Each rewrite keeps the outputs equal. All were measured with the builder of TensorRT for RTX 1.7 (docs/gpu.md):

- A single query, as in a last block that computes only the class token, has a fused kernel only where batch × heads is
  at least four. With fewer heads the query is given twice, and the first of the two results is used.
- A single head has a fused kernel only for batches of two or more. It is given twice too.
- A projection for queries, keys and values is split by one Reshape and one Transpose for all three. The builder then
  needs one kernel instead of three, and adds the projection's bias in the kernel of the product.
- In fp16, queries, keys and values are cast to float32 before attention. TensorRT's parser rejects the attribute
  softmax_precision. The builder still makes one kernel that reads fp16, and this kernel accumulates in float32. The
  casts have to come after the Transpose: after the product, they would become part of it, and attention would be in
  float32, for which there is no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vitserve.export.graph.cast_precision import CastPrecision, cast_graph
from vitserve.export.graph.initializers import add_initializer

FEWEST_SINGLE_QUERIES = 4  # batch × heads from which a single query has a fused kernel
HEAD_SIZES = range(16, 257)  # that have a fused kernel


class UnsupportedAttentionError(ValueError):
    """TensorRT has no fused kernel for an attention of the network, in any form."""


def tensorrt_graph(source: Path, precision: CastPrecision) -> ir.Model:
    """The graph from which a plan is built. ``source``: see cast_graph().

    Raises UnsupportedAttentionError.
    """
    model = cast_graph(source, precision)
    prepare_attention(model)
    return model


def prepare_attention(model: ir.Model) -> None:
    """Rewrites every Attention node in place. Raises UnsupportedAttentionError."""
    for node in attention_nodes(model):
        by_head = _by_head(model.graph, node)
        _check_head_size(by_head)
        _repeat(model.graph, by_head)
        if by_head.attributes.pop("softmax_precision", None) is not None:
            _attend_in_float32(model.graph, by_head)
    RemoveUnusedNodesPass()(model)


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def _check_head_size(node: ir.Node) -> None:
    """TensorRT for RTX 1.7.1 crashes on heads of fewer than 16 values, and has no kernel for more than 256."""
    size = _shape(_input(node, 0))[3]
    if size not in HEAD_SIZES:
        raise UnsupportedAttentionError(
            f"{node.name} has heads of {size} values; TensorRT fuses attention with {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}"
        )


def _repeat(graph: ir.Graph, node: ir.Node) -> None:
    """Gives a single head, or a single query of too few heads, twice, and uses the first result."""
    _, heads, queries, _ = _shape(_input(node, 0))
    if heads == 1:
        for index in range(3):
            _double(graph, node, index, axis=1)
        _use_first(graph, node, axis=1)
    if queries == 1 and heads < FEWEST_SINGLE_QUERIES:
        _double(graph, node, 0, axis=2)
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            _double(graph, node, 3, axis=len(_shape(_input(node, 3))) - 2)  # its row of the mask
        _use_first(graph, node, axis=2)


def _double(graph: ir.Graph, node: ir.Node, index: int, axis: int) -> None:
    """Concatenates input ``index`` with itself."""
    value, name = _input(node, index), f"{node.name}_{index}_twice_{axis}"
    shape = _with_size(_shape(value), axis, 2 * _shape(value)[axis])
    twice = _node("Concat", [value, value], name, value.dtype, shape, axis=axis)
    graph.insert_before(node, twice)
    node.replace_input_with(index, twice.outputs[0])


def _use_first(graph: ir.Graph, node: ir.Node, axis: int) -> None:
    """The output is twice as long on ``axis``, and its users use the first half."""
    output, name = node.outputs[0], f"{node.name}_first_{axis}"
    shape = _shape(output)
    output.shape = ir.Shape(_with_size(shape, axis, 2 * shape[axis]))
    start, end, axes = (
        add_initializer(graph, f"{name}_{bound}", np.asarray([value]))
        for bound, value in (("start", 0), ("end", shape[axis]), ("axis", axis))
    )
    _insert_after(graph, node, _node("Slice", [output, start, end, axes], name, output.dtype, shape))


def _by_head(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """The node on [n, heads, tokens, size] instead of [n, tokens, width]. Returns the new node.

    A node that already has such inputs is returned as it is.
    """
    query, output = _input(node, 0), node.outputs[0]
    if len(_shape(query)) == 4:
        return node
    n, queries, _ = _shape(query)
    heads = [node.attributes["q_num_heads"].as_int(), *[node.attributes["kv_num_heads"].as_int()] * 2]
    parts = [_part(graph, node, index, count) for index, count in enumerate(heads)]
    size = _shape(parts[2])[3]
    attributes = {name: attribute for name, attribute in node.attributes.items() if not name.endswith("_num_heads")}
    shape = [n, heads[0], queries, size]
    by_head = _node("Attention", [*parts, *node.inputs[3:]], f"{node.name}_by_head", query.dtype, shape)
    by_head.attributes.update(attributes)
    tokens = [n, queries, heads[0], size]
    turned = _node("Transpose", [by_head.outputs[0]], f"{node.name}_tokens", query.dtype, tokens, perm=[0, 2, 1, 3])
    width = add_initializer(graph, f"{node.name}_shape", np.asarray([0, queries, heads[0] * size]))
    joined = _node("Reshape", [turned.outputs[0], width], f"{node.name}_joined", query.dtype, _shape(output))
    graph.insert_before(node, [by_head, turned, joined])
    output.replace_all_uses_with(joined.outputs[0])
    graph.remove(node, safe=True)
    return by_head


def _part(graph: ir.Graph, node: ir.Node, index: int, heads: int) -> ir.Value:
    """Input ``index`` of the node as [n, heads, tokens, size]."""
    value = _input(node, index)
    split = value.producer()
    n, tokens, width = _shape(value)
    shape = [n, heads, tokens, width // heads]
    if split is not None and split.op_type == "Split" and _equal_parts(split):
        turned = _all_parts(graph, split, heads)
        position = add_initializer(graph, f"{node.name}_{index}_part", np.asarray(value.index()))
        part = _node("Gather", [turned, position], f"{node.name}_{index}", value.dtype, shape, axis=0)
        graph.insert_before(node, part)
        return part.outputs[0]
    sizes = add_initializer(graph, f"{node.name}_{index}_sizes", np.asarray([0, tokens, heads, width // heads]))
    split_shape = [n, tokens, heads, width // heads]
    shaped = _node("Reshape", [value, sizes], f"{node.name}_{index}_heads", value.dtype, split_shape)
    turned_node = _node("Transpose", [shaped.outputs[0]], f"{node.name}_{index}", value.dtype, shape, perm=[0, 2, 1, 3])
    graph.insert_before(node, [shaped, turned_node])
    return turned_node.outputs[0]


def _all_parts(graph: ir.Graph, split: ir.Node, heads: int) -> ir.Value:
    """The input of ``split``, [n, tokens, parts × width], as [parts, n, heads, tokens, size]. Made once per Split."""
    name = f"{split.name}_{heads}_parts"
    for user, _ in _input(split, 0).uses():
        if user.name == f"{name}_heads":
            return next(iter(user.outputs[0].uses())).node.outputs[0]
    value, count = _input(split, 0), len(split.outputs)
    n, tokens, width = _shape(value)
    size = width // count // heads
    sizes = add_initializer(graph, f"{name}_sizes", np.asarray([0, tokens, count, heads, size]))
    shaped = _node("Reshape", [value, sizes], f"{name}_heads", value.dtype, [n, tokens, count, heads, size])
    shape = [count, n, heads, tokens, size]
    turned = _node("Transpose", [shaped.outputs[0]], name, value.dtype, shape, perm=[2, 0, 3, 1, 4])
    graph.insert_before(split, [shaped, turned])
    return turned.outputs[0]


def _equal_parts(split: ir.Node) -> bool:
    """Whether the last axis is split into parts of one size."""
    return len({tuple(_shape(output)) for output in split.outputs}) == 1


def _attend_in_float32(graph: ir.Graph, node: ir.Node) -> None:
    output = node.outputs[0]
    dtype = output.dtype
    assert dtype is not None
    for index in range(3):
        value = _input(node, index)
        cast = _cast(value, f"{node.name}_{index}_float32", ir.DataType.FLOAT)
        graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])
    output.dtype = ir.DataType.FLOAT
    _insert_after(graph, node, _cast(output, f"{node.name}_{dtype.name.lower()}", dtype))


def _cast(value: ir.Value, name: str, dtype: ir.DataType) -> ir.Node:
    return _node("Cast", [value], name, dtype, _shape(value), to=dtype.value)


def _insert_after(graph: ir.Graph, node: ir.Node, follower: ir.Node) -> None:
    """All other users of the node's output use the follower's instead."""
    users = [(user, index) for user, index in node.outputs[0].uses() if user is not follower]
    graph.insert_after(node, follower)
    for user, index in users:
        user.replace_input_with(index, follower.outputs[0])


def _node(
    operator: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    dtype: ir.DataType | None,
    shape: Sequence[Any],
    **attributes: Any,
) -> ir.Node:
    node = ir.node(operator, list(inputs), attributes, name=name)
    output = node.outputs[0]
    output.name, output.shape = f"{name}_out", ir.Shape(shape)
    if dtype is not None:
        output.dtype = dtype
    return node


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _shape(value: ir.Value) -> list[Any]:
    assert value.shape is not None
    return list(value.shape)


def _with_size(shape: Sequence[Any], axis: int, size: int) -> list[Any]:
    changed = list(shape)
    changed[axis] = size
    return changed
