"""Adds constants to an onnx_ir graph."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def add_initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Registers a constant with the array's type and shape in the graph."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.register_initializer(value)
    return value
