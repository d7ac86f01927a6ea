"""Running a TensorRT plan on the GPU double: what is called when, and that the numbers arrive where they belong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.gpu.cuda import cudaError_t
from tests.support.gpu.fixtures import Gpu
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import compare
from vitserve.service.engines.engine import DeviceLostError, EngineUnavailableError


def matches(outputs: Outputs, bundle: Bundle, rows: Any) -> bool:
    """Whether these are the source network's outputs for those golden images."""
    expected = Outputs(*(array[rows] for array in bundle.golden().reference))
    return compare(outputs, expected).failure("bf16") is None


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_batch_size_reproduces_the_source(gpu: Gpu, plan: Path, bundle: Bundle, count: int) -> None:
    engine = gpu.open_plan(plan)
    assert matches(engine.run(0, bundle.golden().pixels[:count]), bundle, slice(count))
    engine.close()


def test_the_device_reads_rows_of_the_slot_table_in_order(gpu: Gpu, plan: Path, bundle: Bundle) -> None:
    golden, engine = bundle.golden(), gpu.open_plan(plan)
    slot_table = np.ascontiguousarray(np.concatenate([golden.pixels, golden.pixels[::-1]]))
    engine.share(slot_table)
    rows = [len(slot_table) - 1, 2, 0]
    mixed = engine.run(0, slot_table, rows)
    assert gpu.device.pinned[slot_table.ctypes.data] == slot_table.nbytes, "registered once"
    one_by_one = [engine.run(0, slot_table, [row]) for row in rows]
    expected = Outputs(*(np.concatenate(arrays) for arrays in zip(*one_by_one, strict=True)))
    assert all(np.abs(ours - theirs).max() < 1e-2 for ours, theirs in zip(mixed, expected, strict=True))
    copy = mixed.logits.copy()
    engine.run(0, slot_table, [4, 3, 1])
    assert np.array_equal(mixed.logits, copy), "a later run does not overwrite outputs"
    engine.close()


def test_each_stream_has_its_own_memory(gpu: Gpu, plan: Path, bundle: Bundle) -> None:
    golden, engine = bundle.golden(), gpu.open_plan(plan, streams=2)
    alone = engine.run(0, golden.pixels[:2])
    engine.run(1, golden.pixels[2:4])
    repeated = engine.run(0, golden.pixels[:2])
    assert np.array_equal(alone.logits, repeated.logits)
    engine.close()


def test_closing_frees_everything(gpu: Gpu, plan: Path, bundle: Bundle) -> None:
    engine, slot_table = gpu.open_plan(plan, streams=2), bundle.golden().pixels
    engine.share(slot_table)
    engine.run(0, slot_table, [0])
    engine.close()
    device = gpu.device
    assert (device.allocated, device.pinned, device.streams, device.graphs) == ({}, {}, {}, {})


def test_images_are_copied_if_the_slot_table_cannot_be_pinned(
    gpu: Gpu, plan: Path, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    golden, engine = bundle.golden(), gpu.open_plan(plan)
    gpu.device.fail("cudaHostRegister", cudaError_t.cudaErrorMemoryAllocation)
    engine.share(golden.pixels)
    assert "cannot pin the slot table" in caplog.text
    assert "cudaErrorMemoryAllocation" in caplog.text
    assert matches(engine.run(0, golden.pixels, [3, 1]), bundle, [3, 1])
    engine.close()


def test_a_size_with_different_outputs_is_rejected(gpu: Gpu, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue = gpu.engine._Program.enqueue

    def wrong(self: Any, size: int) -> None:
        enqueue(self, size)
        if size == 2:
            gpu.device.enqueue(self._buffers.stream.handle, lambda: self._buffers.host["logits"].array.fill(9))

    monkeypatch.setattr(gpu.engine._Program, "enqueue", wrong)
    monkeypatch.setattr(gpu.batching, "efficient_sizes", lambda seconds: sorted(seconds))
    with pytest.raises(EngineUnavailableError, match="batches of 2 and of 4 give different outputs: logits differ"):
        gpu.open_plan(plan)
    assert gpu.device.allocated == {}


def test_an_error_during_capture_does_not_lose_the_device(
    gpu: Gpu, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, calls = gpu.device.cudaMemcpyAsync, list[int]()

    def failing(*arguments: Any) -> Any:
        if gpu.device.capturing:
            calls.append(1)
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        return copy(*arguments)

    monkeypatch.setattr(sys.modules["cuda.bindings.runtime"], "cudaMemcpyAsync", failing)
    with pytest.raises(gpu.cuda.CudaError, match="cudaErrorStreamCaptureUnsupported"):
        gpu.open_plan(plan)
    assert calls == [1]
    assert (gpu.device.allocated, gpu.device.capturing) == ({}, {})


def test_only_sizes_faster_than_all_larger_ones_are_used(gpu: Gpu) -> None:
    efficient_sizes = gpu.batching.efficient_sizes
    assert efficient_sizes({1: 1.0, 2: 1.5, 3: 2.5, 4: 2.0, 5: 3.0, 6: 3.0}) == [1, 2, 4, 6]
    assert efficient_sizes({1: 1.0}) == [1]
    assert efficient_sizes(dict.fromkeys(range(1, 9), 0.5)) == [8]


def test_candidate_sizes_grow_in_small_steps(gpu: Gpu) -> None:
    candidate_sizes = gpu.batching.candidate_sizes
    assert candidate_sizes(1) == [1]
    assert candidate_sizes(12) == [1, 2, 3, 4, 5, 6, 7, 8, 12]
    assert candidate_sizes(64) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 40, 48, 56, 64]
    assert candidate_sizes(200) == [*candidate_sizes(64), 128, 192, 200]


def test_an_unusable_plan_or_a_missing_device_is_named(gpu: Gpu, plan: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="supports batches of up to 4; max_batch is 16"):
        gpu.open_plan(plan, max_batch=16)
    plan.write_bytes(b"not a plan")
    with pytest.raises(
        EngineUnavailableError, match=r"tiny\.plan cannot be used: TensorRT rejects it: header\.magicTag"
    ):
        gpu.open_plan(plan)
    gpu.device.devices = 0
    with pytest.raises(EngineUnavailableError, match=r"CUDA finds no device: .*cudaErrorNoDevice"):
        gpu.open_plan(plan)


def test_after_too_little_memory_the_device_is_usable(gpu: Gpu, plan: Path, bundle: Bundle) -> None:
    pixels = bundle.golden().pixels[:1]
    gpu.device.memory_bytes = 1000
    with pytest.raises(gpu.cuda.CudaError, match="cudaErrorMemoryAllocation"):
        gpu.open_plan(plan)
    gpu.device.memory_bytes = 1 << 30
    engine = gpu.open_plan(plan)
    gpu.device.fail("cudaGraphLaunch", cudaError_t.cudaErrorMemoryAllocation)
    with pytest.raises(gpu.cuda.CudaError, match="cudaErrorMemoryAllocation"):
        engine.run(0, pixels)
    assert matches(engine.run(0, pixels), bundle, slice(1))
    engine.close()


def test_an_error_that_persists_loses_the_device(gpu: Gpu, plan: Path, bundle: Bundle) -> None:
    engine = gpu.open_plan(plan)
    gpu.device.lost = cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(DeviceLostError, match=r"cudaErrorIllegalAddress.*until the process ends"):
        engine.run(0, bundle.golden().pixels[:1])
    assert not issubclass(DeviceLostError, Exception), "or the handling of a failed batch would catch it"
