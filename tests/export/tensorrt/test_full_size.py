"""The graphs of full-size networks, built by the genuine TensorRT for RTX. benchmarks/tensorrt_plans.py builds more."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from tests.support.bundles import random_images
from tests.support.gpu.fixtures import Rtx
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.trace import trace
from vitserve.export.quantize.fp8 import write_fp8_graph
from vitserve.model.bundle.bundle import GRAPH
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig, variant
from vitserve.model.network.vit import ViT
from vitserve.service.engines.gpu_artifacts import PlanOptions
from vitserve.service.engines.tensorrt.provider import RTX_CAPABILITIES

FIRST = {"bf16": (8, 0), "fp16": (7, 5), "fp8": (8, 9)}


@pytest.fixture(scope="module", params=["Ti/16", "B/16", "B/32", "L/16", "H/14"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ViTConfig, Path]:
    config, path = variant(request.param), tmp_path_factory.mktemp("full_size") / GRAPH
    trace(OptimizedNetwork(ViT(config), Preprocessing(config.image_size)).eval(), config.image_size, path)
    return config, path


@pytest.mark.slow
@pytest.mark.parametrize("precision", FIRST)
def test_tensorrt_fuses_every_attention(
    reference: tuple[ViTConfig, Path], rtx: Rtx, tmp_path: Path, precision: Literal["bf16", "fp16", "fp8"]
) -> None:
    config, path = reference
    if precision == "fp8":
        write_fp8_graph(path, path.with_name("fp8.onnx"), random_images(2, config.image_size).pixels)
        path = path.with_name("fp8.onnx")
    capabilities = tuple(each for each in RTX_CAPABILITIES if each >= FIRST[precision])
    report = rtx.build.plan_for(path, tmp_path / "a.plan", PlanOptions(precision, 64, capabilities))
    assert report.fused
    assert [len(profile.attention) for profile in report.profiles] == [config.depth] * 3
