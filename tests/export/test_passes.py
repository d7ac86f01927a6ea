"""Passes over a graph of any architecture change nothing but its speed, and are dropped if they do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tests.support.checkpoints import relative_difference
from vitserve.export.golden_images import open_graph, textures
from vitserve.export.graph.passes import fold_scale, optimize_graph, optimize_verified
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.export.graph.trace import trace
from vitserve.model.bundle.preprocess import Preprocessing

SHAPE = (32, 32, 3)


class Network(nn.Module):
    """One block with attention, layer scale and a class token; ``branches`` convolutions read the image."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.ModuleList(nn.Conv2d(3, 24, 8, 8) for _ in range(branches))
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 24)), nn.Parameter(torch.rand(24))
        self.norm, self.qkv, self.proj, self.head = (
            nn.LayerNorm(24),
            nn.Linear(24, 72),
            nn.Linear(24, 24),
            nn.Linear(24, 5),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.stack([patches(images) for patches in self.patches]).sum(0).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], 17, 3, 2, 12).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], 17, 24)
        embedding = self.norm(x + self.proj(mixed) * self.scale)[:, 0]
        return self.head(embedding), embedding


def traced(path: Path, branches: int) -> np.ndarray:
    network = ReferenceNetwork(Network(branches), Preprocessing(32, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))).eval()
    trace(network, SHAPE, path)
    with torch.inference_mode():
        logits: np.ndarray = network(torch.from_numpy(textures(SHAPE, 4)))[0].numpy()
    return logits


def logits_of(path: Path) -> np.ndarray:
    with open_graph(path, 4) as run:
        return run(textures(SHAPE, 4)).logits


@pytest.mark.parametrize("branches", [1, 2])
def test_every_pass_matches_and_keeps_the_outputs(branches: int, tmp_path: Path) -> None:
    """With two convolutions, the normalization stays, because folding it into one changes the other's input."""
    path = tmp_path / "model.onnx"
    expected = traced(path, branches)
    counts = optimize_graph(path)
    assert counts["normalization"] == (1 if branches == 1 else 0)
    assert (counts["scale"], counts["attention"]) == (1, 1)
    assert counts["tokens"] > 3
    assert relative_difference(logits_of(path), expected) < 1e-5
    attention = [node for node in ir.load(path).graph if node.op_type == "Attention"]
    assert [set(node.attributes) for node in attention] == [{"q_num_heads", "kv_num_heads"}]


def test_layer_scales_without_names_are_folded() -> None:
    generator = np.random.default_rng(0)
    weights = [
        ir.val(f"w{index}", const_value=ir.tensor(generator.standard_normal((4, 4)).astype(np.float32)))
        for index in range(2)
    ]
    scales = [
        ir.val(f"s{index}", const_value=ir.tensor(generator.standard_normal(4).astype(np.float32)))
        for index in range(2)
    ]
    value = start = ir.val("x", dtype=ir.DataType.FLOAT, shape=[1, 4])
    nodes = list[ir.Node]()
    for index, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        product = ir.node("MatMul", [value, weight])
        scaled = ir.node("Mul", [product.outputs[0], scale])
        product.outputs[0].name, scaled.outputs[0].name = f"product{index}", f"scaled{index}"
        nodes += [product, scaled]
        value = scaled.outputs[0]
    final = ir.node("Identity", [value])
    graph = ir.Graph(
        [start], final.outputs, nodes=[*nodes, final], initializers=weights + scales, opset_imports={"": 17}
    )
    for node in nodes:
        node.name = ""  # as loaded from a file without names
    assert fold_scale(graph) == 2


def test_a_result_that_does_not_run_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    traced(path, 1)
    before = path.read_bytes()

    def fail(graph: Path) -> bool:
        raise RuntimeError("ONNX Runtime cannot load the graph")

    assert not optimize_verified(path, fail)
    assert path.read_bytes() == before


def test_a_result_that_is_not_equal_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    expected = traced(path, 1)
    before = path.read_bytes()
    assert not optimize_verified(path, lambda graph: False)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert optimize_verified(path, lambda graph: relative_difference(logits_of(graph), expected) < 1e-5)
    assert path.read_bytes() != before
