"""The form of attention that TensorRT fuses computes the numbers of its source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.support.bundles import random_images
from tests.support.gpu.fixtures import Rtx
from tests.support.gpu.rejected_graphs import BF16, FP16, attention
from tests.support.networks import TINY, network
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.tensorrt_attention import (
    UnsupportedAttentionError,
    attention_nodes,
    prepare_attention,
    tensorrt_graph,
)
from vitserve.export.graph.trace import trace
from vitserve.export.quantize.fp8 import write_fp8_graph
from vitserve.model.arrays import Outputs, Pixels
from vitserve.model.bundle.bundle import GRAPH, WEIGHTS, Bundle, open_bundle
from vitserve.model.bundle.parity import compare
from vitserve.model.bundle.plan import PlanReport
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.service.engines.gpu_artifacts import PlanOptions
from vitserve.service.engines.openvino_engine import OpenVinoEngine
from vitserve.service.settings import DEFAULT_BUNDLE

TRACED = {
    "one head, mask": replace(TINY, heads=1, attention="axial"),
    "two queries, query and key norm": replace(
        TINY, qk_norm=True, distillation_token=True, distillation_head=True, layer_scale=True
    ),
    "four heads, mean": replace(
        TINY, width=64, heads=4, pool="mean", class_token=False, norm_after_pool=True, swiglu=True
    ),
}
BUNDLES = ("two heads", "three heads, convolutions")  # the tests' bundle and the default model: one query


@pytest.fixture(scope="module", params=[*BUNDLES, *TRACED])
def reference(
    request: pytest.FixtureRequest, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ViTConfig, Path]:
    """A network's configuration and its reference graph."""
    if request.param in BUNDLES:
        opened = bundle if request.param == BUNDLES[0] else open_bundle(DEFAULT_BUNDLE)
        assert isinstance(opened.manifest.config, ViTConfig)
        return opened.manifest.config, opened.path / GRAPH
    config, path = TRACED[request.param], tmp_path_factory.mktemp("tensorrt_attention") / GRAPH
    trace(OptimizedNetwork(network(config), Preprocessing(config.image_size)).eval(), config.image_size, path)
    return config, path


def run(model: onnx.ModelProto, pixels: Pixels) -> Outputs:
    """On ONNX Runtime. A graph with one output has it twice."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results = session.run(None, {"pixels": pixels})
    return Outputs(results[0], results[-1])


def rewritten(model: onnx.ModelProto, rewrite: Callable[[ir.Model], None] = prepare_attention) -> onnx.ModelProto:
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    rewrite(graph)
    result = ir.to_proto(graph)
    onnx.checker.check_model(result, full_check=True)
    return result


def test_the_rewritten_reference_graph_is_exact(reference: tuple[ViTConfig, Path]) -> None:
    config, path = reference
    pixels = random_images(5, config.image_size).pixels
    source = onnx.load(path)
    for name, ours, expected in zip(Outputs._fields, run(rewritten(source), pixels), run(source, pixels), strict=True):
        assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max(), name


def test_every_attention_has_a_form_with_a_fused_kernel(reference: tuple[ViTConfig, Path]) -> None:
    config, path = reference
    nodes = attention_nodes(tensorrt_graph(path, "fp16"))
    assert len(nodes) == config.depth
    for node in nodes:
        assert "softmax_precision" not in node.attributes
        query, kind = node.inputs[0], node.outputs[0].dtype
        assert query is not None
        assert query.shape is not None
        _, heads, queries, size = query.shape
        assert isinstance(heads, int)
        assert isinstance(queries, int)
        assert (queries >= 2 and heads >= 2) or heads >= 4
        assert size == config.width // config.heads
        assert (query.dtype, kind) == (ir.DataType.FLOAT, ir.DataType.FLOAT), "it accumulates in float32"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_cast_graph_matches_within_its_tolerance(
    reference: tuple[ViTConfig, Path], tmp_path: Path, precision: Literal["bf16", "fp16"]
) -> None:
    """OpenVINO runs it with the rounded weights, and arithmetic in float32."""
    config, path = reference
    pixels, graph = random_images(5, config.image_size).pixels, tmp_path / "tensorrt.onnx"
    ir.save(tensorrt_graph(path, precision), graph)
    engine = OpenVinoEngine(graph, "fp32", 1, 1, len(pixels))
    outputs = engine.run(0, pixels)
    engine.close()
    assert compare(outputs, run(onnx.load(path), pixels)).failure(precision) is None


AMPERE_AND_LATER = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


def check_plan(rtx: Rtx, graph: Path, directory: Path, depth: int, options: PlanOptions) -> PlanReport:
    """Builds the plan with the genuine builder, without a GPU: every attention is fused, in every profile."""
    plan = directory / "a.plan"
    report: PlanReport = rtx.build.plan_for(graph, plan, options)
    assert report.fused
    assert [len(profile.attention) for profile in report.profiles] == [depth] * len(report.profiles)
    assert (report.version, report.capabilities) == (rtx.library.__version__, options.capabilities)
    kernels = plan.read_bytes()  # it holds their CUDA source
    assert b"hmma_fp16_traits" not in kernels, "a product of attention accumulates in fp16"
    return report


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_tensorrt_fuses_every_attention(
    reference: tuple[ViTConfig, Path], rtx: Rtx, tmp_path: Path, precision: Literal["bf16", "fp16"]
) -> None:
    """For every compute capability that has the type."""
    config, path = reference
    capabilities = AMPERE_AND_LATER if precision == "bf16" else ((7, 5), *AMPERE_AND_LATER)
    report = check_plan(rtx, path, tmp_path, config.depth, PlanOptions(precision, 8, capabilities))
    assert report.input_types == (("Half",) if precision == "fp16" else ("BFloat16",))


def test_tensorrt_fuses_every_attention_of_an_fp8_graph(bundle: Bundle, rtx: Rtx, tmp_path: Path) -> None:
    for file in (GRAPH, WEIGHTS):
        shutil.copy(bundle.path / file, tmp_path)
    write_fp8_graph(tmp_path / GRAPH, tmp_path / "fp8.onnx", random_images(4, TINY.image_size).pixels)
    options = PlanOptions("fp8", 8, ((8, 9), (12, 0), (12, 1)))
    check_plan(rtx, tmp_path / "fp8.onnx", tmp_path, TINY.depth, options)


def by_token(pixels: Pixels) -> onnx.ModelProto:
    """An Attention node as other exporters write it: no projection in common, 4-D, its own scale, and a float mask."""
    model = attention(FP16, heads=1, queries=1, scale=1e-5)
    mask = np.linspace(-1, 1, pixels.shape[1], dtype=np.float16).reshape(1, 1, 1, -1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(mask, "mask"))
    next(node for node in model.graph.node if node.op_type == "Attention").input.append("mask")
    return model


def test_scale_and_float_mask_are_kept() -> None:
    pixels = np.random.default_rng(0).integers(0, 5, (3, 5, 1, 16), np.uint8)
    source = by_token(pixels)
    expected = run(source, pixels).logits
    assert np.abs(run(rewritten(source), pixels).logits - expected).max() <= 2e-3 * np.abs(expected).max()

    def without(name: str) -> Callable[[ir.Model], None]:
        def rewrite(model: ir.Model) -> None:
            prepare_attention(model)
            for node in attention_nodes(model):
                node.attributes.pop(name, None)
                if name == "mask":
                    node.replace_input_with(3, None)

        return rewrite

    for name in ("scale", "mask"):
        wrong = run(rewritten(source, without(name)), pixels).logits
        assert np.abs(wrong - expected).max() > 1e-2 * np.abs(expected).max(), f"{name} has no effect in this test"


def test_attention_that_is_by_head_already_keeps_its_form() -> None:
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(attention(BF16, heads=4)))
    before = [node.op_type for node in graph.graph]
    prepare_attention(graph)
    assert [node.op_type for node in graph.graph] == before


@pytest.mark.parametrize("size", [8, 264])
def test_a_head_size_without_a_kernel_is_named(size: int) -> None:
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(attention(BF16, size=size)))
    with pytest.raises(UnsupportedAttentionError, match=f"attention has heads of {size} values; .* 16 to 256"):
        prepare_attention(graph)


def test_one_transpose_serves_queries_keys_and_values(reference: tuple[ViTConfig, Path]) -> None:
    """One less kernel for each of them in TensorRT. Norms of queries and keys need their own."""
    config, path = reference
    if config.qk_norm:
        return
    model = tensorrt_graph(path, "bf16")
    first = attention_nodes(model)[0]
    turned = {transpose_before(value) for value in first.inputs[:3]}
    assert len(turned) == 1


def transpose_before(value: ir.Value | None) -> str | None:
    """The name of the Transpose from which an input of attention is taken."""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "Transpose":
            return producer.name
        value = producer.inputs[0]
    return None
