"""Fuses steps of a graph, so that a GPU passes over its memory fewer times. That takes half of an eager ViT's time.

A step is fused only if no other step reads its result. The outputs change only by the rounding of the kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

LINEAR = "MatMul, Add"
LINEAR_GELU = "MatMul, Add, Gelu"
ADD_NORM = "Add, LayerNormalization"  # two outputs: the sum, which other steps read as well, and its norm
QUANTIZE = "QuantizeLinear"
FP8_PRODUCT = "fp8 MatMul"  # inputs: quantized values, their scale, a weight, its scale, and a bias if there is one


class Step(NamedTuple):
    """One or more nodes of an ONNX graph."""

    operator: str
    inputs: list[str | None]  # None for an omitted optional input
    attributes: dict[str, Any]
    outputs: list[str]


def fuse(steps: Sequence[Step], dimensions: Mapping[str, int], graph_outputs: Collection[str]) -> list[Step]:
    """``dimensions`` are the weights' numbers of dimensions, by name. ``graph_outputs`` are names of values."""

    def linear(product: Step, add: Step) -> Step | None:
        """A product with a weight matrix, plus a weight vector."""
        (bias,) = [name for name in add.inputs if name != product.outputs[0]] or [None]
        if dimensions.get(str(product.inputs[1])) != 2 or dimensions.get(str(bias)) != 1:
            return None
        return Step(LINEAR, [*product.inputs, bias], {}, add.outputs)

    def linear_gelu(linear: Step, gelu: Step) -> Step:
        return Step(LINEAR_GELU, linear.inputs, gelu.attributes, gelu.outputs)

    def fp8_linear(product: Step, add: Step) -> Step | None:
        (bias,) = [name for name in add.inputs if name != product.outputs[0]] or [None]
        return Step(FP8_PRODUCT, [*product.inputs, bias], {}, add.outputs) if dimensions.get(str(bias)) == 1 else None

    steps = _fuse_quantized_products(steps, dimensions)
    steps = _fuse_pairs(steps, FP8_PRODUCT, "Add", graph_outputs, fp8_linear)
    steps = _fuse_pairs(steps, "MatMul", "Add", graph_outputs, linear)
    steps = _fuse_pairs(steps, LINEAR, "Gelu", graph_outputs, linear_gelu)
    return _fuse_sums_with_norms(steps, dimensions)


def _fuse_quantized_products(steps: Sequence[Step], dimensions: Mapping[str, int]) -> list[Step]:
    """Products of dequantized values and weights become products in fp8. Only values are quantized during a run.

    fp8's zero point is always 0, so steps do not read it.
    """
    steps = [step._replace(inputs=step.inputs[:2]) if step.operator == QUANTIZE else step for step in steps]
    quantized = {step.outputs[0]: step for step in steps if step.operator == QUANTIZE}
    sources = {step.outputs[0]: quantized[str(step.inputs[0])] for step in steps if step.operator == "DequantizeLinear"}
    result = list[Step]()
    for step in steps:
        left, right = (
            (sources.get(str(name)) for name in step.inputs[:2]) if step.operator == "MatMul" else (None, None)
        )
        if left is not None and right is not None and right.inputs[0] in dimensions:
            inputs = [left.outputs[0], left.inputs[1], *right.inputs[:2]]
            result.append(Step(FP8_PRODUCT, inputs, {}, step.outputs))
        else:
            result.append(step)
    for operator in ("DequantizeLinear", QUANTIZE):
        read = {name for step in result for name in step.inputs}
        result = [step for step in result if step.operator != operator or step.outputs[0] in read]
    return result


def _fuse_pairs(
    steps: Sequence[Step],
    first: str,
    second: str,
    graph_outputs: Collection[str],
    fused: Callable[[Step, Step], Step | None],
) -> list[Step]:
    """Replaces each ``second`` that is the only reader of a ``first``, and that ``first``, by ``fused`` of both."""
    readers = Counter(name for step in steps for name in step.inputs)
    sources = {
        step.outputs[0]: step
        for step in steps
        if step.operator == first and readers[step.outputs[0]] == 1 and step.outputs[0] not in graph_outputs
    }
    result, fused_values = list[Step](), set[str]()
    for step in steps:
        names = step.inputs if step.operator == second else []
        source = next((sources[name] for name in names if name in sources), None)
        pair = None if source is None else fused(source, step)
        if source is not None and pair is not None:
            fused_values.add(source.outputs[0])
        result.append(pair or step)
    return [step for step in result if step.outputs[0] not in fused_values]


def _fuse_sums_with_norms(steps: Sequence[Step], dimensions: Mapping[str, int]) -> list[Step]:
    """A sum and its norm become one step at the place of the sum, if the sum has only one norm.

    A sum with weights, such as the positions, broadcasts them over the batch. It is not fused.
    """
    sums = {
        step.outputs[0]
        for step in steps
        if step.operator == "Add" and not any(name in dimensions for name in step.inputs)
    }
    norms = dict[str, list[Step]]()
    for step in steps:
        if step.operator == "LayerNormalization" and step.inputs[0] in sums:
            norms.setdefault(str(step.inputs[0]), []).append(step)
    only_norms = {total: readers[0] for total, readers in norms.items() if len(readers) == 1}
    fused_norms = {norm.outputs[0] for norm in only_norms.values()}
    result = list[Step]()
    for step in steps:
        norm = only_norms.get(step.outputs[0])
        if norm is not None:
            inputs, outputs = [*step.inputs, *norm.inputs[1:]], [step.outputs[0], norm.outputs[0]]
            result.append(Step(ADD_NORM, inputs, norm.attributes, outputs))
        elif step.outputs[0] not in fused_norms:
            result.append(step)
    return result
