"""The graphs that TensorRT is given: one type throughout, as it demands, and the numbers of their source."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from tests.support.images import random_image
from tests.support.networks import TINY, network
from vitserve.export.graph.cast_precision import cast_graph
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.trace import trace
from vitserve.export.quantize.fp8 import GREATEST, calibrated
from vitserve.model.arrays import Outputs, Pixels
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import TOLERANCE, compare
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
TYPES = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16, "fp8": onnx.TensorProto.BFLOAT16}
Kind = Literal["bf16", "fp16", "fp8"]
PLAIN = ViTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, classes=7)
RELATIVES = {
    "as initialized: equal tensors, which the exporter keeps once": PLAIN,
    "distilled, layer scale": replace(
        TINY, distillation_token=True, distillation_head=True, layer_scale=True, qk_norm=True
    ),
    "hybrid, axial, mean": replace(
        TINY,
        image_size=32,
        stem=(8, 16),
        attention="axial",
        pool="mean",
        class_token=False,
        norm_after_pool=True,
        swiglu=True,
    ),
}


@pytest.fixture(scope="module", params=RELATIVES)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ViTConfig, Path]:
    config, path = RELATIVES[request.param], tmp_path_factory.mktemp("cast_graph") / "model.onnx"
    made = ViT(config) if config is PLAIN else network(config)
    trace(OptimizedNetwork(made, Preprocessing(config.image_size)).eval(), config.image_size, path)
    return config, path


def source_of(reference_graph: Path, precision: Kind, size: int) -> Path:
    """The graph that typed() takes: for fp8 the quantized one, made beside the reference one that it shares weights with."""
    if precision != "fp8":
        return reference_graph
    calibrated(reference_graph, quantized := reference_graph.with_name("fp8.onnx"), pictures(12, size))
    return quantized


def pictures(count: int, size: int) -> Pixels:
    return np.stack([np.asarray(random_image(size, size, seed)) for seed in range(count)])


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_every_operand_has_one_type_and_attention_stays_one_operator(
    traced: tuple[ViTConfig, Path], precision: Kind
) -> None:
    config, path = traced
    model = ir.to_proto(cast_graph(source_of(path, precision, config.image_size), precision))
    onnx.checker.check_model(model, full_check=True)
    kinds = {
        each.name: each.type.tensor_type.elem_type
        for each in [*model.graph.value_info, *model.graph.input, *model.graph.output]
    }
    kinds |= {each.name: each.data_type for each in model.graph.initializer}
    for node in model.graph.node:
        operands = {kinds[each] for each in [*node.input, *node.output] if each} & FLOATS
        if node.op_type != "Cast":
            assert len(operands) <= 1, f"{node.op_type} {node.name} mixes {operands}"
            inner = (
                onnx.TensorProto.FLOAT
                if (node.op_type, precision) == ("LayerNormalization", "fp16")
                else TYPES[precision]
            )
            assert operands <= {inner}, f"{node.op_type} {node.name} is in {operands}"
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    assert len(attentions) == config.depth
    for node in attentions:
        attributes = {each.name: each.i for each in node.attribute}
        assert (len(node.output), attributes["q_num_heads"]) == (1, config.heads)
        assert attributes.get("softmax_precision", 0) == (onnx.TensorProto.FLOAT if precision == "fp16" else 0)
    assert not {"Softmax", "Shape", "Expand"} & {node.op_type for node in model.graph.node}, (
        "nothing that is computed on the host, or beside the operator"
    )
    behind = {
        node.op_type
        for node in model.graph.node
        if any(each in node.output for attention in attentions for each in attention.input)
    }
    assert behind <= {"Add", "Split", "Reshape", "LayerNormalization", "Cast"}, (
        "queries, keys and values come from their projection or its norm"
    )
    assert [(each.name, each.type.tensor_type.elem_type) for each in model.graph.output] == [
        ("logits", 1),
        ("embedding", 1),
    ]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_the_numbers_are_the_sources(bundle: Bundle, tmp_path: Path, precision: Kind) -> None:
    """By the evaluator that ONNX defines itself with: no runtime on a CPU has bf16 for all of this."""
    golden = bundle.golden()
    reference_graph = Path(shutil.copy(bundle.path / "model.onnx", tmp_path))
    shutil.copy(bundle.path / "model.onnx.data", tmp_path)
    model = ir.to_proto(cast_graph(source_of(reference_graph, precision, TINY.image_size), precision))
    outputs = Outputs(*(np.asarray(each) for each in ReferenceEvaluator(model).run(None, {"pixels": golden.pixels})))
    assert {each.dtype for each in outputs} == {np.dtype(np.float32)}
    parity = compare(outputs, golden.reference)
    assert parity.failure(precision) is None
    assert parity.logits > TOLERANCE["fp32"] / 10, "that is float32's accuracy: nothing was rounded"


def test_fp8_has_both_operands_of_every_product_in_a_block_and_nothing_else(traced: tuple[ViTConfig, Path]) -> None:
    """Weights lie in the graph as fp8; activations are rounded on their way into a product, whose other neighbors read them unrounded."""
    config, path = traced
    model = cast_graph(source_of(path, "fp8", config.image_size), "fp8")
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert len(products) == sum(node.op_type == "MatMul" for node in ir.load(path).graph)
    for node in products:
        before = [value.producer() if value is not None else None for value in node.inputs]
        assert [each.op_type if each else None for each in before] == ["DequantizeLinear"] * 2, node.name
        activation, weight = (each.inputs[0] for each in before if each is not None)
        assert activation is not None
        assert weight is not None
        assert (activation.dtype, weight.dtype) == (ir.DataType.FLOAT8E4M3FN,) * 2
        assert weight.const_value is not None
        assert np.abs(weight.const_value.numpy().astype(np.float32)).max() >= GREATEST * 0.9, "its range is used"
    others = [node for node in model.graph if node.op_type not in ("MatMul", "DequantizeLinear", "QuantizeLinear")]
    assert not any(
        value is not None and value.producer() is not None and value.producer().op_type == "DequantizeLinear"
        for node in others
        for value in node.inputs
    )


def test_a_range_is_the_greatest_magnitude_that_any_image_had(bundle: Bundle, tmp_path: Path) -> None:
    reference_graph = Path(shutil.copy(bundle.path / "model.onnx", tmp_path))
    shutil.copy(bundle.path / "model.onnx.data", tmp_path)
    images = pictures(20, TINY.image_size)

    def scales(some: Pixels) -> dict[str, float]:
        calibrated(reference_graph, tmp_path / "fp8.onnx", some)
        graph = ir.load(tmp_path / "fp8.onnx").graph
        return {
            name: float(value.const_value.numpy())
            for name, value in graph.initializers.items()
            if name.endswith("_scale") and value.const_value is not None
        }

    together, halves = scales(images), [scales(images[:7]), scales(images[7:])]
    assert together.keys() == halves[0].keys()
    assert {name: pytest.approx(scale) for name, scale in together.items()} == {
        name: max(each[name] for each in halves) for name in together
    }
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fp8.onnx", "model.onnx", "model.onnx.data"], (
        "and nothing is left behind"
    )
