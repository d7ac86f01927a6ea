"""What holds of the repository as a whole: who imports whom, and that the prose agrees with the code."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.settings import Settings, SettingsError
from tests.conftest import ROOT
from vitserve import __version__, app

# Folder or file → the folders and files of ours that it may import. Imports point one way.
MAY_IMPORT = {
    "model": {"model"},
    "export": {"model", "export", "service.engines", "service.machine"},
    "service": {"service", "model.bundle", "model.config", "model.parity", "model.preprocess"},
    "bench": {"bench", "model.bundle", "model.preprocess", "service"},
    "bench/plain_graph.py": {"bench", "export", "model"},  # these two make what they compare with; `vitserve bench` imports neither, and so no torch
    "bench/verify.py": {"bench", "export.evaluation", "export.plan_report", "model", "service"},
    "bench/waterfall.py": {"bench", "export", "model", "service"},
    "vitserve.py": {"service", "export", "model", "bench"},
}
TORCH_FREE = ("model/bundle.py", "model/config.py", "model/parity.py", "model/preprocess.py", "vitserve.py")
OURS = ("model", "export", "service", "bench", "tests", "vitserve")


def sources(part: str) -> list[Path]:
    """The files of a folder, less those that have a line of their own in the table."""
    if part.endswith(".py"):
        return [ROOT / part]
    return [path for path in sorted((ROOT / part).rglob("*.py")) if str(path.relative_to(ROOT)) not in MAY_IMPORT]


def imports(path: Path) -> set[str]:
    """Every module that the file imports, wherever in it; ``from a import b`` as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part: str) -> None:
    for path in sources(part):
        for name in imports(path):
            if name.split(".")[0] in OURS and name not in OURS:
                assert any(f"{name}.".startswith(f"{allowed}.") for allowed in MAY_IMPORT[part]), f"{path} imports {name}"


def test_serving_never_imports_torch() -> None:
    """But for the engine and the decoder that are torch, which are imported when they are asked for."""
    are_torch = {ROOT / "service" / name for name in ("engines/torch_engine.py", "engines/torch_graph.py", "engines/torch_kernels.py", "gpu_decode.py")}
    for path in [*sorted({*sources("service")} - are_torch), *(ROOT / name for name in TORCH_FREE)]:
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "onnx", "onnxscript", "safetensors", "timm"}, path


def test_init_files_are_empty() -> None:
    assert all(path.read_text() == "" for part in ("model", "export", "service", "bench") for path in sources(part) if path.name == "__init__.py")


def modules_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def test_help_imports_no_stage() -> None:
    loaded = modules_after("import vitserve")
    assert not loaded & {"numpy", "torch", "fastapi", "uvicorn", "onnxruntime", "openvino", "PIL", "pydantic"}


@pytest.mark.parametrize("statement", ["import service.engines.open, service.engines.openvino_engine", "import export.build, nncf", "import bench.waterfall"])
def test_nothing_reports_to_anybody(statement: str) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")
    loaded = modules_after(f"{statement}\nimport openvino.tools.ovc")
    assert not [name for name in loaded if name.startswith("openvino_telemetry.")]
    assert "openvino.tools.ovc.telemetry_stub" in loaded


def test_the_service_imports_no_torch() -> None:
    loaded = modules_after("import service.front, service.engine_process, service.engines.onnxruntime_engine, service.engines.openvino_engine")
    assert not loaded & {"torch", "onnx", "onnxscript", "export"}


def test_measuring_imports_no_torch() -> None:
    loaded = modules_after("import bench.command, bench.overload, bench.compare, service.engines.onnxruntime_engine, service.engines.openvino_engine")
    assert not loaded & {"torch", "onnx", "onnxscript", "export", "matplotlib"}


def test_the_supervisor_imports_nothing_heavy() -> None:
    loaded = modules_after("import service.supervisor")
    assert not loaded & {"numpy", "torch", "fastapi", "uvicorn", "onnxruntime", "openvino", "PIL", "pydantic", "prometheus_client", "typer"}


def test_a_front_imports_no_engine() -> None:
    assert not modules_after("import service.front") & {"onnxruntime", "openvino"}


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
        ({"engine": "tpu"}, "engine is 'tpu'; it must be one of auto, tensorrt, onnxruntime-cuda, torch, openvino, onnxruntime"),
        ({"engine": "onnxruntime", "precision": "bf16"}, "engine onnxruntime has no bf16; it has fp32, int8"),
        ({"engine": "tensorrt", "precision": "int8"}, "engine tensorrt has no int8; it has bf16, fp16, fp8"),
        ({"engine": "onnxruntime-cuda", "plan_folder": "none"}, "engine onnxruntime-cuda needs a plan_folder, which is none"),
        ({"engine": "openvino", "torch_compile": True}, "torch_compile is of engine torch, and engine is openvino"),
        ({"engine": "openvino", "precision": "fp16"}, "engine openvino has no fp16; it has fp32, bf16, int8"),
        ({"slots": 4, "max_images": 4}, "4 slots cannot fill 1 lanes with batches of 8"),
        ({"slots": 32}, "max_images is 64, but each of 1 fronts has only 32 slots for them"),
        ({"workers": 8}, "max_images is 64, but each of 8 fronts has only 32 slots for them"),
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
    assert "vitserve: 4 slots cannot fill 1 lanes with batches of 8" in result.output


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
            assert not re.search(r"/(work|root|home)/\w|https?://(?!127\.0\.0\.1|localhost)[\w.-]*(pypi|npm)[\w.-]*", path.read_text()), name
