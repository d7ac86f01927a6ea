"""What changing an onnx_ir graph takes more than once."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A constant of the array's type and shape, known to the graph by that name."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.register_initializer(value)
    return value
