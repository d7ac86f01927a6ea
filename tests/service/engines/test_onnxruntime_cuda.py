"""ONNX Runtime's CUDA provider on a double of the device: ONNX Runtime itself computes, on the CPU, when the stream runs. Speed it cannot show."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support import gpu_double
from tests.support.gpu_double import Device, cudaError_t
from vitserve.export.graph.cast_precision import write_cast_graph
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import compare
from vitserve.service.engines.cuda.batch_sizes import candidates
from vitserve.service.engines.engine import DeviceLostError, EngineUnavailableError

OURS = (
    "vitserve.service.engines.cuda.runtime",
    "vitserve.service.engines.cuda.batching",
    "vitserve.service.engines.onnxruntime_cuda_engine",
)


@pytest.fixture
def graph(bundle: Bundle, tmp_path: Path) -> Path:
    """In fp16: a CPU has no kernels for bf16."""
    write_cast_graph(bundle.path / "model.onnx", tmp_path / "half.onnx", "fp16")
    return tmp_path / "half.onnx"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    device = Device()
    bindings: Any = types.ModuleType("cuda.bindings")
    bindings.runtime = gpu_double.runtime_of(device)
    standing = {"cuda": types.ModuleType("cuda"), "cuda.bindings": bindings, "cuda.bindings.runtime": bindings.runtime}
    for name, module in standing.items():
        monkeypatch.setitem(sys.modules, name, module)

    def engine(graph: Path, streams: int = 1, max_batch: int = 12, **faults: Any) -> Any:
        monkeypatch.setitem(sys.modules, "onnxruntime", gpu_double.onnxruntime_of(device, **faults))
        for name in OURS:
            monkeypatch.delitem(sys.modules, name, raising=False)
        *_, ours = (importlib.import_module(name) for name in OURS)
        return ours.OnnxRuntimeCudaEngine(graph, "fp16", streams, max_batch)

    yield SimpleNamespace(device=device, engine=engine)
    for name in OURS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("count", [1, 3, 8, 9, 12])
def test_every_batch_has_the_sources_numbers(gpu: SimpleNamespace, graph: Path, bundle: Bundle, count: int) -> None:
    golden = bundle.golden()
    engine = gpu.engine(graph, streams=2)
    outputs = engine.run(1, golden.pixels[:count])
    assert compare(outputs, Outputs(*(each[:count] for each in golden.reference))).failure("fp16") is None
    engine.close()


def test_rows_of_the_ring_go_to_the_device_from_where_they_are(
    gpu: SimpleNamespace, graph: Path, bundle: Bundle
) -> None:
    golden = bundle.golden()
    engine = gpu.engine(graph)
    slot_table = np.ascontiguousarray(golden.pixels)
    engine.share(slot_table)
    outputs = engine.run(0, slot_table, [5, 0, 3])
    assert compare(outputs, Outputs(*(each[[5, 0, 3]] for each in golden.reference))).failure("fp16") is None
    assert gpu.device.pinned[slot_table.ctypes.data] == slot_table.nbytes
    engine.close()
    assert (gpu.device.allocated, gpu.device.pinned, gpu.device.streams) == ({}, {}, {})


def test_a_graph_that_would_run_in_part_on_the_cpu_is_refused_and_leaves_nothing_behind(
    gpu: SimpleNamespace, graph: Path
) -> None:
    with pytest.raises(
        EngineUnavailableError, match=r"cannot run half\.onnx on the GPU alone; .*assigned to the default CPU EP"
    ):
        gpu.engine(graph, unplaced="LayerNormalization")
    assert (gpu.device.allocated, gpu.device.pinned, gpu.device.streams) == ({}, {}, {})


def test_missing_libraries_and_a_missing_device_are_named(gpu: SimpleNamespace, graph: Path) -> None:
    with pytest.raises(
        EngineUnavailableError,
        match=r"or a library of CUDA's is missing \(its log says which: pip install 'onnxruntime-gpu\[cuda,cudnn\]'\)",
    ):
        gpu.engine(graph, loads=False)
    gpu.device.devices = 0
    with pytest.raises(EngineUnavailableError, match="CUDA finds no device"):
        gpu.engine(graph)


def test_too_little_memory_for_a_second_lane_gives_the_first_ones_back(gpu: SimpleNamespace, graph: Path) -> None:
    gpu.device.memory_bytes = 15_000  # of which a stream takes eleven
    with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
        gpu.engine(graph, streams=2)
    assert (gpu.device.allocated, gpu.device.pinned, gpu.device.streams) == ({}, {}, {})


def test_an_error_that_stays_ends_the_process_whoever_raised_it(
    gpu: SimpleNamespace, graph: Path, bundle: Bundle
) -> None:
    engine = gpu.engine(graph)
    engine_lost = sys.modules["vitserve.service.engines.engine"].DeviceLostError
    gpu.device.dead = cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(engine_lost, match=r"until the process ends"):
        engine.run(0, bundle.golden().pixels[:1])
    assert engine_lost is DeviceLostError


def test_sizes_grow_by_little(bundle: Bundle) -> None:
    assert candidates(1) == [1]
    assert candidates(12) == [1, 2, 3, 4, 5, 6, 7, 8, 12]
    assert candidates(64) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 40, 48, 56, 64]
    assert candidates(200) == [*candidates(64), 128, 192, 200]
