"""Cast graphs have one type for all operands, as TensorRT requires, and compute the numbers of their source."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from tests.support.bundles import random_images
from tests.support.networks import DISTILLED, HYBRID_AXIAL_MEAN, TINY, network
from tests.support.traces import traced as traced_graph
from vitserve.export.graph.cast_precision import CastPrecision, cast_graph
from vitserve.export.quantize.fp8 import GREATEST_E4M3, write_fp8_graph
from vitserve.model.arrays import Outputs, Pixels
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import TOLERANCE, compare
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
TYPES = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16, "fp8": onnx.TensorProto.BFLOAT16}
UNTRAINED = ViTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, classes=7)
VARIANTS = {
    "untrained, with equal tensors that the exporter stores once": UNTRAINED,
    "distilled, layer scale": DISTILLED,
    "hybrid, axial, mean": HYBRID_AXIAL_MEAN,
}


@pytest.fixture(scope="module", params=VARIANTS)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ViTConfig, Path]:
    config, path = VARIANTS[request.param], tmp_path_factory.mktemp("cast_graph") / "model.onnx"
    source = ViT(config) if config is UNTRAINED else network(config)
    return config, traced_graph(source, Preprocessing(config.image_size), path)


@pytest.fixture
def reference_graph(bundle: Bundle, tmp_path: Path) -> Path:
    shutil.copy(bundle.path / "model.onnx.data", tmp_path)
    return Path(shutil.copy(bundle.path / "model.onnx", tmp_path))


def cast_model(reference_graph: Path, precision: CastPrecision, image_size: int) -> ir.Model:
    """The cast graph; for fp8 the reference graph is quantized first."""
    if precision != "fp8":
        return cast_graph(reference_graph, precision)
    quantized = reference_graph.with_name("fp8.onnx")
    write_fp8_graph(reference_graph, quantized, random_images(12, image_size).pixels)
    return cast_graph(quantized, precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_all_operands_have_one_type(traced: tuple[ViTConfig, Path], precision: CastPrecision) -> None:
    config, path = traced
    model = ir.to_proto(cast_model(path, precision, config.image_size))
    onnx.checker.check_model(model, full_check=True)
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {initializer.name: initializer.data_type for initializer in model.graph.initializer}
    for node in model.graph.node:
        operands = {types[name] for name in [*node.input, *node.output] if name} & FLOATS
        if node.op_type != "Cast":
            in_float32 = (node.op_type, precision) == ("LayerNormalization", "fp16")
            expected = onnx.TensorProto.FLOAT if in_float32 else TYPES[precision]
            assert operands <= {expected}, f"{node.op_type} {node.name} is in {operands}"
    outputs = [(value.name, value.type.tensor_type.elem_type) for value in model.graph.output]
    assert outputs == [("logits", onnx.TensorProto.FLOAT), ("embedding", onnx.TensorProto.FLOAT)]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_attention_stays_one_operator(traced: tuple[ViTConfig, Path], precision: CastPrecision) -> None:
    config, path = traced
    nodes = ir.to_proto(cast_model(path, precision, config.image_size)).graph.node
    attentions = [node for node in nodes if node.op_type == "Attention"]
    assert len(attentions) == config.depth
    for node in attentions:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        assert (len(node.output), attributes["q_num_heads"]) == (1, config.heads)
        softmax_type = onnx.TensorProto.FLOAT if precision == "fp16" else 0
        assert attributes.get("softmax_precision", 0) == softmax_type
    host_or_unfused = {"Softmax", "Shape", "Expand"} & {node.op_type for node in nodes}
    assert not host_or_unfused
    inputs = {name for node in attentions for name in node.input}
    producers = {node.op_type for node in nodes if inputs & set(node.output)}
    assert producers <= {"Add", "Split", "Reshape", "LayerNormalization", "Cast"}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_cast_graph_computes_the_numbers_of_its_source(
    bundle: Bundle, reference_graph: Path, precision: CastPrecision
) -> None:
    """ONNX's reference evaluator runs the graph: no CPU runtime has bf16 for all of its operators."""
    golden = bundle.golden()
    model = ir.to_proto(cast_model(reference_graph, precision, TINY.image_size))
    results = ReferenceEvaluator(model).run(None, {"pixels": golden.pixels})
    outputs = Outputs(*(np.asarray(result) for result in results))
    assert {array.dtype for array in outputs} == {np.dtype(np.float32)}
    parity = compare(outputs, golden.reference)
    assert parity.failure(precision) is None
    assert parity.logits > TOLERANCE["fp32"] / 10, "as exact as float32: nothing was rounded"


def producer_kind(value: ir.Value | None) -> str | None:
    producer = None if value is None else value.producer()
    return None if producer is None else producer.op_type


def test_fp8_quantizes_both_operands_of_block_products_only(traced: tuple[ViTConfig, Path]) -> None:
    """Weights are stored in fp8. Activations are rounded for the products; other operators read them as they are."""
    config, path = traced
    model = cast_model(path, "fp8", config.image_size)
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert len(products) == sum(node.op_type == "MatMul" for node in ir.load(path).graph)
    for node in products:
        assert [producer_kind(value) for value in node.inputs] == ["DequantizeLinear"] * 2, node.name
        activation, weight = (producer.inputs[0] for producer in node.predecessors())
        assert activation is not None
        assert weight is not None
        assert (activation.dtype, weight.dtype) == (ir.DataType.FLOAT8E4M3FN,) * 2
        assert weight.const_value is not None
        greatest = np.abs(weight.const_value.numpy().astype(np.float32)).max()
        assert greatest >= GREATEST_E4M3 * 0.9, "part of the range is unused"
    others = [node for node in model.graph if node.op_type not in ("MatMul", "DequantizeLinear", "QuantizeLinear")]
    assert "DequantizeLinear" not in {producer_kind(value) for node in others for value in node.inputs}


def test_fp8_range_is_the_greatest_magnitude_of_all_images(reference_graph: Path) -> None:
    directory, images = reference_graph.parent, random_images(20, TINY.image_size).pixels

    def scales(pixels: Pixels) -> dict[str, float]:
        write_fp8_graph(reference_graph, directory / "fp8.onnx", pixels)
        initializers = ir.load(directory / "fp8.onnx").graph.initializers
        return {
            name: float(value.const_value.numpy())
            for name, value in initializers.items()
            if name.endswith("_scale") and value.const_value is not None
        }

    together, first, second = scales(images), scales(images[:7]), scales(images[7:])
    assert together.keys() == first.keys()
    assert {name: pytest.approx(scale) for name, scale in together.items()} == {
        name: max(first[name], second[name]) for name in together
    }
    files = sorted(path.name for path in directory.iterdir())
    assert files == ["fp8.onnx", "model.onnx", "model.onnx.data"], "a temporary file is left"
