"""Which engine serves: the order of the candidates, and what happens when one does not work."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.model.bundle.plan import PlanReport
from vitserve.service.engines import selection
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import Engine, EngineOptions, EngineUnavailableError
from vitserve.service.engines.selection import EngineRejection, NoEngineError, candidates, open_engine


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ``package`` were not installed."""
    ours = [name for name in sys.modules if name.startswith("vitserve.service.engines.") and package in name]
    for name in (*(name for name in sys.modules if name.startswith(f"{package}.")), *ours):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # None: an import fails


def test_fp32_is_fp32(bundle: Bundle) -> None:
    """A CPU with bf16 arithmetic would use it by default, with a thousand times this difference."""
    opened = open_engine(bundle, EngineOptions(engine="openvino", precision="fp32"))
    opened.engine.close()
    assert opened.parity.logits < 1e-5


def test_auto_opens_the_fastest_candidate_that_works(bundle: Bundle) -> None:
    opened = open_engine(bundle, EngineOptions())
    opened.engine.close()
    if opened.rejected:  # on a CPU without bf16
        assert (opened.engine.name, opened.engine.precision) == ("openvino", "fp32")
        assert list(map(str, opened.rejected)) == ["openvino in bf16: this CPU has no bf16 arithmetic"]
    else:
        assert (opened.engine.name, opened.engine.precision) == ("openvino", "bf16")


def test_the_tuning_result_comes_first(bundle: Bundle) -> None:
    opened = open_engine(bundle, EngineOptions(), first=("onnxruntime", "fp32"))
    opened.engine.close()
    assert (opened.engine.name, opened.engine.precision, opened.rejected) == ("onnxruntime", "fp32", ())


def test_cpu_candidates_are_ordered_by_precision_then_engine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = [
        replace(bundle.manifest.artifacts[0], engine=name, precision="int8") for name in ("onnxruntime", "openvino")
    ]
    artifacts = (*reversed(bundle.manifest.artifacts), *int8)
    quantized = replace(bundle, manifest=replace(bundle.manifest, artifacts=artifacts))
    float_order = [("openvino", "bf16"), ("openvino", "fp32"), ("onnxruntime", "fp32")]
    int8_order = [("openvino", "int8"), ("onnxruntime", "int8")]
    for fast, order in ((True, [*int8_order, *float_order]), (False, [*float_order, *int8_order])):
        monkeypatch.setattr("vitserve.service.machine.multiplies_int8", lambda fast=fast: fast)
        assert [(each.engine, each.precision) for each in candidates(quantized, EngineOptions())] == order


def test_torch_on_a_cpu_is_used_only_on_request(bundle: Bundle) -> None:
    assert "torch" not in {each.engine for each in candidates(bundle, EngineOptions())}
    requested = candidates(bundle, EngineOptions(engine="torch"))
    assert [(each.engine, each.precision) for each in requested] == [("torch", "fp32"), ("torch", "bf16")]


def test_an_engine_of_a_later_version_is_rejected(bundle: Bundle) -> None:
    later = replace(bundle.manifest.artifacts[0], engine="npu")
    artifacts = (later, *bundle.manifest.artifacts)
    opened = open_engine(replace(bundle, manifest=replace(bundle.manifest, artifacts=artifacts)), EngineOptions())
    opened.engine.close()
    assert opened.engine.name == "openvino"
    with pytest.raises(NoEngineError, match="npu in fp32: unknown engine: npu"):
        open_engine(replace(bundle, manifest=replace(bundle.manifest, artifacts=(later,))), EngineOptions())


def test_a_damaged_artifact_is_rejected_and_the_next_serves(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"?")
    opened = open_engine(open_bundle(copy), EngineOptions())
    opened.engine.close()
    assert (opened.engine.name, opened.engine.precision) == ("onnxruntime", "fp32")
    assert {(each.engine, each.cause) for each in opened.rejected} == {("openvino", "damaged")}
    assert "model.onnx has sha256" in opened.rejected[0].reason


@pytest.mark.parametrize("fault", ["wrong outputs", "an exception"])
def test_a_failed_golden_check_closes_the_engine_and_the_next_serves(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    closed: list[str] = []

    def construct(
        name: str, precision: Precision, graph: Path, options: EngineOptions, plan: PlanReport | None
    ) -> Engine:
        engine = construct_engine(name, precision, graph, options)
        run, close = engine.run, engine.close

        def broken_run(stream: int, pixels: Pixels) -> Outputs:
            if fault == "an exception":
                raise RuntimeError("logits differ by everything")
            outputs = run(stream, pixels)
            return Outputs(outputs.logits * 1.01, outputs.embedding)

        def recorded_close() -> None:
            closed.append(name)
            close()

        if name == "openvino":
            monkeypatch.setattr(engine, "run", broken_run)
            monkeypatch.setattr(engine, "close", recorded_close)
        return engine

    monkeypatch.setattr(selection, "construct_engine", construct)
    opened = open_engine(bundle, EngineOptions(precision="fp32"))
    opened.engine.close()
    assert (opened.engine.name, closed) == ("onnxruntime", ["openvino"])
    assert opened.rejected[0].cause == "golden_check"
    assert "logits differ by" in str(opened.rejected[0])
    with pytest.raises(NoEngineError, match=r"openvino in fp32: .*logits differ by"):
        open_engine(bundle, EngineOptions(engine="openvino", precision="fp32"))


def test_an_engine_that_crashed_workers_is_not_opened(bundle: Bundle) -> None:
    announced: list[str] = []
    skipped = ["openvino in bf16", "openvino in fp32"]
    opened = open_engine(bundle, EngineOptions(), trying=announced.append, skipped=skipped)
    opened.engine.close()
    assert opened.engine.name == "onnxruntime"
    assert [each.cause for each in opened.rejected] == ["crashed", "crashed"]
    assert announced == [*skipped, "onnxruntime in fp32"]


def test_an_error_of_the_progress_receiver_is_not_a_rejection(bundle: Bundle) -> None:
    def closed_channel(engine: str) -> None:
        raise BrokenPipeError(engine)

    with pytest.raises(BrokenPipeError):
        open_engine(bundle, EngineOptions(), trying=closed_channel)


@pytest.mark.parametrize(
    ("missing", "installed", "hint"),
    [
        ("openvino", "onnxruntime", "pip install vitserve"),
        ("onnxruntime", "openvino", r"pip install 'vitserve\[onnxruntime\]'"),
    ],
)
def test_either_cpu_engine_serves_without_the_other(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, missing: str, installed: str, hint: str
) -> None:
    without(missing, monkeypatch)
    opened = open_engine(bundle, EngineOptions(), first=(missing, "fp32"))
    opened.engine.close()
    assert opened.engine.name == installed
    assert {each.cause for each in opened.rejected} == {"unavailable"}
    with pytest.raises(NoEngineError, match=rf"{missing} is not installed \(.*\): {hint}"):
        open_engine(bundle, EngineOptions(engine=missing))


def test_missing_artifacts_and_unknown_engines_are_named(bundle: Bundle) -> None:
    with pytest.raises(NoEngineError, match="no artifact for engine 'onnxruntime' in precision 'bf16'"):
        open_engine(bundle, EngineOptions(engine="onnxruntime", precision="bf16"))
    with pytest.raises(EngineUnavailableError, match="unknown engine: tpu"):
        construct_engine("tpu", "fp32", bundle.path / "model.onnx", EngineOptions())


def test_a_rejection_reads_as_one_line() -> None:
    rejection = EngineRejection("openvino", "bf16", "unavailable", "this CPU has no bf16 arithmetic")
    assert str(rejection) == "openvino in bf16: this CPU has no bf16 arithmetic"
