"""Type stubs of the genuine GPU bindings, made on any machine: what our code may call, with which arguments. Needs a C compiler and the package index, no GPU.

    python -m tests.support.tensorrt_stubs FOLDER

TensorRT's bindings (PyPI: tensorrt_cu13_bindings) are imported with three empty libraries in the place of NVIDIA's, so that no object can be made, but
every class, signature and enumeration is there to be read. CUDA's bindings (cuda-bindings) import without a driver, NVML's (nvidia-ml-py) are plain Python.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = "11.4.0.106"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# What the bindings look up in those libraries when they are imported: factories, which find nothing here.
FACTORIES = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)


class Missing(RuntimeError):
    """This machine cannot make the stubs; the message says what it lacks."""


def make_stubs(directory: Path) -> Path:
    """A directory for MYPYPATH that holds ``tensorrt``, ``cuda.bindings.runtime`` and ``pynvml``. Raises Missing."""
    bindings, stubs = directory / "bindings", directory / "stubs"
    _install(bindings)
    (stubs / "tensorrt").mkdir(parents=True)
    _run(
        [
            sys.executable,
            "-m",
            "pybind11_stubgen",
            "--ignore-all-errors",
            "-o",
            str(directory / "made"),
            "tensorrt_bindings.tensorrt",
        ],
        os.environ | {"PYTHONPATH": str(bindings)},
    )
    text = (directory / "made" / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    version = f'\n__version__: str  # "{VERSION}": of the package around it\n'
    (stubs / "tensorrt" / "__init__.pyi").write_text(
        _readable(text.replace("tensorrt_bindings.tensorrt.", "")) + version
    )
    (stubs / "cuda" / "bindings").mkdir(parents=True)
    for package in (stubs / "cuda", stubs / "cuda" / "bindings"):
        (package / "__init__.pyi").touch()
    (stubs / "cuda" / "bindings" / "runtime.pyi").write_text("\n".join(_of_cuda()))
    import pynvml

    shutil.copy(pynvml.__file__, stubs)  # Python, and its own stub
    return stubs


def _install(bindings: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise Missing("no C compiler is installed")
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(bindings),
            f"tensorrt_cu13_bindings=={VERSION}",
        ]
    )
    source = bindings / "factories.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FACTORIES))
    for library in LIBRARIES:
        made = bindings / "tensorrt_bindings" / f"lib{library}.so.{VERSION.partition('.')[0]}"
        _run([compiler, "-shared", "-fPIC", "-o", str(made), str(source)])


def _readable(text: str) -> str:
    """A few signatures are not Python (an argument called ``in``, one without a default behind one that has it): whoever uses those is rejected."""
    lines = [
        "import builtins",
        *re.sub(r"(-> |[(,] ?\w+: )bool\b", r"\1builtins.bool", text).splitlines(),
    ]  # ``bool`` is one of TensorRT's types there
    while (wrong := _wrong_line(lines)) is not None:
        lines[wrong - 1], replaced = re.subn(r"\(.*\)", "(self, *, unreadable: typing.Never)", lines[wrong - 1])
        if not replaced:
            raise Missing(f"line {wrong} of the stubs made is not Python: {lines[wrong - 1]}")
    return "\n".join(lines)


def _wrong_line(lines: list[str]) -> int | None:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError as error:
        return error.lineno
    return None


def _of_cuda() -> Iterator[str]:
    """Every function with its arguments' names, every enumeration with its members; C tells no more through these bindings."""
    from cuda.bindings import runtime

    yield "import typing\nfrom enum import IntEnum\n"
    for name, value in vars(runtime).items():
        if name.startswith("_") or not name.isidentifier():
            continue
        if isinstance(value, type) and hasattr(value, "__members__"):
            yield f"class {name}(IntEnum):"
            yield from (f"    {member} = {int(number)}" for member, number in value.__members__.items())
        elif isinstance(value, type):
            yield f"class {name}: ..."
        elif isinstance(value, int):
            yield f"{name}: int"
        elif callable(value):
            yield f"def {name}({_arguments(value)}) -> tuple[typing.Any, ...]: ..."


def _arguments(function: Any) -> str:
    try:
        return ", ".join(f"{name}: typing.Any" for name in inspect.signature(function).parameters)
    except ValueError:
        return "*arguments: typing.Any"


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Missing(f"{' '.join(command[:4])} … failed: {(done.stderr or done.stdout).strip()[-500:]}")


if __name__ == "__main__":
    print(make_stubs(Path(sys.argv[1])))  # noqa: T201
