"""Adds constants to an onnx_ir graph."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def add_initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Registers a constant with the array's type and shape in the graph, under ``name`` or, if taken, a similar one."""
    taken = {value.name for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]}
    taken |= graph.initializers.keys()
    name = next(free for number in count() if (free := f"{name}_{number}" if number else name) not in taken)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.register_initializer(value)
    return value
