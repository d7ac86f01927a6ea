"""What our code asks of TensorRT and CUDA exists there, with those arguments: type-checked against the genuine bindings, which need no GPU for that."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tensorrt_stubs import Missing, make_stubs

# Each line asks for something that was there in an older version, or never was.
PLANTED = """
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
"""


def sources() -> list[Path]:
    """Every file of ours that imports one of those libraries."""
    found = []
    for path in [*ROOT.glob("service/**/*.py"), *ROOT.glob("export/**/*.py"), ROOT / "vitserve.py"]:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
        if imported & {"tensorrt", "cuda"}:
            found.append(path)
    return found


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """mypy's, about our files and the planted one, with the bindings' own signatures."""
    folder = tmp_path_factory.mktemp("bindings")
    try:
        stubs = make_stubs(folder)
    except Missing as missing:
        pytest.skip(str(missing))
    planted = folder / "planted.py"
    planted.write_text(PLANTED)
    # Only what is named is read, and so has a type; the rest is checked elsewhere.
    arguments = ["--config-file=", "--follow-imports=skip", "--disable-error-code=var-annotated", f"--cache-dir={folder / 'cache'}"]
    files = [*(str(each.relative_to(ROOT)) for each in sources()), str(planted), *map(str, stubs.rglob("*.pyi"))]
    environment = os.environ | {"MYPYPATH": str(stubs)}
    done = subprocess.run([sys.executable, "-m", "mypy", *arguments, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert str(planted) in done.stdout, "nothing was checked"
    return [line for line in done.stdout.splitlines() if ": error:" in line and not line.startswith(str(stubs))]


def test_all_that_our_code_uses_of_tensorrt_and_cuda_is_there(complaints: list[str]) -> None:
    assert len(sources()) >= 3
    assert [each for each in complaints if "planted.py" not in each] == []


def test_what_is_not_there_would_be_found(complaints: list[str]) -> None:
    wrong = [number for number, line in enumerate(PLANTED.splitlines(), 1) if line.endswith("# wrong")]
    found = {int(each.partition("planted.py:")[2].partition(":")[0]) for each in complaints if "planted.py" in each}
    assert sorted(found) == wrong
