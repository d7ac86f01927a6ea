"""Fixtures for tests on the GPU double. tests/conftest.py loads them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.gpu.cuda import Device, cuda_modules
from tests.support.gpu.tensorrt import tensorrt_of
from tests.support.gpu.tensorrt_rtx import tensorrt_rtx_of
from tests.support.paths import ROOT
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.engines.gpu_artifacts import PlanOptions, report_beside
from vitserve.service.engines.tensorrt.provider import RTX

# Modules that load TensorRT or CUDA when they are imported, in the order in which they need one another.
MODULES = (
    "vitserve.service.engines.cuda.runtime",
    "vitserve.service.engines.cuda.batching",
    "vitserve.service.engines.tensorrt.logger",
    "vitserve.service.engines.tensorrt.engine",
    "vitserve.export.tensorrt.builder",
    "vitserve.export.build_plan",
)
LIBRARIES = ("tensorrt", "tensorrt_rtx_bindings")


@dataclass(frozen=True)
class Gpu:
    """The device, and our modules as imported where the doubles stand for TensorRT and CUDA."""

    device: Device
    cuda: Any  # vitserve.service.engines.cuda.runtime
    batching: Any
    engine: Any  # vitserve.service.engines.tensorrt.engine
    builder: Any  # vitserve.export.tensorrt.builder
    build: Any  # vitserve.export.build_plan
    options: PlanOptions

    def open_plan(self, plan: Path, streams: int = 1, max_batch: int = 4, cache_dir: str = "") -> Any:
        report = report_beside(plan)
        assert report is not None
        return self.engine.TensorRtEngine(plan, report, "bf16", streams, max_batch, cache_dir)


@contextmanager
def doubled(device: Device, module: ModuleType) -> Iterator[Gpu]:
    """``module`` is the double of a TensorRT library. The other library is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LIBRARIES:
            patch.setitem(sys.modules, name, None)  # as if it were not installed
        for name, double in {module.__name__: module, **cuda_modules(device)}.items():
            patch.setitem(sys.modules, name, double)
        forget(MODULES)
        cuda, batching, _, engine, builder, build = (importlib.import_module(name) for name in MODULES)
        yield Gpu(device, cuda, batching, engine, builder, build, PlanOptions(max_batch=4))
        forget(MODULES)


def forget(modules: Iterable[str]) -> None:
    """So that the next import loads them again."""
    for name in modules:
        sys.modules.pop(name, None)
        package, _, module = name.rpartition(".")
        vars(importlib.import_module(package)).pop(module, None)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    """An H200 with TensorRT for data centers."""
    device = Device()
    with doubled(device, tensorrt_of(device)) as made:
        yield made


@pytest.fixture
def rtx_gpu() -> Iterator[Gpu]:
    """An L4 with TensorRT for RTX."""
    device = Device(gpu="NVIDIA L4", capability=(8, 9))
    with doubled(device, tensorrt_rtx_of(device)) as made:
        yield made


@dataclass(frozen=True)
class Rtx:
    """Our modules, with the genuine TensorRT for RTX. It builds plans without a GPU."""

    builder: Any  # vitserve.export.tensorrt.builder
    build: Any  # vitserve.export.build_plan
    engine: Any  # vitserve.service.engines.tensorrt.engine
    logger: Any  # vitserve.service.engines.tensorrt.logger
    library: Any  # tensorrt_rtx_bindings


@pytest.fixture(scope="session")
def rtx() -> Rtx:
    if not RTX.installed:
        pytest.skip("TensorRT for RTX is not installed: pip install 'vitserve[tensorrt-rtx]'")
    names = ("vitserve.export.tensorrt.builder", "vitserve.export.build_plan")
    engines = "vitserve.service.engines.tensorrt"
    forget(MODULES)
    builder, build, engine, logger = (
        importlib.import_module(name) for name in (*names, f"{engines}.engine", f"{engines}.logger")
    )
    forget(MODULES)  # the doubles load them again
    return Rtx(builder, build, engine, logger, RTX.load())


@pytest.fixture
def plan(gpu: Gpu, bundle: Bundle, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.plan"
    gpu.build.plan_for(bundle.path / "model.onnx", path, gpu.options)
    return path


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment variables of processes that import the doubles as TensorRT and CUDA, with their own cache."""
    return environment_of("tensorrt", tmp_path)


@pytest.fixture
def rtx_environment(tmp_path: Path) -> dict[str, str]:
    """As ``environment``, with an L4 and TensorRT for RTX."""
    return environment_of("tensorrt_rtx_bindings", tmp_path) | {"DOUBLE_RTX": "1"}


def environment_of(library: str, directory: Path) -> dict[str, str]:
    packages = directory / "packages"
    for package in (library, "cuda"):
        (packages / package).mkdir(parents=True)
        (packages / package / "__init__.py").write_text(
            f"from tests.support.gpu.install import install\ninstall()\n__name__ = {package!r}\n"
        )
    return {"PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)]), "XDG_CACHE_HOME": str(directory / "cache")}
