"""Building TensorRT plans, on the GPU double."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.support.gpu.fixtures import Gpu
from tests.support.gpu.tensorrt_builder import Builder
from tests.support.networks import TINY
from vitserve.model.bundle.bundle import Bundle


def build(gpu: Gpu, bundle: Bundle, path: Path, **arguments: Any) -> Any:
    return gpu.build.plan_for(bundle.path / "model.onnx", path, gpu.options, **arguments)


def test_a_plan_and_its_report_are_built_once(gpu: Gpu, bundle: Bundle, plan: Path) -> None:
    content = plan.read_bytes()
    report = build(gpu, bundle, plan)
    assert Builder.builds == 1
    assert plan.read_bytes() == content
    assert str(report).startswith(f"{TINY.depth} of {TINY.depth} attention layers are fused (input: BFloat16)")
    assert report.fused


def test_two_concurrent_calls_build_once(gpu: Gpu, bundle: Bundle, tmp_path: Path) -> None:
    started, proceed = threading.Event(), threading.Event()

    def wait(step: str) -> bool:
        started.set()
        return proceed.wait(60)

    def call() -> None:
        reports.append(build(gpu, bundle, tmp_path / "a.plan", progress=wait))

    reports: list[Any] = []
    threads = [threading.Thread(target=call) for _ in range(2)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    proceed.set()
    for thread in threads:
        thread.join()
    assert Builder.builds == 1
    assert reports[0] == reports[1]


def test_attention_that_is_not_fused_fails_the_build(gpu: Gpu, bundle: Bundle, tmp_path: Path) -> None:
    Builder.unfused = 1
    with pytest.raises(gpu.builder.PlanError) as failure:
        build(gpu, bundle, tmp_path / "a.plan")
    message = str(failure.value)
    assert message.startswith("TensorRT did not fuse all of the attention: 1 of 2 attention layers are fused")
    assert "softmax outside of a fused kernel, batches up to 1: __myl_SlicMaxrSubExpSumDiv_myl0_" in message
    assert "allow" not in message, "there is no option that allows it"
    assert not (tmp_path / "a.plan").exists()


def test_a_node_that_tensorrt_rejects_is_named(gpu: Gpu, bundle: Bundle, tmp_path: Path) -> None:
    Builder.impossible = "Could not find any implementation for node /blocks.1/Attention"
    with pytest.raises(gpu.builder.PlanError, match=r"plan with 2 fused attention layers: .*node /blocks\.1/Attention"):
        build(gpu, bundle, tmp_path / "a.plan")
    model = onnx.load(bundle.path / "model.onnx")
    model.graph.node.append(onnx.helper.make_node("NonZero", ["logits"], ["where"], name="NonZero_7"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("where", onnx.TensorProto.INT64, [2, None]))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(gpu.builder.PlanError, match=r"NonZero NonZero_7: .*Plugin not found"):
        gpu.build.plan_for(tmp_path / "odd.onnx", tmp_path / "a.plan", gpu.options)
    assert [path.suffix for path in tmp_path.glob("a.*")] == [".lock"]


def test_a_build_reports_progress_and_can_be_canceled(gpu: Gpu, bundle: Bundle, tmp_path: Path) -> None:
    steps: list[str] = []

    def cancel(step: str) -> bool:
        steps.append(step)
        return False

    with pytest.raises(gpu.builder.BuildCanceledError):
        build(gpu, bundle, tmp_path / "a.plan", progress=cancel)
    assert steps == ["timing: 1 of 2"]
    assert not (tmp_path / "a.plan").exists()


@pytest.mark.parametrize("before", [None, b"timed", b"of another GPU"])
def test_timings_are_kept_and_those_of_another_gpu_replaced(
    gpu: Gpu, bundle: Bundle, tmp_path: Path, before: bytes | None
) -> None:
    timings = tmp_path / "timings-trt11.4.0.106.cache"
    if before is not None:
        timings.write_bytes(before)
    build(gpu, bundle, tmp_path / "a.plan")
    assert timings.read_bytes() == b"timed"


def test_the_last_profile_reaches_the_largest_batch(gpu: Gpu) -> None:
    assert gpu.builder.profile_ranges(64) == [(1, 1), (1, 8), (1, 64)]
    assert gpu.builder.profile_ranges(8) == [(1, 1), (1, 8)]
    assert gpu.builder.profile_ranges(1) == [(1, 1)]
