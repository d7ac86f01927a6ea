"""What holds of the repository as a whole: who imports whom, and that the prose agrees with the code."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.support.paths import ROOT
from vitserve import __version__
from vitserve.cli.main import app
from vitserve.service.settings import Settings, SettingsError


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


@pytest.mark.parametrize(
    "statement",
    [
        "import vitserve.service.engines.selection, vitserve.service.engines.openvino_engine",
        "import vitserve.export.build_bundle, nncf",
        "import benchmarks.waterfall",
    ],
)
def test_nothing_reports_to_anybody(statement: str) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")
    loaded = modules_after(f"{statement}\nimport openvino.tools.ovc")
    assert not [name for name in loaded if name.startswith("openvino_telemetry.")]
    assert "openvino.tools.ovc.telemetry_stub" in loaded


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
    loaded = modules_after("import vitserve.service.supervisor.launch")
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


def test_settings_are_a_table_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for each in dataclasses.fields(Settings):
        row = f"| `{each.name}` | `{each.default if each.default != '' else ' '}` | {each.metadata['help']} |"
        assert row in readme, f"README's table lacks or misstates:\n{row}"


def test_settings_are_options_and_environment_variables() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for each in dataclasses.fields(Settings):
        assert f"--{each.name.replace('_', '-')}" in shown
        assert f"VITSERVE_{each.name.upper()}" in shown


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slots": 0}, "slots is 0; it must be at least 1"),
        ({"threads": -1}, "threads is -1"),
        ({"port": 65536}, "port is 65536; it must be from 0 to 65535"),
        (
            {"engine": "tpu"},
            "engine is 'tpu'; it must be one of auto, tensorrt, onnxruntime-cuda, torch, openvino, onnxruntime",
        ),
        ({"engine": "onnxruntime", "precision": "bf16"}, "engine onnxruntime has no bf16; it has fp32, int8"),
        ({"engine": "tensorrt", "precision": "int8"}, "engine tensorrt has no int8; it has bf16, fp16, fp8"),
        ({"engine": "onnxruntime-cuda", "plan_dir": "none"}, "engine onnxruntime-cuda needs a plan_dir, which is none"),
        ({"engine": "openvino", "torch_compile": True}, "torch_compile is of engine torch, and engine is openvino"),
        ({"engine": "openvino", "precision": "fp16"}, "engine openvino has no fp16; it has fp32, bf16, int8"),
        ({"slots": 4, "max_images": 4}, "4 slots cannot fill 1 streams with batches of 8"),
        ({"slots": 32}, "max_images is 64, but each of 1 HTTP workers has only 32 slots for them"),
        ({"workers": 8}, "max_images is 64, but each of 8 HTTP workers has only 32 slots for them"),
        ({"engines": -1}, "engines is -1; it must be 0 (choose for me) or more"),
        ({"hang_seconds": 0.0}, "hang_seconds is 0.0; it must be above 0"),
    ],
)
def test_contradictions_refuse_to_start(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        Settings(**values)  # type: ignore[arg-type]


def test_the_command_line_refuses_them_with_a_clear_line() -> None:
    result = CliRunner().invoke(app, ["serve", "--slots", "4", "--max-images", "4"])
    assert result.exit_code == 2
    assert "vitserve: 4 slots cannot fill 1 streams with batches of 8" in result.output


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
