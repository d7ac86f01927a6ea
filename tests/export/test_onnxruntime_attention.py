"""ONNX Runtime's graph uses its fused attention operator and shares the weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime

from tests.support.networks import TINY, checkpoint
from vitserve.export.build_bundle import build_bundle
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import compare


def operators(path: Path) -> Counter[tuple[str, str]]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return Counter((node.domain, node.op_type) for node in nodes)


def test_attention_becomes_multi_head_attention(bundle: Bundle) -> None:
    assert operators(bundle.path / "model.onnx")["", "Attention"] == TINY.depth
    kinds = operators(bundle.path / "model.onnxruntime.onnx")
    assert kinds["com.microsoft", "MultiHeadAttention"] == TINY.depth
    assert kinds["", "Attention"] == 0
    pixels = bundle.golden().pixels
    optimized, reference = (
        Outputs(*onnxruntime.InferenceSession(bundle.path / name).run(None, {"pixels": pixels}))
        for name in ("model.onnxruntime.onnx", "model.onnx")
    )
    assert compare(optimized, reference).logits < 1e-5


def test_both_graphs_share_the_weights(bundle: Bundle) -> None:
    path = bundle.path / "model.onnxruntime.onnx"
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    external = [value for value in initializers if value.data_location == onnx.TensorProto.EXTERNAL]
    locations = {entry.value for value in external for entry in value.external_data if entry.key == "location"}
    assert locations == {"model.onnx.data"}
    assert path.stat().st_size < 200_000


def test_masked_attention_keeps_the_standard_operator(tmp_path: Path) -> None:
    """MultiHeadAttention takes no boolean mask."""
    axial = checkpoint(replace(TINY, image_size=32, attention="axial"))
    exported = build_bundle(axial, tmp_path / "bundle", name="axial", precisions=[])
    kinds = operators(exported.path / "model.onnxruntime.onnx")
    assert (kinds["", "Attention"], kinds["com.microsoft", "MultiHeadAttention"]) == (TINY.depth, 0)
