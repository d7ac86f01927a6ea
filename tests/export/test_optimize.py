"""The exported form of a network: each saving alone, and all together, equal to the plain network, and really saved."""

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
from vitserve.export.graph.optimize import (
    OptimizedNetwork,
    fold_layer_scale,
    fold_normalization,
    fuse_attention,
    read_no_more_than_the_head,
)
from vitserve.export.graph.trace import Servable, trace
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT

PREPROCESSING = Preprocessing(16, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
RELATIVES: dict[str, ViTConfig] = {
    "plain": TINY,
    "mean": replace(TINY, pool="mean", class_token=False, norm_after_pool=True),
    "distilled": replace(TINY, distillation_token=True, distillation_head=True),
    "teacherless": replace(TINY, distillation_token=True),
    "dinov2": replace(TINY, registers=4, prefix_positions=False, layer_scale=True, swiglu=True, pool="token+mean"),
    "layer scale": replace(TINY, layer_scale=True, representation_width=24),
    "qk norm": replace(TINY, qk_norm=True, qkv_bias=False),
    "pre-norm": replace(TINY, pre_norm=True, activation="quick_gelu"),
    "hybrid": replace(TINY, stem=(8, 16)),
    "axial": replace(TINY, image_size=32, attention="axial"),
    "local": replace(TINY, image_size=32, attention="local", window=3, distillation_token=True, distillation_head=True),
}


def pixels(side: int, count: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


def difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """The greatest, relative to the largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", RELATIVES)
@torch.inference_mode()
def test_it_computes_what_the_plain_network_does(name: str) -> None:
    plain, images = network(RELATIVES[name]), pixels(RELATIVES[name].image_size)
    expected = Servable(plain, PREPROCESSING)(images)
    assert difference(OptimizedNetwork(plain, PREPROCESSING)(images), expected) < 1e-5
    assert difference(Servable(plain, PREPROCESSING)(images), expected) == 0, "the source network is left as it was"


def normalization(changed: ViT) -> None:
    assert fold_normalization(changed, torch.ones(3), torch.zeros(3))


@pytest.mark.parametrize(
    "saving",
    [fuse_attention, lambda n: (fuse_attention(n), read_no_more_than_the_head(n)), fold_layer_scale, normalization],
)
@torch.inference_mode()
def test_each_saving_alone_is_exact(saving: Callable[[ViT], object]) -> None:
    plain = network(RELATIVES["layer scale"])
    changed = copy.deepcopy(plain)
    saving(changed)
    images = torch.randn(3, 3, 16, 16)
    assert difference(changed(images), plain(images)) < 1e-5


def test_normalization_is_not_folded_where_padding_comes_between() -> None:
    assert not fold_normalization(network(RELATIVES["hybrid"]), torch.ones(3), torch.zeros(3))


def test_what_is_left_out_is_left_out(tmp_path: Path) -> None:
    """One clean Attention a block, no arithmetic on pixels before the projection, and a last MLP that sees one token."""
    trace(OptimizedNetwork(network(TINY), PREPROCESSING).eval(), 16, tmp_path / "model.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx")).graph
    made_by = {name: node for node in graph.node for name in node.output}
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attentions) == TINY.depth
    for node in attentions:
        assert len(node.output) == 1
        assert {made_by[name].op_type for name in node.input} <= {"Split", "Add", "MatMul"}, (
            "nothing between the projection and the operator"
        )
    shapes = {each.name: [d.dim_value for d in each.type.tensor_type.shape.dim][1:] for each in graph.value_info}
    gelus = [node.output[0] for node in graph.node if node.op_type == "Gelu"]
    assert [shapes[name] for name in gelus] == [[TINY.tokens, TINY.mlp_width]] * (TINY.depth - 1) + [
        [1, TINY.mlp_width]
    ]
    first = next(node for node in graph.node if node.op_type == "Conv")
    before = []
    while first.input[0] in made_by:
        first = made_by[first.input[0]]
        before.append(first.op_type)
    assert set(before) <= {"Cast", "Transpose"}
