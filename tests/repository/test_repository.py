"""What holds of the repository as a whole: who imports whom, and that the prose agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from vitserve import __version__


def modules_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_help_imports_no_stage() -> None:
    loaded = modules_after("import vitserve.cli.main")
    assert not loaded & {"numpy", "torch", "fastapi", "uvicorn", "onnxruntime", "openvino", "PIL", "pydantic"}


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


@pytest.mark.parametrize("statement", [OPEN_OPENVINO, IMPORT_NNCF, f"{IMPORT_NNCF}\n{OPEN_OPENVINO}"])
def test_nothing_reports_usage(statement: str) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")
    loaded = modules_after(f"{statement}\nimport openvino.tools.ovc")
    assert not [name for name in loaded if name.startswith("openvino_telemetry.")]
    assert "openvino.tools.ovc.telemetry_stub" in loaded


def test_importing_an_engine_changes_no_other_module() -> None:
    loaded = modules_after("import vitserve.service.engines.selection, vitserve.service.engines.openvino_engine")
    assert not loaded & {"openvino", "openvino_telemetry"}


def test_the_service_imports_no_torch() -> None:
    loaded = modules_after(
        "import vitserve.service.http_worker.main, vitserve.service.engine_worker.batch_loop, vitserve.service.engines.onnxruntime_engine, vitserve.service.engines.openvino_engine"
    )
    assert not loaded & {"torch", "onnx", "onnxscript", "export"}


def test_measuring_imports_no_torch() -> None:
    loaded = modules_after(
        "import vitserve.bench.command, benchmarks.overload, benchmarks.compare, vitserve.service.engines.onnxruntime_engine, vitserve.service.engines.openvino_engine"
    )
    assert not loaded & {"torch", "onnx", "onnxscript", "export", "matplotlib"}


def test_the_supervisor_imports_nothing_heavy() -> None:
    loaded = modules_after("import vitserve.service.supervisor.supervisor")
    assert not loaded & {
        "numpy",
        "torch",
        "fastapi",
        "uvicorn",
        "onnxruntime",
        "openvino",
        "PIL",
        "pydantic",
        "prometheus_client",
        "typer",
    }


def test_a_front_imports_no_engine() -> None:
    assert not modules_after("import vitserve.service.http_worker.main") & {"onnxruntime", "openvino"}


def test_the_changelog_speaks_of_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_gives_its_two_commands_by_line_20() -> None:
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:20])
    assert "make serve" in head
    assert "curl" in head
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b", (ROOT / "README.md").read_text())) <= targets


def test_nothing_tracked_names_a_machine_or_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".lua", ".json"} or path.name in {"Makefile", "run"}:
            assert not re.search(
                r"/(work|root|home)/\w|https?://(?!127\.0\.0\.1|localhost)[\w.-]*(pypi|npm)[\w.-]*", path.read_text()
            ), name
