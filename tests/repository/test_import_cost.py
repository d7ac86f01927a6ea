"""What each part imports when it starts, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

ENGINES = "vitserve.service.engines.onnxruntime_engine, vitserve.service.engines.openvino_engine"
TORCH = {"torch", "onnx", "onnxscript"}
HEAVY = {"numpy", "torch", "fastapi", "uvicorn", "onnxruntime", "openvino", "PIL", "pydantic"}
OPEN_OPENVINO = """
from vitserve.service.engines.openvino_engine import OpenVinoEngine
from vitserve.service.settings import DEFAULT_BUNDLE
OpenVinoEngine(DEFAULT_BUNDLE / "model.onnx", "fp32", 1, 1, 1)
"""
IMPORT_NNCF = """
import numpy
from vitserve.export.quantize import int8
int8._nncf(numpy.zeros((1, 16, 16, 3), numpy.uint8), smooth=True)
"""


def modules_after(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys\n{statement}\nprint(*sys.modules)"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def test_help_imports_no_stage() -> None:
    assert not modules_after("import vitserve.cli.main") & HEAVY


def test_the_supervisor_imports_nothing_heavy() -> None:
    loaded = modules_after("import vitserve.service.supervisor.launch")
    assert not loaded & (HEAVY | {"prometheus_client", "typer"})


def test_an_http_worker_imports_no_engine_and_no_grpc() -> None:
    loaded = modules_after("import vitserve.service.http_worker.main")
    assert not loaded & {"onnxruntime", "openvino", "grpc", "google.protobuf"}


def test_serving_imports_no_torch() -> None:
    workers = "vitserve.service.http_worker.main, vitserve.service.engine_worker.main"
    loaded = modules_after(f"import {workers}, {ENGINES}")
    assert not loaded & {*TORCH, "vitserve.export"}


def test_measuring_imports_no_torch() -> None:
    tools = "vitserve.bench.command, benchmarks.http.__main__, benchmarks.compare"
    loaded = modules_after(f"import {tools}, {ENGINES}")
    assert not loaded & {*TORCH, "vitserve.export", "matplotlib"}


@pytest.mark.parametrize("statement", [OPEN_OPENVINO, f"{IMPORT_NNCF}\n{OPEN_OPENVINO}"])
def test_openvino_and_nncf_report_no_usage(statement: str) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")
    loaded = modules_after(f"{statement}\nimport openvino.tools.ovc")
    assert not [name for name in loaded if name.startswith("openvino_telemetry.")]
    assert "openvino.tools.ovc.telemetry_stub" in loaded


def test_the_client_imports_only_httpx() -> None:
    loaded = modules_after("import vitserve.client")
    assert not loaded & {*HEAVY, *TORCH}
    assert {name for name in loaded if name.startswith("vitserve.")} == {
        f"vitserve.client{module}" for module in ("", ".clients", ".errors", ".results", ".steps")
    }


def test_importing_an_engine_has_no_side_effect() -> None:
    loaded = modules_after("import vitserve.service.engines.selection, vitserve.service.engines.openvino_engine")
    assert not loaded & {"openvino", "openvino_telemetry"}
