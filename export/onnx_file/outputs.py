"""Finds the output of an ONNX file that has the classes, and whether it has logits or probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.overrides import OutputKind
from vitserve.export.graph.initializers import add_initializer
from vitserve.model.arrays import Activation

_LEAST_PROBABILITY = 1e-30  # of which a logarithm is taken
_PASSED_THROUGH = ("Identity", "Cast", "Dropout", "Flatten", "Squeeze", "Reshape")


@dataclass(frozen=True)
class Head:
    output: str  # the name of the file's output
    cut: str  # the value that holds the logits: the output itself, or the input of its last Softmax or Sigmoid
    activation: Activation | None  # of that Softmax or Sigmoid
    from_probabilities: bool  # ``cut`` has probabilities
    embedding: str | None  # the input of the last layer, [n, width]
    notes: tuple[str, ...] = ()

    def logits_of(self, output: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits [n, classes] of the values of ``cut``. Softmax or sigmoid gives the file's probabilities again."""
        values = output.reshape(len(output), -1)
        if not self.from_probabilities:
            return values
        with np.errstate(divide="ignore", under="ignore"):
            logits: npt.NDArray[np.float32] = np.log(np.maximum(values, np.float32(_LEAST_PROBABILITY)))
            if self.activation == "sigmoid":
                logits = logits - np.log(np.maximum(1 - values, np.float32(_LEAST_PROBABILITY)))
        return logits


def find_head(model: ir.Model, run: Callable[[str], npt.NDArray[np.float32]], stated: OutputKind | None) -> Head:
    """``run`` computes an output for some images.

    ``stated`` is the kind of the output, instead of the one that its last operator and values show.

    Raises CheckpointError.
    """
    output = _output(model)
    values = run(output.name or "")
    values = values.reshape(len(values), -1)
    last = _last_operator(output)
    kind = last.op_type if last is not None else ""
    activation: Activation | None = {"Softmax": "softmax", "Sigmoid": "sigmoid"}.get(kind)  # type: ignore[assignment]
    looks = _look_like_probabilities(values)
    probabilities = stated == "probabilities" or (stated is None and (activation is not None or looks))
    if stated == "probabilities" and not ((values >= 0) & (values <= 1)).all():
        raise CheckpointError(f"--outputs probabilities: {output.name} has values outside of 0 to 1")
    notes = [f"the output {output.name} has {'probabilities' if probabilities else 'logits'}"]
    if not probabilities:
        return Head(output.name or "", output.name or "", None, False, _embedding(output), tuple(notes))
    if activation is None or last is None or last.inputs[0] is None:
        notes.append("their logarithm is served as logits, because the graph does not show a softmax or sigmoid")
        kind_of: Activation = "softmax" if _sum_to_one(values) else "sigmoid"
        return Head(output.name or "", output.name or "", kind_of, True, None, tuple(notes))
    cut = last.inputs[0]
    return Head(output.name or "", cut.name or "", activation, False, _embedding(cut), tuple(notes))


def add_outputs(model: ir.Model, head: Head) -> None:
    """Replaces the outputs of the graph by float32 logits [n, classes] and embedding [n, width]."""
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    logits = values[head.cut]
    if head.from_probabilities:
        logits = _logarithm(graph, logits, head.activation)
    embedding = values[head.embedding] if head.embedding is not None else None
    for value in [*graph.initializers.values(), *values.values()]:
        if value.name in ("logits", "embedding", "pixels"):
            value.name = f"{value.name}_of_file"
    outputs = []
    for name, value in (("logits", logits), ("embedding", embedding or logits)):
        flat = ir.node("Flatten", [value], {"axis": 1}, name=f"flatten_{name}")
        cast = ir.node("Cast", [flat.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"cast_{name}")
        graph.extend([flat, cast])
        cast.outputs[0].name, cast.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        outputs.append(cast.outputs[0])
    graph.outputs[:] = outputs
    for value in outputs:
        value.shape = ir.Shape(["n", None])


def _logarithm(graph: ir.Graph, value: ir.Value, activation: Activation | None) -> ir.Value:
    """In float32, with operators that every supported opset has in the same form."""
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value}, name="probability_float32")
    graph.append(cast)
    value = cast.outputs[0]
    least = add_initializer(graph, "least_probability", np.array(_LEAST_PROBABILITY, np.float32))
    log = _log_of_at_least(graph, value, least, "probability")
    if activation != "sigmoid":
        return log
    constant_one = add_initializer(graph, "one", np.array(1, np.float32))
    complement = ir.node("Sub", [constant_one, value], name="other_probability")
    graph.append(complement)
    other_log = _log_of_at_least(graph, complement.outputs[0], least, "other_probability")
    odds = ir.node("Sub", [log, other_log], name="log_odds")
    graph.append(odds)
    return odds.outputs[0]


def _log_of_at_least(graph: ir.Graph, value: ir.Value, least: ir.Value, name: str) -> ir.Value:
    """log(max(value, least)). As relu(value - least) + least, because Max does not broadcast before opset 8."""
    above = ir.node("Sub", [value, least], name=f"{name}_above")
    positive = ir.node("Relu", [above.outputs[0]], name=f"{name}_positive")
    clipped = ir.node("Add", [positive.outputs[0], least], name=f"{name}_clipped")
    log = ir.node("Log", [clipped.outputs[0]], name=f"{name}_log")
    graph.extend([above, positive, clipped, log])
    return log.outputs[0]


def _output(model: ir.Model) -> ir.Value:
    """The one called logits, or the first one."""
    outputs = list(model.graph.outputs)
    if not outputs:
        raise CheckpointError("the graph has no outputs")
    named = [value for value in outputs if value.name == "logits"]
    return (named or outputs)[0]


def _last_operator(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    while node is not None and node.op_type in _PASSED_THROUGH and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def _embedding(logits: ir.Value) -> str | None:
    """The input of the last Gemm, or of the last MatMul if its input is known to have two axes."""
    node = _last_operator(logits)
    if node is not None and node.op_type == "Add":
        producers = [value.producer() for value in node.inputs if value is not None]
        node = next((producer for producer in producers if producer is not None and producer.op_type == "MatMul"), None)
    if node is None or node.op_type not in ("Gemm", "MatMul") or node.inputs[0] is None:
        return None
    value = node.inputs[0]
    if value.producer() is None or (node.op_type == "MatMul" and len(value.shape or ()) != 2):
        return None
    return value.name


def _look_like_probabilities(values: npt.NDArray[np.float32]) -> bool:
    return bool(values.shape[1] > 1 and (values >= 0).all() and _sum_to_one(values))


def _sum_to_one(values: npt.NDArray[np.float32]) -> bool:
    return bool(np.abs(values.sum(1) - 1).max() < 1e-3)
