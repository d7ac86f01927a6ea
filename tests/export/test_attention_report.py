"""The attention report counts fused kernels, and only those."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import openvino

from tests.support.networks import TINY
from vitserve.export.report.attention_report import attention_kernels, of_openvino
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.engines.engine import Engine


def test_every_artifact_reports_fused_attention(bundle: Bundle) -> None:
    measured = [artifact for artifact in bundle.manifest.artifacts if not artifact.simulated]
    assert {artifact.engine for artifact in measured} == {"openvino", "onnxruntime"}
    for artifact in measured:
        assert artifact.attention is not None
        assert artifact.attention.fused == TINY.depth, artifact
        assert artifact.attention.softmax_layers == 0


def test_attention_without_fusion_is_not_counted() -> None:
    from openvino import opset8 as ops

    x = ops.parameter([1, 2, 4, 8], np.float32)
    mixed = ops.matmul(ops.softmax(ops.matmul(x, x, False, True), 3), x, False, False)
    model = openvino.Model([ops.relu(mixed)], [x])
    compiled = openvino.Core().compile_model(model, "CPU", {"SNIPPETS_MODE": "DISABLE"})
    report = of_openvino(compiled)
    assert (report.fused, report.softmax_layers) == (0, 1)


def test_other_engines_have_no_attention_report() -> None:
    engine = cast("Engine", SimpleNamespace(name="another"))
    assert attention_kernels(engine, Path("model.onnx")) is None
