"""`vitserve export --plan`: plans in the bundle, built by the genuine TensorRT for RTX on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.gpu.fixtures import Rtx
from tests.support.networks import TINY, checkpoint
from tests.support.paths import ROOT
from vitserve.cli.main import app
from vitserve.export.artifacts import ExportError
from vitserve.export.build_bundle import build_bundle
from vitserve.export.graph.tensorrt_attention import UnsupportedAttentionError
from vitserve.export.tensorrt import bundle_plans
from vitserve.export.tensorrt.bundle_plans import PlanRequest, plan_request
from vitserve.export.workspace import Workspace
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.service import machine
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.gpu_artifacts import PlanOptions
from vitserve.service.engines.selection import NoEngineError, open_engine
from vitserve.service.engines.tensorrt.provider import Provider

AMPERE_AND_LATER = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


@pytest.fixture(scope="module")
def planned(rtx: Rtx, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("planned") / "bundle"
    return build_bundle(checkpoint(), path, name="tiny", plans=plan_request("rtx:sm75,sm89"))


def test_a_bundle_has_a_plan_for_every_requested_gpu(planned: Bundle, rtx: Rtx) -> None:
    plans = {artifact.path: artifact for artifact in open_bundle(planned.path).manifest.artifacts if artifact.plan}
    assert plans.keys() == {"bf16-rtx.plan", "fp16-rtx.plan"}
    for name, capabilities in (("bf16-rtx.plan", ((8, 9),)), ("fp16-rtx.plan", ((7, 5),))):
        artifact = plans[name]
        assert (artifact.engine, artifact.files, artifact.simulated) == ("tensorrt", (name,), True)
        assert artifact.parity.failure(artifact.precision) is None
        report = artifact.plan
        assert report is not None
        assert report.fused
        assert (report.capabilities, report.version) == (capabilities, rtx.library.__version__)
        assert [(each.max_batch, len(each.attention)) for each in report.profiles] == [
            (size, TINY.depth) for size in (1, 8, 64)
        ]
        assert report.size_bytes == (planned.path / name).stat().st_size
    assert {path.suffix for path in planned.path.iterdir()} == {".json", ".txt", ".npz", ".onnx", ".data", ".plan"}


def test_inspect_prints_how_the_plans_were_built(planned: Bundle) -> None:
    output = CliRunner().invoke(app, ["inspect", str(planned.path)]).stdout
    line = next(line for line in output.splitlines() if line.startswith("plan, tensorrt in bf16: "))
    assert line.startswith(
        "plan, tensorrt in bf16: 2 of 2 attention layers are fused (input: BFloat16) in profiles for"
    )
    assert "kernels" in line
    assert "by TensorRT for RTX 1.7" in line
    assert line.endswith("for sm89")


def test_without_a_gpu_the_plan_is_rejected_and_the_cpu_serves(
    planned: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoEngineError, match=r"tensorrt in bf16: CUDA finds no device: .*driver"):
        open_engine(planned, EngineOptions(engine="tensorrt"))
    monkeypatch.setattr(machine, "gpus", lambda: ["0"])
    opened = open_engine(planned, EngineOptions())
    opened.engine.close()
    assert [(each.engine, each.precision, each.cause) for each in opened.rejected[:2]] == [
        ("tensorrt", "bf16", "unavailable"),
        ("tensorrt", "fp16", "unavailable"),
    ]
    assert opened.engine.name in ("openvino", "onnxruntime")


@pytest.mark.parametrize(
    ("text", "capabilities"),
    [("rtx", AMPERE_AND_LATER), ("rtx:sm89", ((8, 9),)), ("rtx:sm120, sm75,sm120", ((12, 0), (7, 5)))],
)
def test_plans_are_requested_by_compute_capability(text: str, capabilities: tuple[tuple[int, int], ...]) -> None:
    assert plan_request(text) == PlanRequest(capabilities)


@pytest.mark.parametrize("text", ["tensorrt", "rtx:", "rtx:sm90", "rtx:8.9", "rtx:sm89,", ""])
def test_a_wrong_request_names_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="expected rtx, or rtx: and a list of sm75, sm80, sm86, sm89, sm120, sm121"):
        plan_request(text)


def test_each_precision_has_one_plan_for_all_gpus_that_have_it() -> None:
    request = PlanRequest(((12, 0), (8, 9), (8, 0), (7, 5)))
    bf16, fp16 = PlanOptions("bf16", 64, ((8, 0), (8, 9), (12, 0))), PlanOptions("fp16", 64, ((7, 5),))
    assert list(bundle_plans._all_options(request, has_fp8=False)) == [bf16, fp16]
    fp8 = PlanOptions("fp8", 64, ((8, 9), (12, 0)))
    assert list(bundle_plans._all_options(request, has_fp8=True)) == [fp8, bf16, fp16]
    assert list(bundle_plans._all_options(PlanRequest(((7, 5),)), has_fp8=True)) == [fp16]


def test_without_the_library_the_export_ends_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Provider, "installed", property(lambda self: False))
    steps: list[str] = []
    with pytest.raises(ExportError, match=r"TensorRT for RTX is not installed, .*'vitserve\[tensorrt-rtx\]'"):
        build_bundle(checkpoint(), tmp_path / "b", name="tiny", plans=plan_request("rtx"), progress=steps.append)
    assert steps == []


def test_attention_without_a_fused_kernel_fails_the_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unsupported(*_: object) -> None:
        raise UnsupportedAttentionError("node_attention has heads of 8 values")

    monkeypatch.setattr(bundle_plans, "_verified", unsupported)
    workspace = Workspace(tmp_path, None, None, None, None, print)  # type: ignore[arg-type]  # not used
    with pytest.raises(ExportError, match="the plan in bf16: node_attention has heads of 8 values"):
        bundle_plans.plan_artifacts(workspace, [], plan_request("rtx"))


@pytest.mark.slow
def test_the_default_model_with_plans_is_small(tmp_path: Path, rtx: Rtx) -> None:
    weights = ROOT / "checkpoints" / "default" / "weights.safetensors"
    arguments = ["export", str(weights), "--output", str(tmp_path / "bundle"), "--plan", "rtx"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert sum(path.stat().st_size for path in (tmp_path / "bundle").iterdir()) <= 30e6
