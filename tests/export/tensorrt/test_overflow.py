"""fp16 without softmax_precision: what guards attention and norms against fp16's small range (65,504)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from tests.support.bundles import random_images
from tests.support.networks import TINY, network
from vitserve.export.graph import tensorrt_attention
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.export.graph.tensorrt_attention import tensorrt_graph
from vitserve.export.graph.trace import trace
from vitserve.model.arrays import Outputs, Pixels
from vitserve.model.bundle.bundle import GRAPH
from vitserve.model.bundle.parity import compare
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig, variant
from vitserve.model.network.vit import ViT

LARGEST = float(np.finfo(np.float16).max)


def with_large_activations(vit: ViT, total: float) -> ViT:
    """One channel of the residual stream grows to ``total``, as in trained networks (arXiv:2402.17762)."""
    with torch.no_grad():
        for block in _blocks(vit):
            block.mlp.fc2.bias[0] += total / vit.config.depth
    return vit


def with_large_scores(vit: ViT, factor: float) -> ViT:
    """Queries and keys are multiplied by ``factor``."""
    with torch.no_grad():
        for block in _blocks(vit):
            rows = 2 * vit.config.width
            block.attn.qkv.weight[:rows] *= factor
            block.attn.qkv.bias[:rows] *= factor
    return vit


def _blocks(vit: ViT) -> list[Any]:
    return list(vit.blocks)


def reference_outputs(vit: ViT, pixels: Pixels) -> Outputs:
    """In float32, by torch."""
    with torch.inference_mode():
        outputs = ReferenceNetwork(vit, Preprocessing(vit.config.image_size)).eval()(torch.from_numpy(pixels))
    return Outputs(*(each.numpy() for each in outputs))


def traced(vit: ViT, directory: Path) -> Path:
    size = vit.config.image_size
    trace(OptimizedNetwork(vit, Preprocessing(size)).eval(), size, directory / GRAPH)
    return directory / GRAPH


def evaluated(model: onnx.ModelProto, pixels: Pixels) -> Outputs:
    """By ONNX's reference evaluator, which computes fp16 operators in fp16."""
    with np.errstate(all="ignore"):
        return Outputs(*(np.asarray(each) for each in ReferenceEvaluator(model).run(None, {"pixels": pixels})))


def test_values_beyond_the_range_of_fp16_are_computed(tmp_path: Path) -> None:
    """With the guards, outputs are as exact as fp16 is. Without one of them, they are not finite, or wrong."""
    pixels = random_images(4, TINY.image_size).pixels
    vit = with_large_activations(with_large_scores(network(TINY), 300), 3e4)
    expected, graph = reference_outputs(vit, pixels), traced(vit, tmp_path)
    assert matches(tensorrt_graph(graph, "fp16"), pixels, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_attention, "_attend_in_float32", lambda *_: None)
        assert not matches(tensorrt_graph(graph, "fp16"), pixels, expected), "attention is not guarded"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitserve.export.graph.cast_precision._compute_in_float32", lambda *_: None)
        assert not matches(in_fp16(tensorrt_graph(graph, "fp16")), pixels, expected), "norms are not guarded"


def matches(model: ir.Model, pixels: Pixels, expected: Outputs) -> bool:
    outputs = evaluated(ir.to_proto(model), pixels)
    return all(np.isfinite(each).all() for each in outputs) and compare(outputs, expected).failure("fp16") is None


def in_fp16(model: ir.Model) -> ir.Model:
    """With the norms' parameters in fp16 too."""
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["L/16", "H/14"])
def test_large_networks_match_in_fp16(tmp_path: Path, name: str) -> None:
    """ONNX Runtime keeps every value in fp16 between operators. One channel comes close to fp16's largest value."""
    import onnxruntime

    config: ViTConfig = variant(name)
    torch.manual_seed(0)
    vit = with_large_activations(ViT(config).eval(), 0.9 * LARGEST)
    with torch.no_grad():
        vit.head.weight.normal_(std=config.width**-0.5)
    pixels = random_images(2, config.image_size).pixels
    expected, graph = reference_outputs(vit, pixels), traced(vit, tmp_path)
    cast = tmp_path / "tensorrt.onnx"
    ir.save(tensorrt_graph(graph, "fp16"), cast, external_data="tensorrt.data")
    session = onnxruntime.InferenceSession(cast, providers=["CPUExecutionProvider"])
    parity = compare(Outputs(*session.run(None, {"pixels": pixels})), expected)
    assert parity.failure("fp16") is None
    print(f"{name}: logits differ by {parity.logits:.1e} of their range, embedding by {parity.embedding:.1e}")  # noqa: T201
