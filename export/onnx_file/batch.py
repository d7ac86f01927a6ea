"""Makes a graph with a fixed batch take any batch.

Exporters write the fixed batch into constant shapes: of Reshape and Expand, and into constants that are concatenated
with computed values, such as a class token. Only values that depend on the image are changed. Whether the result is
right is checked by running it (model.py).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from vitserve.export.graph.initializers import add_initializer


def make_dynamic(model: ir.Model, batch: int, input_name: str) -> None:
    """Changes the graph in place."""
    ShapeInferencePass()(model)
    graph = model.graph
    image = next(value for value in graph.inputs if value.name == input_name)
    dependent = _dependent(graph, image)
    size = _batch_size(graph, image)
    for node in list(graph):
        if node.op_type == "Reshape" and node.inputs[0] in dependent:
            _free_reshape(graph, node)
        elif node.op_type == "Expand":
            _free_expand(graph, node, batch, size)
        elif node.op_type == "Concat" and node.outputs[0] in dependent:
            _expand_constants(graph, node, size, dependent)
    for node in graph:
        for value in node.outputs:
            value.shape = None
    for value in graph.outputs:
        value.shape = None


def _dependent(graph: ir.Graph, image: ir.Value) -> set[ir.Value]:
    """The values that are computed from the image, in the order of the graph. Shapes of values do not count."""
    values = {image}
    for node in graph:
        if node.op_type != "Shape" and any(value in values for value in node.inputs):
            values.update(node.outputs)
    return values


def _batch_size(graph: ir.Graph, image: ir.Value) -> ir.Value:
    """The batch as a tensor of one element, computed before all else."""
    start, end = (add_initializer(graph, f"batch_{name}", np.array([at])) for name, at in (("start", 0), ("end", 1)))
    shape = ir.node("Shape", [image], name="image_shape")
    first = ir.node("Slice", [shape.outputs[0], start, end], name="batch_size")
    graph.insert_before(graph[0], [shape, first])
    return first.outputs[0]


def _free_reshape(graph: ir.Graph, node: ir.Node) -> None:
    """The first axis is the batch, possibly multiplied by windows: it becomes -1, or 0 if another axis is -1."""
    shape = _constant(node.inputs[1])
    if shape is None or not shape.size or shape[0] <= 0:
        return
    if (shape[1:] == -1).any():
        allows_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int()
        if allows_zero and (shape == 0).any():
            return
        node.attributes.pop("allowzero", None)
        first = 0
    else:
        first = -1
    free = np.concatenate([[first], shape[1:]]).astype(np.int64)
    node.replace_input_with(1, add_initializer(graph, f"{node.name or node.outputs[0].name}_free", free))


def _free_expand(graph: ir.Graph, node: ir.Node, batch: int, size: ir.Value) -> None:
    shape = _constant(node.inputs[1])
    if shape is None or len(shape) < 3 or shape[0] != batch:
        return
    name = node.name or node.outputs[0].name
    rest = add_initializer(graph, f"{name}_rest", shape[1:].astype(np.int64))
    joined = ir.node("Concat", [size, rest], {"axis": 0}, name=f"{name}_shape")
    graph.insert_before(node, joined)
    node.replace_input_with(1, joined.outputs[0])


def _expand_constants(graph: ir.Graph, node: ir.Node, size: ir.Value, dependent: set[ir.Value]) -> None:
    """Values of one batch that do not depend on the image, beside those that do. Not along the axis of the batch."""
    axes = next((len(value.shape) for value in [*node.outputs, *node.inputs] if value is not None and value.shape), 0)
    if node.attributes["axis"].as_int() == 0 or axes < 3:
        return
    for index, value in enumerate(node.inputs):
        if value is None or value in dependent:
            continue
        name = f"{value.name}_{node.name or node.outputs[0].name}"
        limits = [add_initializer(graph, f"{name}_{bound}", np.array([bound])) for bound in (0, 1)]
        single = ir.node("Slice", [value, *limits, limits[0]], name=f"{name}_single")
        ones = add_initializer(graph, f"{name}_ones", np.ones(axes - 1, np.int64))
        shape = ir.node("Concat", [size, ones], {"axis": 0}, name=f"{name}_shape")
        expand = ir.node("Expand", [single.outputs[0], shape.outputs[0]], name=f"{name}_expand")
        graph.insert_before(node, [single, shape, expand])
        node.replace_input_with(index, expand.outputs[0])


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """Of an initializer, or of a Constant."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    producer = value.producer()
    tensor = producer.attributes.get("value") if producer is not None and producer.op_type == "Constant" else None
    return None if tensor is None else tensor.as_tensor().numpy()
