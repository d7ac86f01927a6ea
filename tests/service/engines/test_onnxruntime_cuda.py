"""ONNX Runtime's CUDA provider on the GPU double: ONNX Runtime computes on the CPU when the stream runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.gpu.cuda import Device, cuda_modules, cudaError_t
from tests.support.gpu.onnxruntime import onnxruntime_of
from vitserve.export.graph.cast_precision import write_cast_graph
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import compare
from vitserve.service.engines.engine import DeviceLostError, EngineUnavailableError

MODULES = (
    "vitserve.service.engines.cuda.runtime",
    "vitserve.service.engines.cuda.batching",
    "vitserve.service.engines.onnxruntime_cuda_engine",
)


@dataclass(frozen=True)
class Provider:
    device: Device
    patch: pytest.MonkeyPatch

    def open_engine(self, graph: Path, streams: int = 1, max_batch: int = 12, **faults: Any) -> Any:
        self.patch.setitem(sys.modules, "onnxruntime", onnxruntime_of(self.device, **faults))
        for name in MODULES:
            self.patch.delitem(sys.modules, name, raising=False)
        *_, module = (importlib.import_module(name) for name in MODULES)
        return module.OnnxRuntimeCudaEngine(graph, "fp16", streams, max_batch)

    @property
    def holds_nothing(self) -> bool:
        return not (self.device.allocated or self.device.pinned or self.device.streams)


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
    device = Device()
    for name, module in cuda_modules(device).items():
        monkeypatch.setitem(sys.modules, name, module)
    yield Provider(device, monkeypatch)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def graph(bundle: Bundle, tmp_path: Path) -> Path:
    """In fp16: a CPU has no kernels for bf16."""
    write_cast_graph(bundle.path / "model.onnx", tmp_path / "half.onnx", "fp16")
    return tmp_path / "half.onnx"


def matches(outputs: Outputs, bundle: Bundle, rows: Any) -> bool:
    """Whether these are the source network's outputs for those golden images."""
    expected = Outputs(*(array[rows] for array in bundle.golden().reference))
    return compare(outputs, expected).failure("fp16") is None


@pytest.mark.parametrize("count", [1, 3, 8, 9, 12])
def test_every_batch_size_reproduces_the_source(provider: Provider, graph: Path, bundle: Bundle, count: int) -> None:
    engine = provider.open_engine(graph, streams=2)
    assert matches(engine.run(1, bundle.golden().pixels[:count]), bundle, slice(count))
    engine.close()


def test_the_device_reads_rows_of_the_slot_table_in_order(provider: Provider, graph: Path, bundle: Bundle) -> None:
    engine = provider.open_engine(graph)
    slot_table = np.ascontiguousarray(bundle.golden().pixels)
    engine.share(slot_table)
    assert matches(engine.run(0, slot_table, [5, 0, 3]), bundle, [5, 0, 3])
    assert provider.device.pinned[slot_table.ctypes.data] == slot_table.nbytes
    engine.close()
    assert provider.holds_nothing


def test_a_graph_with_a_node_for_the_cpu_is_rejected(provider: Provider, graph: Path) -> None:
    with pytest.raises(
        EngineUnavailableError, match=r"cannot run half\.onnx on the GPU; .*assigned to the default CPU EP"
    ):
        provider.open_engine(graph, unplaced="LayerNormalization")
    assert provider.holds_nothing


def test_missing_libraries_and_a_missing_device_are_named(provider: Provider, graph: Path) -> None:
    with pytest.raises(
        EngineUnavailableError,
        match=r"a CUDA library is missing \(the log names it: pip install 'onnxruntime-gpu\[cuda,cudnn\]'\)",
    ):
        provider.open_engine(graph, loads=False)
    provider.device.devices = 0
    with pytest.raises(EngineUnavailableError, match="CUDA finds no device"):
        provider.open_engine(graph)


def test_too_little_memory_for_a_second_stream_frees_the_first(provider: Provider, graph: Path) -> None:
    provider.device.memory_bytes = 15_000  # a stream takes 11,000
    with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
        provider.open_engine(graph, streams=2)
    assert provider.holds_nothing


def test_a_persistent_error_of_the_library_loses_the_device(provider: Provider, graph: Path, bundle: Bundle) -> None:
    engine = provider.open_engine(graph)
    provider.device.lost = cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(DeviceLostError, match="until the process ends"):
        engine.run(0, bundle.golden().pixels[:1])
