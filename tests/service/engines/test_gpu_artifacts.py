"""Names of plans, and when they are built."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.gpu.fixtures import Gpu
from vitserve.model.bundle.bundle import GRAPH, Bundle
from vitserve.service.engines import gpu_artifacts
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError
from vitserve.service.engines.gpu_artifacts import PlanOptions, Progress, plan_path, plans_of
from vitserve.service.engines.selection import (
    EngineRejection,
    NoEngineError,
    build_missing,
    candidates,
    open_artifact,
    open_engine,
)
from vitserve.service.engines.tensorrt.target import local_target


def test_the_name_of_a_plan_holds_all_that_it_depends_on(gpu: Gpu, bundle: Bundle) -> None:
    target = local_target()
    path = plan_path(Path("plans"), bundle, GRAPH, gpu.options, target)
    assert re.fullmatch(r"[0-9a-f]{12}-bf16-b4-nvidia-h200-sm90-trt11\.4\.0\.106\.plan", path.name)
    files = bundle.manifest.files | {"model.onnx.data": "0"}
    other_weights = replace(bundle, manifest=replace(bundle.manifest, files=files))
    others = {
        plan_path(Path("plans"), other_weights, GRAPH, gpu.options, target),
        plan_path(Path("plans"), bundle, GRAPH, PlanOptions("fp16", 4), target),
        plan_path(Path("plans"), bundle, GRAPH, PlanOptions("bf16", 8), target),
        plan_path(Path("plans"), bundle, GRAPH, gpu.options, replace(target, version="12.0")),
    }
    assert len(others | {path}) == 5


def test_plans_of_a_bundle_are_found(gpu: Gpu, bundle: Bundle, tmp_path: Path) -> None:
    path = plan_path(tmp_path, bundle, GRAPH, gpu.options, local_target())
    path.write_bytes(b"a plan")
    (tmp_path / "0123456789ab-bf16-b4-nvidia-h200-sm90-trt11.plan").write_bytes(b"of another bundle")
    assert plans_of(tmp_path, bundle) == [path]


def test_a_failed_build_is_not_repeated_in_the_background(
    gpu: Gpu, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = list[str]()

    def build(graph: Path, path: Path, options: PlanOptions, progress: Progress) -> None:
        builds.append(options.precision)
        if options.precision == "bf16":
            raise EngineUnavailableError("the TensorRT plan could not be built: no implementation for node 7")
        path.write_bytes(b"a plan")

    monkeypatch.setattr(gpu_artifacts, "build_plan", build)
    options = EngineOptions(engine="tensorrt", plan_dir=str(tmp_path), defer_builds=True)
    with pytest.raises(
        NoEngineError, match="bf16: its plan is not built yet; tensorrt in fp16: its plan is not built yet"
    ):
        open_engine(bundle, options)
    rejected = [
        EngineRejection("tensorrt", "bf16", "not_built", ""),
        EngineRejection("tensorrt", "fp16", "not_built", ""),
    ]
    assert build_missing(bundle, options, rejected), "the next best plan is built"
    assert builds == ["bf16", "fp16"]
    bf16, _ = candidates(bundle, options)
    with pytest.raises(EngineUnavailableError, match=r"for node 7; remove .*\.failed to try again"):
        open_artifact(bundle, bf16, options)
    with pytest.raises(EngineUnavailableError, match=r"for node 7$"):
        open_artifact(bundle, bf16, replace(options, defer_builds=False))
    assert builds == ["bf16", "fp16", "bf16"], "a start that waits for the plan builds it again"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('a step'); print('no kernel'); raise SystemExit(3)", "no kernel"),
        ("print('a step'); raise RuntimeError", "the builder exited with status 1"),
    ],
    ids=["stated", "uncaught"],
)
def test_only_a_stated_reason_is_reported(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of a builder that crashed is a step, not the reason."""
    monkeypatch.setattr(gpu_artifacts, "python_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(EngineUnavailableError, match=f"could not be built: {reason}$"):
        gpu_artifacts.build_plan(tmp_path / "graph", tmp_path / "plan", PlanOptions(), lambda step: None)


def test_only_plans_that_were_not_built_are_built(
    gpu: Gpu, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_artifacts, "build_plan", lambda *_: pytest.fail("nothing is missing"))
    options = EngineOptions(engine="tensorrt", plan_dir=str(tmp_path), defer_builds=True)
    rejected = [EngineRejection("tensorrt", "bf16", "golden_check", "logits differ")]
    assert not build_missing(bundle, options, rejected)
