"""Small graphs that TensorRT rejects or accepts, with the reason: one table for the double and the genuine library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BF16, FP16, FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT
FP8 = TensorProto.FLOAT8E4M3FN


class Case(NamedTuple):
    name: str
    graph: Callable[[], onnx.ModelProto]
    rejection: str | None  # part of the reason; None: it builds
    capability: tuple[int, int] = (8, 9)


def attention(
    dtype: int = BF16,
    *,
    heads: int = 4,
    queries: int = 5,
    size: int = 16,
    outputs: int = 1,
    float32: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    """Pixels [n, 5, heads, size], three products, and one Attention node on [n, heads, 5, size].

    With ``float32``, the node's inputs are cast to float32 and its output back.
    """
    nodes = [helper.make_node("Cast", ["pixels"], ["typed"], name="typed", to=dtype)]
    constants = []
    for name in "qkv":  # as products: TensorRT for RTX 1.7.1 crashes if Q, K and V are one tensor, or multiples of one
        constants.append(_constant(f"{name}_weight", dtype, [size, size]))
        nodes.append(
            helper.make_node("MatMul", ["typed", f"{name}_weight"], [f"{name}_by_token"], name=f"{name}_product")
        )
        nodes.append(
            helper.make_node("Transpose", [f"{name}_by_token"], [f"{name}_all"], f"{name}_turned", perm=[0, 2, 1, 3])
        )
    for name, value in (("start", 0), ("end", queries), ("axis", 2)):
        constants.append(numpy_helper.from_array(np.asarray([value]), name))
    nodes.append(helper.make_node("Slice", ["q_all", "start", "end", "axis"], ["q"], name="q"))
    inputs = ["q", "k_all", "v_all"]
    if float32:
        nodes += [helper.make_node("Cast", [each], [f"{each}_32"], name=f"{each}_32", to=FP32) for each in inputs]
        inputs = [f"{each}_32" for each in inputs]
    names = ["mixed", "present"][:outputs]
    nodes.append(helper.make_node("Attention", inputs, names, name="attention", **attributes))
    nodes.append(helper.make_node("Cast", ["mixed"], ["narrow"], name="narrow", to=dtype))
    constants.append(_constant("weight", dtype, [size, size]))
    nodes.append(helper.make_node("MatMul", ["narrow", "weight"], ["product"], name="product"))
    nodes.append(_wide("product"))
    return _model(nodes, constants, ["n", 5, heads, size], ["n", heads, queries, size])


def chain(*nodes: onnx.NodeProto, constants: Sequence[onnx.TensorProto] = (), output: int = FP32) -> onnx.ModelProto:
    """These nodes after a cast of the pixels [n, 16] to bf16, which is named ``typed``."""
    cast = helper.make_node("Cast", ["pixels"], ["typed"], name="typed", to=BF16)
    return _model([cast, *nodes], constants, ["n", 16], None, output)


def _model(
    nodes: Sequence[onnx.NodeProto],
    constants: Sequence[onnx.TensorProto],
    pixels: Sequence[Any],
    logits: Sequence[Any] | None,
    output: int = FP32,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, pixels)],
        [helper.make_tensor_value_info("logits", output, logits)],
        constants,
    )
    domains = {node.domain for node in nodes} - {""}
    opsets = [helper.make_opsetid("", 23), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _constant(name: str, dtype: int, shape: Sequence[int]) -> onnx.TensorProto:
    count = int(np.prod(shape))
    return helper.make_tensor(name, dtype, shape, [1.0 + index / count for index in range(count)])


def _product(dtype: int) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["typed", "weight"], ["product"], name="product")
    return chain(node, _wide("product"), constants=[_constant("weight", dtype, [16, 4])])


def _sum(dtype: int) -> onnx.ModelProto:
    node = helper.make_node("Add", ["typed", "bias"], ["sum"], name="sum")
    return chain(node, _wide("sum"), constants=[_constant("bias", dtype, [16])])


def _wide(name: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], ["logits"], name="wide", to=FP32)


def _quantized(*, quantize: int = 3, restore: int = 3) -> onnx.ModelProto:
    """Rounded to fp8 and restored, with this number of inputs: value, scale, zero point."""
    scale, zero = helper.make_tensor("scale", BF16, [], [0.5]), helper.make_tensor("zero", FP8, [], [0.0])
    attributes: dict[str, Any] = {"output_dtype": FP8} if quantize < 3 else {}
    return chain(
        helper.make_node("QuantizeLinear", ["typed", "scale", "zero"][:quantize], ["fp8"], name="to_fp8", **attributes),
        helper.make_node("DequantizeLinear", ["fp8", "scale", "zero"][:restore], ["restored"], name="restore"),
        _wide("restored"),
        constants=[scale, zero],
    )


def _unknown(domain: str) -> onnx.ModelProto:
    node = helper.make_node("Nothing", ["typed"], ["result"], name="nothing", domain=domain)
    return chain(node, _wide("result"))


NO_KERNEL = r"Attention operation was not supported by a dedicated kernel"
TYPES = r"must have same input types"
PLUGIN = r"Plugin not found"

CASES = [
    Case("attention in bf16", attention, None),
    Case("attention in fp16, cast to float32", lambda: attention(FP16, float32=True), None, (7, 5)),
    Case("softmax_precision", lambda: attention(FP16, softmax_precision=FP32), r"softmax precision is not supported"),
    Case("one query of three heads", lambda: attention(heads=3, queries=1), NO_KERNEL),
    Case("one query of four heads", lambda: attention(heads=4, queries=1), None),
    Case("two queries of three heads", lambda: attention(heads=3, queries=2), None),
    Case("five queries of one head", lambda: attention(heads=1), f"{NO_KERNEL}|did not fuse"),
    Case("one query of one head", lambda: attention(heads=1, queries=1), NO_KERNEL),
    Case("attention in float32", lambda: attention(FP32), NO_KERNEL),
    Case("heads of 264", lambda: attention(size=264), NO_KERNEL),
    Case("heads of 72", lambda: attention(size=72), None),
    Case("attention with two outputs", lambda: attention(outputs=2), r"Attention nodes with one output"),
    Case("bf16 on sm75", attention, r"HW-specific datatypes: b16", (7, 5)),
    Case("fp8 on sm89", _quantized, None),
    Case("fp8 on sm80", _quantized, r"HW-specific datatypes: fp8_e4m3", (8, 0)),
    Case("quantization without a scale", lambda: _quantized(quantize=1), r"at least 2 inputs for the QuantizeLinear"),
    Case("restoring without a scale", lambda: _quantized(restore=1), r"at least 2 inputs for the .*DequantizeLinear"),
    Case("a product of one type", lambda: _product(BF16), None),
    Case("a product of two types", lambda: _product(FP32), TYPES),
    Case("a sum of two types", lambda: _sum(FP32), TYPES),
    Case("an unknown operator", lambda: _unknown(""), PLUGIN),
    Case("an operator of an unknown domain", lambda: _unknown("com.example"), PLUGIN),
]
