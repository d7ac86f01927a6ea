"""Building and running TensorRT plans, on a double of the GPU: what happens when, and that the numbers arrive where they belong."""

from __future__ import annotations

import importlib
import re
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from tests.support import gpu_double
from tests.support.gpu_double import Device, cudaError_t
from tests.support.networks import TINY
from vitserve.model.bundle.bundle import GRAPH, Bundle
from vitserve.model.bundle.parity import compare
from vitserve.service.engines import selection as opening
from vitserve.service.engines.cuda.batch_sizes import worthwhile
from vitserve.service.engines.engine import DeviceLostError, EngineOptions, EngineUnavailableError
from vitserve.service.engines.gpu_artifacts import PlanOptions, plan_path

OURS = (
    "vitserve.service.engines.cuda.runtime",
    "vitserve.service.engines.cuda.batching",
    "vitserve.service.engines.tensorrt.engine",
    "vitserve.export.build_plan",
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Our modules, imported where the double stands for TensorRT and CUDA; and its device."""
    device = Device()
    bindings: Any = types.ModuleType("cuda.bindings")
    bindings.runtime = gpu_double.runtime_of(device)
    for name, module in {
        "tensorrt": gpu_double.tensorrt_of(device),
        "cuda": types.ModuleType("cuda"),
        "cuda.bindings": bindings,
        "cuda.bindings.runtime": bindings.runtime,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    cuda, _, engine, build = (importlib.import_module(name) for name in OURS)
    yield SimpleNamespace(device=device, cuda=cuda, engine=engine, build=build, options=PlanOptions(max_batch=4))
    for name in OURS:
        sys.modules.pop(name, None)


@pytest.fixture
def plan(gpu: SimpleNamespace, bundle: Bundle, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.plan"
    gpu.build.plan_for(bundle.path / "model.onnx", path, TINY.depth, gpu.options)
    return path


def open_plan(gpu: SimpleNamespace, plan: Path, streams: int = 1, max_batch: int = 4) -> Any:
    return gpu.engine.TensorRtEngine(plan, "bf16", streams, max_batch)


# -- running


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_batch_has_the_sources_numbers(gpu: SimpleNamespace, plan: Path, bundle: Bundle, count: int) -> None:
    golden, engine = bundle.golden(), open_plan(gpu, plan)
    outputs = engine.run(0, golden.pixels[:count])
    reference = type(outputs)(*(each[:count] for each in golden.reference))
    assert compare(outputs, reference).failure("bf16") is None
    engine.close()


def test_rows_of_the_ring_are_read_by_the_device_itself_and_answered_in_their_order(
    gpu: SimpleNamespace, plan: Path, bundle: Bundle
) -> None:
    golden, engine = bundle.golden(), open_plan(gpu, plan)
    slot_table = np.ascontiguousarray(np.concatenate([golden.pixels, golden.pixels[::-1]]))
    engine.share(slot_table)
    rows = [len(slot_table) - 1, 2, 0]
    mixed = engine.run(0, slot_table, rows)
    one_by_one = [engine.run(0, slot_table, [row]) for row in rows]
    assert gpu.device.pinned[slot_table.ctypes.data] == slot_table.nbytes, "registered, once"
    for name in ("logits", "embedding"):
        assert np.abs(getattr(mixed, name) - np.concatenate([getattr(each, name) for each in one_by_one])).max() < 1e-2
    kept = mixed.logits.copy()
    engine.run(0, slot_table, [4, 3, 1])
    assert np.array_equal(mixed.logits, kept), "outputs are the client's"
    engine.close()


def test_lanes_have_memory_of_their_own(gpu: SimpleNamespace, plan: Path, bundle: Bundle) -> None:
    golden, engine = bundle.golden(), open_plan(gpu, plan, streams=2)
    alone = engine.run(0, golden.pixels[:2])
    engine.run(1, golden.pixels[2:4])
    again = engine.run(0, golden.pixels[:2])
    assert np.array_equal(alone.logits, again.logits)
    engine.close()


def test_closing_gives_everything_back(gpu: SimpleNamespace, plan: Path, bundle: Bundle) -> None:
    engine = open_plan(gpu, plan, streams=2)
    engine.share(slot_table := bundle.golden().pixels)
    engine.run(0, slot_table, [0])
    engine.close()
    device = gpu.device
    assert (device.allocated, device.pinned, device.streams, device.graphs) == ({}, {}, {}, {})


def test_slots_that_cannot_be_pinned_are_copied(
    gpu: SimpleNamespace, plan: Path, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    golden, engine = bundle.golden(), open_plan(gpu, plan)
    gpu.device.fail("cudaHostRegister", cudaError_t.cudaErrorMemoryAllocation)
    engine.share(golden.pixels)
    assert "the slots cannot be pinned: cudaErrorMemoryAllocation" in caplog.text
    outputs = engine.run(0, golden.pixels, [3, 1])
    assert compare(outputs, type(outputs)(*(each[[3, 1]] for each in golden.reference))).failure("bf16") is None
    engine.close()


def test_a_size_that_computes_something_else_is_found(
    gpu: SimpleNamespace, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = gpu.engine._Program.enqueue

    def wrong(self: Any, size: int) -> None:
        enqueue(self, size)
        if size == 2:
            gpu.device.enqueue(self._buffers.stream.handle, lambda: self._buffers.host["logits"].array.fill(9))

    monkeypatch.setattr(gpu.engine._Program, "enqueue", wrong)
    monkeypatch.setattr(
        importlib.import_module("vitserve.service.engines.cuda.batching"), "worthwhile", lambda seconds: sorted(seconds)
    )
    with pytest.raises(EngineUnavailableError, match=r"batches of 2 come out otherwise than those of 4: logits differ"):
        open_plan(gpu, plan)
    assert gpu.device.allocated == {}


def test_an_error_while_a_graph_is_captured_is_not_the_devices_end(
    gpu: SimpleNamespace, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, calls = gpu.device.cudaMemcpyAsync, list[int]()
    runtime = sys.modules["cuda.bindings.runtime"]

    def failing(*arguments: Any) -> Any:
        if gpu.device.capturing:
            calls.append(1)
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        return copy(*arguments)

    monkeypatch.setattr(runtime, "cudaMemcpyAsync", failing)
    with pytest.raises(gpu.cuda.CudaError, match="cudaErrorStreamCaptureUnsupported"):
        open_plan(gpu, plan)
    assert calls == [1]
    assert (gpu.device.allocated, gpu.device.capturing) == ({}, {})


def test_only_sizes_that_are_quicker_than_all_larger_ones_keep_a_graph() -> None:
    assert worthwhile({1: 1.0, 2: 1.5, 3: 2.5, 4: 2.0, 5: 3.0, 6: 3.0}) == [1, 2, 4, 6]
    assert worthwhile({1: 1.0}) == [1]
    assert worthwhile(dict.fromkeys(range(1, 9), 0.5)) == [8]


def test_no_device_a_foreign_plan_and_one_for_smaller_batches_are_unavailable(gpu: SimpleNamespace, plan: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="takes batches of at most 4; 16 are wanted"):
        open_plan(gpu, plan, max_batch=16)
    plan.write_bytes(b"of another TensorRT")
    with pytest.raises(EngineUnavailableError, match="the plan is of another version"):
        open_plan(gpu, plan)
    gpu.device.devices = 0
    with pytest.raises(EngineUnavailableError, match=r"CUDA finds no device: .*cudaErrorNoDevice"):
        open_plan(gpu, plan)


def test_too_little_memory_is_an_error_that_leaves_the_device_usable(
    gpu: SimpleNamespace, plan: Path, bundle: Bundle
) -> None:
    gpu.device.memory_bytes = 1000
    with pytest.raises(gpu.cuda.CudaError, match="cudaErrorMemoryAllocation"):
        open_plan(gpu, plan)
    gpu.device.memory_bytes = 1 << 30
    engine = open_plan(gpu, plan)
    gpu.device.fail("cudaGraphLaunch", cudaError_t.cudaErrorMemoryAllocation)
    with pytest.raises(gpu.cuda.CudaError, match="cudaErrorMemoryAllocation"):
        engine.run(0, bundle.golden().pixels[:1])
    assert (
        compare(
            engine.run(0, bundle.golden().pixels[:1]),
            type(bundle.golden().reference)(*(each[:1] for each in bundle.golden().reference)),
        ).failure("bf16")
        is None
    )
    engine.close()


def test_an_error_that_stays_is_no_failed_batch_but_the_end(gpu: SimpleNamespace, plan: Path, bundle: Bundle) -> None:
    engine = open_plan(gpu, plan)
    gpu.device.dead = cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(DeviceLostError, match=r"cudaErrorIllegalAddress.*until the process ends"):
        engine.run(0, bundle.golden().pixels[:1])
    assert not issubclass(DeviceLostError, Exception), "else whoever handles a failed batch would handle it"


# -- building


def test_a_plan_is_built_once_and_found_again_with_its_report(gpu: SimpleNamespace, bundle: Bundle, plan: Path) -> None:
    built = gpu_double.Builder.builds
    content = plan.read_bytes()
    report = gpu.build.plan_for(bundle.path / "model.onnx", plan, TINY.depth, gpu.options)
    assert gpu_double.Builder.builds == built == 1
    assert plan.read_bytes() == content
    assert str(report).startswith(f"{TINY.depth} of {TINY.depth} attention layers are fused (input: BFloat16)")
    assert report.fused


def test_two_who_ask_at_once_build_once(gpu: SimpleNamespace, bundle: Bundle, tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()

    def wait(step: str) -> bool:
        started.set()
        return go.wait(60)

    def ask() -> None:
        reports.append(
            gpu.build.plan_for(bundle.path / "model.onnx", tmp_path / "a.plan", TINY.depth, gpu.options, wait)
        )

    reports: list[Any] = []
    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    go.set()
    for each in threads:
        each.join()
    assert gpu_double.Builder.builds == 1
    assert reports[0] == reports[1]


def test_attention_that_is_not_fused_fails_the_build_unless_allowed(
    gpu: SimpleNamespace, bundle: Bundle, tmp_path: Path
) -> None:
    gpu_double.Builder.unfused = 1
    with pytest.raises(
        gpu.build.PlanError, match=r"1 of 2 attention layers are fused .*softmax left in __myl_softmax_"
    ):
        gpu.build.plan_for(bundle.path / "model.onnx", tmp_path / "a.plan", TINY.depth, gpu.options)
    assert not (tmp_path / "a.plan").exists()
    report = gpu.build.plan_for(
        bundle.path / "model.onnx", tmp_path / "a.plan", TINY.depth, replace(gpu.options, allow_unfused=True)
    )
    assert not report.fused
    assert (tmp_path / "a.plan").exists()


def test_what_tensorrt_cannot_read_or_build_is_named(gpu: SimpleNamespace, bundle: Bundle, tmp_path: Path) -> None:
    gpu_double.Builder.impossible = "Could not find any implementation for node /blocks.1/Attention"
    with pytest.raises(gpu.build.PlanError, match=r"could not build it, of 2 attention .*node /blocks\.1/Attention"):
        gpu.build.plan_for(bundle.path / "model.onnx", tmp_path / "a.plan", TINY.depth, gpu.options)
    model = onnx.load(bundle.path / "model.onnx")
    model.graph.node.append(onnx.helper.make_node("NonZero", ["logits"], ["where"], name="NonZero_7"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("where", onnx.TensorProto.INT64, [2, None]))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(gpu.build.PlanError, match="NonZero NonZero_7: no importer"):
        gpu.build.plan_for(tmp_path / "odd.onnx", tmp_path / "a.plan", TINY.depth, gpu.options)
    assert sorted(each.suffix for each in tmp_path.glob("a.*")) == [".lock"]


def test_a_build_tells_its_progress_and_can_be_cancelled(gpu: SimpleNamespace, bundle: Bundle, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(gpu.build.BuildCanceledError):
        gpu.build.plan_for(
            bundle.path / "model.onnx",
            tmp_path / "a.plan",
            TINY.depth,
            gpu.options,
            lambda step: bool(told.append(step)),
        )
    assert told == ["timing: 1 of 2"]
    assert not (tmp_path / "a.plan").exists()


@pytest.mark.parametrize("before", [None, b"timed", b"of another GPU"])
def test_timings_are_kept_and_those_of_another_gpu_are_left_aside(
    gpu: SimpleNamespace, bundle: Bundle, tmp_path: Path, before: bytes | None
) -> None:
    timings = tmp_path / "timings-trt11.4.0.106.cache"
    if before is not None:
        timings.write_bytes(before)
    gpu.build.plan_for(bundle.path / "model.onnx", tmp_path / "a.plan", TINY.depth, gpu.options)
    assert timings.read_bytes() == b"timed"


def test_a_plan_is_named_by_all_that_it_is_good_for(gpu: SimpleNamespace, bundle: Bundle) -> None:
    named = plan_path(Path("plans"), bundle, GRAPH, gpu.options, gpu.engine.target())
    assert re.fullmatch(r"[0-9a-f]{12}-bf16-b4-nvidia-h200-sm90-trt11\.4\.0\.106\.plan", named.name)
    other = replace(bundle, manifest=replace(bundle.manifest, files=bundle.manifest.files | {"model.onnx.data": "0"}))
    half, target = PlanOptions("fp16", 4), gpu.engine.target()
    others = {
        plan_path(Path("plans"), other, GRAPH, gpu.options, target),
        plan_path(Path("plans"), bundle, GRAPH, half, target),
    }
    assert len(others | {named}) == 3


def test_the_last_profile_reaches_the_largest_batch(gpu: SimpleNamespace) -> None:
    assert gpu.build.profile_ranges(64) == [(1, 1), (1, 8), (1, 64)]
    assert gpu.build.profile_ranges(8) == [(1, 1), (1, 8)]
    assert gpu.build.profile_ranges(1) == [(1, 1)]


def test_a_plan_that_cannot_be_built_is_not_tried_again_while_others_serve(
    gpu: SimpleNamespace, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[str]()

    def build(bundle: Bundle, graph: str, path: Path, options: PlanOptions, progress: object) -> None:
        tried.append(options.precision)
        if options.precision == "bf16":
            raise EngineUnavailableError(
                "no TensorRT plan could be built: Could not find any implementation for node 7"
            )
        path.write_bytes(b"a plan")

    monkeypatch.setattr(opening, "build_plan", build)
    options = EngineOptions(engine="tensorrt", plan_dir=str(tmp_path), serve_meanwhile=True)
    with pytest.raises(
        opening.NoEngineError, match=r"bf16: its plan is not built yet; tensorrt in fp16: its plan is not built yet"
    ):
        opening.open_engine(bundle, options)
    rejected = [opening.EngineRejection("tensorrt", precision, "not_built", "") for precision in ("bf16", "fp16")]
    assert opening.build_missing(bundle, options, rejected), "the next best"
    assert tried == ["bf16", "fp16"]
    bf16, _ = opening.candidates(bundle, options)
    with pytest.raises(EngineUnavailableError, match=r"for node 7; remove .*\.failed to have it tried again"):
        opening.open_artifact(bundle, bf16, options)
    with pytest.raises(EngineUnavailableError, match=r"for node 7$"):
        opening.open_artifact(bundle, bf16, replace(options, serve_meanwhile=False))
    assert tried == ["bf16", "fp16", "bf16"], "who waits for it has it tried"
