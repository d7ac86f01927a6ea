"""Fixtures for tests on the GPU double. tests/conftest.py loads them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu.cuda import Device, cuda_modules
from tests.support.gpu.tensorrt import tensorrt_of
from tests.support.paths import ROOT
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.engines.gpu_artifacts import PlanOptions

MODULES = (
    "vitserve.service.engines.cuda.runtime",
    "vitserve.service.engines.cuda.batching",
    "vitserve.service.engines.tensorrt.engine",
    "vitserve.export.build_plan",
)


@dataclass(frozen=True)
class Gpu:
    """The device, and our modules as imported where the doubles stand for TensorRT and CUDA."""

    device: Device
    cuda: Any  # vitserve.service.engines.cuda.runtime
    batching: Any
    engine: Any  # vitserve.service.engines.tensorrt.engine
    build: Any  # vitserve.export.build_plan
    options: PlanOptions

    def open_plan(self, plan: Path, streams: int = 1, max_batch: int = 4) -> Any:
        return self.engine.TensorRtEngine(plan, "bf16", streams, max_batch)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    device = Device()
    for name, module in {"tensorrt": tensorrt_of(device), **cuda_modules(device)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    cuda, batching, engine, build = (importlib.import_module(name) for name in MODULES)
    yield Gpu(device, cuda, batching, engine, build, PlanOptions(max_batch=4))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def plan(gpu: Gpu, bundle: Bundle, tmp_path: Path) -> Path:
    from tests.support.networks import TINY

    path = tmp_path / "tiny.plan"
    gpu.build.plan_for(bundle.path / "model.onnx", path, TINY.depth, gpu.options)
    return path


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment variables of processes that import the doubles as TensorRT and CUDA, with their own cache."""
    packages = tmp_path / "packages"
    for package in ("tensorrt", "cuda"):
        (packages / package).mkdir(parents=True)
        (packages / package / "__init__.py").write_text(
            f"from tests.support.gpu.install import install\ninstall()\n__name__ = {package!r}\n"
        )
    return {"PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)]), "XDG_CACHE_HOME": str(tmp_path / "cache")}
