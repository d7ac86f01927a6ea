"""Steps of a graph joined into those that a GPU computes in fewer passes over its memory, which is what half of an eager ViT's time goes to.

Joined is what is read by nobody else: the numbers are the same, but for what each operator's kernel rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

LINEAR = "MatMul, Add"
LINEAR_GELU = "MatMul, Add, Gelu"
ADD_NORM = "Add, LayerNormalization"  # two outputs: the sum, which others read as well, and its norm


class Step(NamedTuple):
    """A node of an ONNX graph, or several of them."""

    operator: str
    inputs: list[str | None]  # None where one is skipped
    attributes: dict[str, Any]
    outputs: list[str]


def joined(steps: Sequence[Step], dimensions: Mapping[str, int], kept: Collection[str]) -> list[Step]:
    """``dimensions`` are those of the weights, by name; values whose names are in ``kept`` are the graph's outputs."""

    def bias_last(product: Step, add: Step) -> Step | None:
        """A product with a matrix of weights, and the vector of weights that is added to it."""
        (bias,) = [name for name in add.inputs if name != product.outputs[0]] or [None]
        if dimensions.get(str(product.inputs[1])) != 2 or dimensions.get(str(bias)) != 1:
            return None
        return Step(LINEAR, [*product.inputs, bias], {}, add.outputs)

    def activated(linear: Step, gelu: Step) -> Step:
        return Step(LINEAR_GELU, linear.inputs, gelu.attributes, gelu.outputs)

    made = _pairs(list(steps), "MatMul", "Add", kept, bias_last)
    return _sums_with_norms(_pairs(made, LINEAR, "Gelu", kept, activated), dimensions)


def _pairs(
    steps: list[Step], first: str, second: str, kept: Collection[str], join: Callable[[Step, Step], Step | None]
) -> list[Step]:
    """Each ``second`` that alone reads what a ``first`` makes takes its place, as ``join`` makes one of both."""
    readers = Counter(name for step in steps for name in step.inputs)
    before = {
        step.outputs[0]: step
        for step in steps
        if step.operator == first and readers[step.outputs[0]] == 1 and step.outputs[0] not in kept
    }
    made, gone = list[Step](), set[str]()
    for step in steps:
        source = (
            next((before[name] for name in step.inputs if name in before), None) if step.operator == second else None
        )
        one = None if source is None else join(source, step)
        if source is not None and one is not None:
            gone.add(source.outputs[0])
        made.append(step if one is None else one)
    return [step for step in made if step.outputs[0] not in gone]


def _sums_with_norms(steps: list[Step], dimensions: Mapping[str, int]) -> list[Step]:
    """The norm moves up to the sum whose only norm it is. What adds weights, positions say, spreads them over the batch, and stays as it is."""
    sums = {
        step.outputs[0]
        for step in steps
        if step.operator == "Add" and not any(name in dimensions for name in step.inputs)
    }
    norms = dict[str, list[Step]]()
    for step in steps:
        if step.operator == "LayerNormalization" and step.inputs[0] in sums:
            norms.setdefault(str(step.inputs[0]), []).append(step)
    alone = {total: each[0] for total, each in norms.items() if len(each) == 1}
    moved = {norm.outputs[0] for norm in alone.values()}
    made = list[Step]()
    for step in steps:
        norm = alone.get(step.outputs[0])
        if norm is not None:
            step = Step(ADD_NORM, [*step.inputs, *norm.inputs[1:]], norm.attributes, [step.outputs[0], norm.outputs[0]])
        elif step.outputs[0] in moved:
            continue
        made.append(step)
    return made
