"""Makes type stubs of the real GPU bindings. Needs a C compiler and the package index, but no GPU.

    python -m tests.support.tensorrt_stubs DIRECTORY

TensorRT's bindings (PyPI: tensorrt_cu13_bindings) are imported with three empty libraries instead of NVIDIA's. No
object can be created, but every class, signature and enumeration can be read. CUDA's bindings (cuda-bindings) can be
imported without a driver, and NVML's (nvidia-ml-py) are plain Python.
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
# The functions that the bindings look up in those libraries when they are imported.
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


class StubsUnavailableError(RuntimeError):
    """The stubs cannot be made on this machine. The message names what is missing."""


def make_stubs(directory: Path) -> Path:
    """A directory for MYPYPATH that holds ``tensorrt``, ``cuda.bindings.runtime`` and ``pynvml``.

    Raises StubsUnavailableError.
    """
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
            str(directory / "generated"),
            "tensorrt_bindings.tensorrt",
        ],
        os.environ | {"PYTHONPATH": str(bindings)},
    )
    text = (directory / "generated" / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    version = f'\n__version__: str  # "{VERSION}"\n'  # defined by the package around the bindings
    (stubs / "tensorrt" / "__init__.pyi").write_text(
        _valid_python(text.replace("tensorrt_bindings.tensorrt.", "")) + version
    )
    (stubs / "cuda" / "bindings").mkdir(parents=True)
    for package in (stubs / "cuda", stubs / "cuda" / "bindings"):
        (package / "__init__.pyi").touch()
    (stubs / "cuda" / "bindings" / "runtime.pyi").write_text("\n".join(_cuda_stub()))
    import pynvml

    shutil.copy(pynvml.__file__, stubs)  # plain Python is its own stub
    return stubs


def _install(bindings: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise StubsUnavailableError("no C compiler is installed")
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
        output = bindings / "tensorrt_bindings" / f"lib{library}.so.{VERSION.partition('.')[0]}"
        _run([compiler, "-shared", "-fPIC", "-o", str(output), str(source)])


def _valid_python(text: str) -> str:
    """A few signatures are not valid Python, such as an argument named ``in``. A call of those is a type error."""
    # In the stub ``bool`` is one of TensorRT's types.
    lines = ["import builtins", *re.sub(r"(-> |[(,] ?\w+: )bool\b", r"\1builtins.bool", text).splitlines()]
    while (number := _invalid_line(lines)) is not None:
        lines[number - 1], replaced = re.subn(r"\(.*\)", "(self, *, invalid: typing.Never)", lines[number - 1])
        if not replaced:
            raise StubsUnavailableError(f"line {number} of the stubs is not valid Python: {lines[number - 1]}")
    return "\n".join(lines)


def _invalid_line(lines: list[str]) -> int | None:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError as error:
        return error.lineno
    return None


def _cuda_stub() -> Iterator[str]:
    """Every function with the names of its arguments, and every enumeration. The bindings hold no types."""
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
        raise StubsUnavailableError(f"{' '.join(command[:4])} … failed: {(done.stderr or done.stdout).strip()[-500:]}")


if __name__ == "__main__":
    print(make_stubs(Path(sys.argv[1])))  # noqa: T201
