"""The optimized network: each optimization alone, and all together, match the reference network and save work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from tests.support.networks import TINY, network
from tests.support.traces import traced
from vitserve.export.graph.optimize import (
    OptimizedNetwork,
    fold_layer_scale,
    fold_normalization,
    fuse_attention,
    trim_last_block,
)
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT

PREPROCESSING = Preprocessing(16, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
VARIANTS: dict[str, ViTConfig] = {
    "plain": TINY,
    "mean": replace(TINY, pool="mean", class_token=False, norm_after_pool=True),
    "distilled": replace(TINY, distillation_token=True, distillation_head=True),
    "distillation token without a head": replace(TINY, distillation_token=True),
    "dinov2": replace(TINY, registers=4, prefix_positions=False, layer_scale=True, swiglu=True, pool="token+mean"),
    "layer scale": replace(TINY, layer_scale=True, representation_width=24),
    "qk norm": replace(TINY, qk_norm=True, qkv_bias=False),
    "pre-norm": replace(TINY, pre_norm=True, activation="quick_gelu"),
    "hybrid": replace(TINY, stem=(8, 16)),
    "axial": replace(TINY, image_size=32, attention="axial"),
    "local": replace(TINY, image_size=32, attention="local", window=3, distillation_token=True, distillation_head=True),
}


def random_pixels(side: int, count: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


def difference(outputs: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> float:
    """The greatest difference, relative to the largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, reference, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_optimized_network_matches_the_reference(name: str) -> None:
    source, pixels = network(VARIANTS[name]), random_pixels(VARIANTS[name].image_size)
    expected = ReferenceNetwork(source, PREPROCESSING)(pixels)
    assert difference(OptimizedNetwork(source, PREPROCESSING)(pixels), expected) < 1e-5
    assert difference(ReferenceNetwork(source, PREPROCESSING)(pixels), expected) == 0, "the source network was changed"


@torch.inference_mode()
def test_reference_network_normalizes_pixels() -> None:
    source, pixels = network(TINY), random_pixels(16)
    mean, std = torch.tensor(PREPROCESSING.mean), torch.tensor(PREPROCESSING.std)
    normalized = (pixels / 255 - mean) / std
    expected = source(normalized.permute(0, 3, 1, 2))
    assert difference(ReferenceNetwork(source, PREPROCESSING)(pixels), expected) < 1e-5


def fold_identity(vit: ViT) -> None:
    assert fold_normalization(vit, torch.ones(3), torch.zeros(3))


def fuse_and_trim(vit: ViT) -> None:
    fuse_attention(vit)
    trim_last_block(vit)


@pytest.mark.parametrize("optimize", [fuse_attention, fuse_and_trim, fold_layer_scale, fold_identity])
@torch.inference_mode()
def test_each_optimization_alone_is_exact(optimize: Callable[[ViT], None]) -> None:
    source = network(VARIANTS["layer scale"])
    optimized = copy.deepcopy(source)
    optimize(optimized)
    images = torch.randn(3, 3, 16, 16)
    assert difference(optimized(images), source(images)) < 1e-5


def test_normalization_before_padding_is_not_folded() -> None:
    assert not fold_normalization(network(VARIANTS["hybrid"]), torch.ones(3), torch.zeros(3))


def test_graph_holds_no_skipped_work(tmp_path: Path) -> None:
    """One Attention per block, no arithmetic on pixels before the projection, a last MLP for one token."""
    traced(network(TINY), PREPROCESSING, tmp_path / "model.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx")).graph
    producers = {name: node for node in graph.node for name in node.output}
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attentions) == TINY.depth
    for node in attentions:
        assert len(node.output) == 1
        kinds = {producers[name].op_type for name in node.input}
        assert kinds <= {"Split", "Add", "MatMul"}, "an operator between the projection and the attention"
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:] for value in graph.value_info}
    activations = [shapes[node.output[0]] for node in graph.node if node.op_type == "Gelu"]
    assert activations == [[TINY.tokens, TINY.mlp_width]] * (TINY.depth - 1) + [[1, TINY.mlp_width]]
    node = next(node for node in graph.node if node.op_type == "Conv")
    before_projection = []
    while node.input[0] in producers:
        node = producers[node.input[0]]
        before_projection.append(node.op_type)
    assert set(before_projection) <= {"Cast", "Transpose"}
