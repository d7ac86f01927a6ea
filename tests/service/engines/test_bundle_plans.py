"""Plans of a bundle: used where they fit, rejected with a sentence elsewhere, and never built at start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gpu.fixtures import Gpu
from tests.support.images import encoded, random_image
from tests.support.planned import MAX_BATCH, PLAN, with_plan
from tests.support.server import start_server
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.service import machine
from vitserve.service.engines import gpu_artifacts
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import EngineRejection, NoEngineError, build_missing, candidates, open_engine

OPTIONS = EngineOptions(engine="tensorrt", precision="bf16", max_batch=MAX_BATCH)


@pytest.fixture
def planned(rtx_gpu: Gpu, bundle: Bundle, tmp_path: Path) -> Bundle:
    return with_plan(bundle, tmp_path / "planned", rtx_gpu.build)


def test_a_plan_of_the_bundle_serves_without_a_build(
    planned: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_artifacts, "build_plan", lambda *_: pytest.fail("nothing is missing"))
    for plan_dir in ("", str(tmp_path / "plans")):
        opened = open_engine(planned, replace(OPTIONS, plan_dir=plan_dir))
        assert (opened.engine.name, opened.engine.precision, opened.rejected) == ("tensorrt", "bf16", ())
        opened.engine.close()
    assert [path.suffix for path in (tmp_path / "plans").iterdir()] == [".jit"]


def test_plans_of_the_bundle_come_before_plans_that_are_built(planned: Bundle, tmp_path: Path) -> None:
    options = replace(OPTIONS, precision="auto", plan_dir=str(tmp_path))
    listed = [(artifact.precision, artifact.path) for artifact in candidates(planned, options)]
    assert listed == [("bf16", PLAN), ("bf16", "model.onnx"), ("fp16", "model.onnx")]
    assert [artifact.path for artifact in candidates(planned, replace(options, plan_dir=""))] == [PLAN]


def flip_a_byte(planned: Bundle, gpu: Gpu) -> None:
    path = planned.path / PLAN
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(planned: Bundle, gpu: Gpu) -> None:
    (planned.path / PLAN).unlink()


def another_card(planned: Bundle, gpu: Gpu) -> None:
    gpu.device.gpu, gpu.device.capability = "NVIDIA H100", (9, 0)


def another_library_version(planned: Bundle, gpu: Gpu) -> None:
    gpu.engine.trt.__version__ = "1.8.0.2"


@pytest.mark.parametrize(
    ("change", "cause", "sentence"),
    [
        (flip_a_byte, "damaged", "bf16-rtx.plan has sha256"),
        (remove, "damaged", "bf16-rtx.plan: No such file"),
        (another_card, "unavailable", "the plan is for sm89; the NVIDIA H100 is sm90"),
        (another_library_version, "unavailable", "the plan is of TensorRT for RTX 1.7.1.116; 1.8.0.2 is installed"),
    ],
)
def test_a_plan_that_does_not_fit_is_rejected_and_the_next_engine_serves(
    planned: Bundle,
    rtx_gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Bundle, Gpu], None],
    cause: str,
    sentence: str,
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: ["0"])
    change(planned, rtx_gpu)
    opened = open_engine(open_bundle(planned.path), replace(OPTIONS, engine="auto", precision="auto"))
    opened.engine.close()
    first = opened.rejected[0]
    assert (first.engine, first.precision, first.cause) == ("tensorrt", "bf16", cause)
    assert sentence in first.reason
    assert opened.engine.name != "tensorrt"


def test_a_plan_with_wrong_outputs_fails_the_golden_check(
    planned: Bundle, rtx_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = rtx_gpu.engine._Program.enqueue

    def wrong(self: Any, size: int) -> None:
        enqueue(self, size)
        rtx_gpu.device.enqueue(self._buffers.stream.handle, lambda: self._buffers.host["logits"].array.fill(9))

    monkeypatch.setattr(rtx_gpu.engine._Program, "enqueue", wrong)
    with pytest.raises(NoEngineError, match="tensorrt in bf16: golden images: logits"):
        open_engine(planned, OPTIONS)
    assert rtx_gpu.device.allocated == {}


def test_larger_batches_than_the_plan_supports_are_named(planned: Bundle) -> None:
    with pytest.raises(NoEngineError, match="supports batches of up to 4; max_batch is 8"):
        open_engine(planned, replace(OPTIONS, max_batch=8))


def test_a_rejected_plan_of_the_bundle_does_not_count_as_built(
    planned: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the service would reload forever."""
    built: list[Path] = []
    monkeypatch.setattr(gpu_artifacts, "build_plan", lambda graph, path, *_: built.append(path))
    options = replace(OPTIONS, plan_dir=str(tmp_path), defer_builds=True)
    assert not build_missing(planned, options, [EngineRejection("tensorrt", "bf16", "unavailable", "")])
    assert build_missing(planned, options, [EngineRejection("tensorrt", "bf16", "not_built", "")])
    assert len(built) == 1


def test_the_service_starts_from_a_plan_of_the_bundle(
    planned: Bundle, tmp_path: Path, rtx_environment: dict[str, str]
) -> None:
    options = ("--engine", "tensorrt", "--max-batch", str(MAX_BATCH), "--timeout-ms", "60000")
    server = start_server("--bundle", str(planned.path), *options, environment=rtx_environment)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answer = client.post("/v1/classify", content=encoded(random_image()), headers={"content-type": "image/png"})
            assert answer.status_code == 200
            model = client.get("/v1/model").json()
    finally:
        assert server.stop() == 0
    assert (model["serving"]["engine"], model["serving"]["rejected"]) == ("tensorrt", [])
    (plan,) = [artifact["plan"] for artifact in model["artifacts"] if artifact["plan"]]
    assert (plan["attention"], len(plan["profiles"]), plan["capabilities"]) == (2, 2, [[8, 9]])
    built = {path.suffix for path in (tmp_path / "cache" / "vitserve" / "plans").iterdir()}
    assert built == {".jit"}, "only compiled kernels are kept, no plan was built"
