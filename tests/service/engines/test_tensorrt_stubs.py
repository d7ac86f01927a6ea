"""What our code asks of TensorRT, CUDA and NVML exists there, with those arguments: type-checked against the genuine bindings, which need no GPU for that."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from tests.support import gpu_double
from tests.support.paths import ROOT
from tests.support.tensorrt_stubs import Missing, make_stubs

# Each line asks for something that was there in an older version, or never was.
PLANTED = """
import pynvml
import tensorrt as trt
from cuda.bindings import runtime
builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
config = builder.create_builder_config()
config.set_flag(trt.BuilderFlag.FP16)  # wrong
config.max_workspace_size = 1  # wrong
config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size=1)  # wrong
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))  # wrong
builder.build_cuda_engine(network)  # wrong
builder.build_serialized_network(network, config)
def run(context: trt.IExecutionContext) -> None:
    context.execute_async_v2([], 0)  # wrong
    context.execute_async_v3(stream=0)  # wrong
    context.execute_async_v3(0)
runtime.cudaMalloc(1)
runtime.cudaMalloc(1, 2)  # wrong
runtime.cudaMalloc2(1)  # wrong
runtime.cudaError_t.cudaErrorNothing  # wrong
pynvml.nvmlDeviceGetMemory(0)  # wrong
pynvml.nvmlDeviceGetClockInfo(0)  # wrong
pynvml.NVML_CLOCK_SHADER  # wrong
"""


def sources() -> list[Path]:
    """Every file of ours that imports one of those libraries."""
    found = []
    for path in [*ROOT.glob("service/**/*.py"), *ROOT.glob("export/**/*.py"), *ROOT.glob("vitserve/cli/*.py")]:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
        if imported & {"tensorrt", "cuda", "pynvml"}:
            found.append(path)
    return found


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return make_stubs(tmp_path_factory.mktemp("bindings"))
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def complaints(stubs: Path) -> list[str]:
    """mypy's, about our files and the planted one, with the bindings' own signatures."""
    directory = stubs.parent
    planted = directory / "planted.py"
    planted.write_text(PLANTED)
    # Only what is named is read, and so has a type; the rest is checked elsewhere.
    arguments = [
        "--config-file=",
        "--follow-imports=skip",
        "--disable-error-code=var-annotated",
        f"--cache-dir={directory / 'cache'}",
    ]
    files = [*(str(each.relative_to(ROOT)) for each in sources()), str(planted), *map(str, stubs.rglob("*.py*"))]
    environment = os.environ | {"MYPYPATH": str(stubs)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments, *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert str(planted) in done.stdout, "nothing was checked"
    return [line for line in done.stdout.splitlines() if ": error:" in line and not line.startswith(str(stubs))]


def test_all_that_our_code_uses_of_tensorrt_and_cuda_is_there(complaints: list[str]) -> None:
    assert len(sources()) >= 4
    assert [each for each in complaints if "planted.py" not in each] == []


def test_what_is_not_there_would_be_found(complaints: list[str]) -> None:
    wrong = [number for number, line in enumerate(PLANTED.splitlines(), 1) if line.endswith("# wrong")]
    found = {int(each.partition("planted.py:")[2].partition(":")[0]) for each in complaints if "planted.py" in each}
    assert sorted(found) == wrong


def genuine_methods(stubs: Path) -> dict[str, dict[str, list[list[str]]]]:
    """Class → method or attribute → the parameters' names of each overload, without self."""
    found: dict[str, dict[str, list[list[str]]]] = {}
    for each in ast.parse((stubs / "tensorrt" / "__init__.pyi").read_text()).body:
        if isinstance(each, ast.ClassDef):
            members = found.setdefault(each.name, {})
            for part in each.body:
                if isinstance(part, ast.FunctionDef):
                    members.setdefault(part.name, []).append([argument.arg for argument in part.args.args][1:])
                elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    members[part.target.id] = []
    return found


def test_the_double_has_nothing_that_the_genuine_bindings_lack(stubs: Path) -> None:
    """Its own extras, for tests to steer by, are data; whatever our code could call is compared."""
    genuine = genuine_methods(stubs)
    checked = 0
    for kind in gpu_double.TYPES:
        for name, member in vars(kind).items():
            if isinstance(member, property):
                assert name in genuine[kind.__name__], f"{kind.__name__}.{name}"
            elif inspect.isfunction(member) and not name.startswith("_"):
                ours = list(inspect.signature(member).parameters)[1:]
                theirs = genuine[kind.__name__][name]
                assert any(ours == each[: len(ours)] for each in theirs), (
                    f"{kind.__name__}.{name}: {ours}; genuine: {theirs}"
                )
                checked += 1
            elif issubclass(kind, Enum) and name in kind.__members__:
                assert name in genuine[kind.__name__], f"{kind.__name__}.{name}"
    assert checked >= 25
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for call in gpu_double.CALLS:
        assert (
            list(inspect.signature(getattr(runtime, call)).parameters)
            == list(inspect.signature(getattr(gpu_double.Device, call)).parameters)[1:]
        ), call
    for enumeration in (gpu_double.cudaError_t, gpu_double.cudaMemcpyKind, gpu_double.cudaStreamCaptureMode):
        assert {each.name: int(each) for each in enumeration}.items() <= {
            each.name: int(each) for each in getattr(runtime, enumeration.__name__)
        }.items()
