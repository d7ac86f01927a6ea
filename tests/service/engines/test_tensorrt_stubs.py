"""Our code uses TensorRT, CUDA and NVML correctly: type-checked against the real bindings, which needs no GPU."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import pytest

from tests.support.gpu import cuda, tensorrt
from tests.support.paths import ROOT
from tests.support.tensorrt_stubs import StubsUnavailableError, make_stubs

# Each line marked "wrong" uses a name or an argument that the current bindings do not have.
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
    """Our files that import one of those libraries."""
    files = []
    for path in [*ROOT.glob("service/**/*.py"), *ROOT.glob("export/**/*.py"), *ROOT.glob("vitserve/cli/*.py")]:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
        if imported & {"tensorrt", "cuda", "pynvml"}:
            files.append(path)
    return files


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return make_stubs(tmp_path_factory.mktemp("bindings"))
    except StubsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def type_errors(stubs: Path) -> list[str]:
    """What mypy reports for our files and the planted one, with the bindings' own signatures."""
    directory = stubs.parent
    planted = directory / "planted.py"
    planted.write_text(PLANTED)
    # Only the named files are read. Everything else has type Any here and is checked elsewhere.
    arguments = [
        "--config-file=",
        "--follow-imports=skip",
        "--disable-error-code=var-annotated",
        f"--cache-dir={directory / 'cache'}",
    ]
    files = [*(str(path.relative_to(ROOT)) for path in sources()), str(planted), *map(str, stubs.rglob("*.py*"))]
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


def test_our_code_uses_only_what_the_bindings_have(type_errors: list[str]) -> None:
    assert len(sources()) >= 4
    assert [line for line in type_errors if "planted.py" not in line] == []


def test_planted_mistakes_are_found(type_errors: list[str]) -> None:
    wrong = [number for number, line in enumerate(PLANTED.splitlines(), 1) if line.endswith("# wrong")]
    planted = [line for line in type_errors if "planted.py" in line]
    assert sorted({int(line.partition("planted.py:")[2].partition(":")[0]) for line in planted}) == wrong


def real_methods(stubs: Path) -> dict[str, dict[str, list[list[str]]]]:
    """Class → method or attribute → the parameters' names of each overload, without self."""
    classes: dict[str, dict[str, list[list[str]]]] = {}
    for definition in ast.parse((stubs / "tensorrt" / "__init__.pyi").read_text()).body:
        if isinstance(definition, ast.ClassDef):
            members = classes.setdefault(definition.name, {})
            for member in definition.body:
                if isinstance(member, ast.FunctionDef):
                    members.setdefault(member.name, []).append([argument.arg for argument in member.args.args][1:])
                elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    members[member.target.id] = []
    return classes


def test_the_tensorrt_double_has_only_what_tensorrt_has(stubs: Path) -> None:
    """Methods, properties and enumerations are compared. The double's data attributes are for tests."""
    real = real_methods(stubs)
    checked = 0
    for kind in tensorrt.TYPES:
        for name, member in vars(kind).items():
            is_member_of_enum = issubclass(kind, Enum) and name in kind.__members__
            if isinstance(member, property) or is_member_of_enum:
                assert name in real[kind.__name__], f"{kind.__name__}.{name}"
            elif inspect.isfunction(member) and not name.startswith("_"):
                ours, overloads = parameters(member)[1:], real[kind.__name__][name]
                assert any(ours == overload[: len(ours)] for overload in overloads), (kind, name, ours, overloads)
                checked += 1
    assert checked >= 25


def test_the_cuda_double_has_only_what_cuda_has() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for call in cuda.CALLS:
        assert parameters(getattr(runtime, call)) == parameters(getattr(cuda.Device, call))[1:], call
    for enumeration in cuda.ENUMERATIONS:
        real = {member.name: int(member) for member in getattr(runtime, enumeration.__name__)}
        assert {member.name: int(member) for member in enumeration}.items() <= real.items()


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)
