"""TensorRT for RTX: the choice between the two libraries, and what the engine does differently with this one."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu import tensorrt_rtx
from tests.support.gpu.fixtures import Gpu, Rtx
from tests.support.gpu.tensorrt_builder import LogSeverity
from tests.support.gpu.tensorrt_rtx import RtxEngine
from vitserve.model.bundle.bundle import GRAPH, Bundle
from vitserve.model.bundle.parity import compare
from vitserve.service.engines.engine import EngineUnavailableError
from vitserve.service.engines.gpu_artifacts import PlanOptions, report_beside
from vitserve.service.engines.tensorrt import provider
from vitserve.service.engines.tensorrt.provider import DATA_CENTER, RTX, RTX_CAPABILITIES, Provider
from vitserve.service.engines.tensorrt.target import Target


@pytest.fixture
def rtx_plan(rtx_gpu: Gpu, bundle: Bundle, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.plan"
    rtx_gpu.build.plan_for(bundle.path / GRAPH, path, rtx_gpu.options)
    return path


def test_a_plan_reproduces_the_source(rtx_gpu: Gpu, rtx_plan: Path, bundle: Bundle) -> None:
    golden, engine = bundle.golden(), rtx_gpu.open_plan(rtx_plan)
    outputs = engine.run(0, golden.pixels[:3])
    assert compare(outputs, type(outputs)(*(array[:3] for array in golden.reference))).failure("bf16") is None
    engine.close()
    assert (rtx_gpu.device.allocated, rtx_gpu.device.streams) == ({}, {})
    report = report_beside(rtx_plan)
    assert report is not None
    assert (report.library, report.capabilities) == ("rtx", ((8, 9),)), "for the GPU of this machine"


def test_compiled_kernels_are_kept_for_the_next_start(rtx_gpu: Gpu, rtx_plan: Path, tmp_path: Path) -> None:
    def opened() -> bool:
        """Whether kernels of an earlier start were used, by every context."""
        RtxEngine.settings.clear()
        rtx_gpu.open_plan(rtx_plan, cache_dir=str(tmp_path)).close()
        (cache,) = {settings.cache for settings in RtxEngine.settings}
        assert cache is not None
        return cache.loaded

    assert not opened()
    (kept,) = tmp_path.glob("*-nvidia-l4-sm89-rtx1.7.1.116.jit")
    assert opened()
    kept.write_bytes(b"kernels of another driver")
    assert not opened()
    assert kept.read_bytes() == b"kernels of NVIDIA L4", "replaced"


def test_a_directory_that_cannot_be_written_costs_only_time(
    rtx_gpu: Gpu, rtx_plan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    rtx_gpu.open_plan(rtx_plan, cache_dir=str(tmp_path / "file" / "cache")).close()
    assert "compiled kernels cannot be kept" in caplog.text
    rtx_gpu.open_plan(rtx_plan).close()
    assert not list(tmp_path.glob("*.jit")), "without a directory nothing is kept"


def test_only_a_selection_of_sizes_is_compiled(
    rtx_gpu: Gpu, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    prepare = rtx_gpu.engine._Program.prepare

    def noted(self: Any, size: int) -> None:
        sizes.append(size)
        prepare(self, size)

    monkeypatch.setattr(rtx_gpu.engine._Program, "prepare", noted)
    path = tmp_path / "b12.plan"
    rtx_gpu.build.plan_for(bundle.path / GRAPH, path, replace(rtx_gpu.options, max_batch=12))
    rtx_gpu.open_plan(path, max_batch=12).close()
    assert sizes == [12, 8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": "1.6"}, r"the plan is of TensorRT for RTX 1\.6; 1\.7\.1\.116 is installed"),
        ({"library": "data-center"}, "the plan is for TensorRT; TensorRT for RTX is used here"),
        ({"capabilities": ((8, 0), (12, 0))}, "the plan is for sm80, sm120; the NVIDIA L4 is sm89"),
    ],
)
def test_a_plan_for_another_machine_is_not_loaded(
    rtx_gpu: Gpu, rtx_plan: Path, changes: dict[str, Any], sentence: str
) -> None:
    report = report_beside(rtx_plan)
    assert report is not None
    with pytest.raises(EngineUnavailableError, match=rf"tiny\.plan cannot be used: {sentence}"):
        rtx_gpu.engine.TensorRtEngine(rtx_plan, replace(report, **changes), "bf16", 1, 4)
    assert rtx_gpu.device.allocated == {}


def test_tensorrt_decides_about_a_plan_whose_report_is_wrong(rtx_gpu: Gpu, rtx_plan: Path) -> None:
    rtx_gpu.device.capability = (8, 6)
    report = report_beside(rtx_plan)
    assert report is not None
    with pytest.raises(EngineUnavailableError, match=r"TensorRT rejects it: .*compute capability of this device"):
        rtx_gpu.engine.TensorRtEngine(rtx_plan, replace(report, capabilities=((8, 6),)), "bf16", 1, 4)


@pytest.mark.parametrize(
    ("installed", "capability", "chosen"),
    [
        ({RTX}, (8, 9), RTX),
        ({RTX}, (9, 0), RTX),  # which then says that it does not support this GPU
        ({DATA_CENTER}, (8, 9), DATA_CENTER),
        ({RTX, DATA_CENTER}, (8, 9), RTX),
        ({RTX, DATA_CENTER}, (9, 0), DATA_CENTER),
        ({RTX, DATA_CENTER}, (10, 0), DATA_CENTER),
        ({RTX, DATA_CENTER}, None, RTX),
    ],
)
def test_the_library_is_chosen_by_what_is_installed_and_by_the_gpu(
    monkeypatch: pytest.MonkeyPatch, installed: set[Provider], capability: tuple[int, int] | None, chosen: Provider
) -> None:
    monkeypatch.setattr(Provider, "installed", property(lambda self: self in installed))
    monkeypatch.setattr(provider, "_capability_of_the_gpu", lambda: capability)
    assert provider.choose() is chosen


def test_one_of_the_libraries_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Provider, "installed", property(lambda self: False))
    with pytest.raises(ImportError, match="'tensorrt' or 'tensorrt_rtx_bindings'"):
        provider.choose()
    with pytest.raises(EngineUnavailableError, match=r"pip install 'vitserve\[tensorrt-rtx\]'"):
        provider.require_rtx()


def test_a_machine_is_described_without_ambiguity() -> None:
    slugs = {Target("NVIDIA L4", (8, 9), "1.7", library.library).slug for library in (RTX, DATA_CENTER)}
    assert slugs == {"nvidia-l4-sm89-rtx1.7", "nvidia-l4-sm89-trt1.7"}


def test_the_double_has_only_what_the_genuine_library_has(rtx: Rtx) -> None:
    """Methods with their arguments, properties, and enumerations, of the classes that it has in addition."""
    checked = 0
    for name, double in tensorrt_rtx.NAMES.items():
        genuine = getattr(rtx.library, name)
        if issubclass(double, Enum):
            assert {member.name for member in double} <= genuine.__members__.keys()
            continue
        for member, value in vars(double).items():
            if member.startswith("_") or not (callable(value) or isinstance(value, property)):
                continue
            if member == "engine":  # of the double itself
                continue
            documented = str(getattr(genuine, member).__doc__)
            if callable(value):
                arguments = value.__code__.co_varnames[1 : value.__code__.co_argcount]
                assert all(f"{argument}:" in documented for argument in arguments), (name, member, documented)
                checked += 1
    assert checked >= 8
    assert {each.name for each in tensorrt_rtx.ComputeCapability} == rtx.library.ComputeCapability.__members__.keys()
    listed = {f"SM{major}{minor}" for major, minor in RTX_CAPABILITIES}
    assert listed == rtx.library.ComputeCapability.__members__.keys() - {"NONE", "CURRENT"}


def test_the_provider_says_for_which_gpus_the_builder_builds(rtx: Rtx) -> None:
    """Not the module, because TensorRT for data centers may get the same names."""
    provider.set_target(DATA_CENTER, rtx.library, None, ())
    with pytest.raises(AssertionError, match="builds for its own GPU"):
        provider.set_target(DATA_CENTER, rtx.library, None, ((8, 9),))


def test_the_genuine_runtime_rejects_what_is_no_plan(rtx: Rtx, bundle: Bundle, tmp_path: Path) -> None:
    """As far as it goes without a GPU: the header is read before the driver is needed."""
    path = tmp_path / "tiny.plan"
    rtx.build.plan_for(bundle.path / GRAPH, path, PlanOptions("bf16", 1, ((8, 9),)))
    content = path.read_bytes()
    runtime = rtx.library.Runtime(rtx.logger.LOGGER)
    for plan, reason in ((content, "cudaError"), (content[:-1], "blobSize"), (b"x" * 5000, "kEXPECTED_MAGIC_TAG")):
        with pytest.raises(EngineUnavailableError, match=rf"a\.plan cannot be used: TensorRT rejects it: .*{reason}"):
            rtx.engine._deserialize(runtime, "a.plan", plan)


def test_errors_of_one_engine_are_not_mixed_with_those_of_another(rtx_gpu: Gpu) -> None:
    """TensorRT keeps the first logger of the process, so there is one for all engines."""
    logger = rtx_gpu.engine.LOGGER
    error = LogSeverity.ERROR
    with logger.collected() as first:
        logger.log(error, "one")
    with logger.collected() as second:
        logger.log(error, "two")
    logger.log(error, "three")
    assert (first.errors, second.errors) == (["one"], ["two"])
