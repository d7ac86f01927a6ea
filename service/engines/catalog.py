"""Every engine in one row: its precisions on each device, the file that it runs, and how to install it.

To add an engine, write its module, add a row here and add a case to construct.py.
This module imports nothing heavy: the command line and the supervisor use it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vitserve.model.arrays import Precision

# Fastest first.
PRECISIONS: tuple[Precision, ...] = ("fp8", "int8", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class EngineKind:
    """The needs and abilities of an engine.

    ``artifact`` is the file that the engine runs: a file of the bundle, a TensorRT plan, a cast graph or the reference
    graph. Plans and cast graphs are built on the machine that serves.
    """

    package: str  # the library is installed if this package can be imported
    extra: str = ""  # installed by ``pip install 'vitserve[extra]'``; empty: by vitserve itself
    other_package: str = ""  # of another library that the engine can use instead
    other_extra: str = ""
    cpu: tuple[Precision, ...] = ()  # precisions on a CPU, in order of preference
    gpu: tuple[Precision, ...] = ()  # precisions on a GPU, in order of preference
    on_request: tuple[Precision, ...] = ()  # those that a GPU tries only if the engine is requested
    artifact: Literal["bundle", "plan", "cast_graph", "reference_graph"] = "bundle"

    @property
    def device(self) -> Literal["cpu", "gpu", "either"]:
        if self.cpu and self.gpu:
            return "either"
        return "gpu" if self.gpu else "cpu"

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions on any device, fastest first."""
        return tuple(precision for precision in PRECISIONS if precision in (*self.cpu, *self.gpu))

    @property
    def needs_plan_dir(self) -> bool:
        return self.artifact in ("plan", "cast_graph")

    @property
    def install_command(self) -> str:
        command = f"pip install 'vitserve[{self.extra}]'" if self.extra else "pip install vitserve"
        return f"{command}, or 'vitserve[{self.other_extra}]'" if self.other_extra else command

    @property
    def installed(self) -> bool:
        return any(find_spec(package) is not None for package in (self.package, self.other_package) if package)


# Fastest first, per device. Measured with ViT-B/16: docs/benchmarks.md (two cores with VNNI and bf16) and docs/gpu.md.
ENGINES: dict[str, EngineKind] = {
    "tensorrt": EngineKind(
        "tensorrt_rtx_bindings",
        "tensorrt-rtx",
        other_package="tensorrt",
        other_extra="tensorrt",
        gpu=("fp8", "bf16", "fp16"),
        artifact="plan",
    ),
    "onnxruntime-cuda": EngineKind("cuda", "gpu", gpu=("bf16", "fp16"), artifact="cast_graph"),
    "torch": EngineKind(
        "torch",
        "torch",
        cpu=("fp32", "bf16", "fp8"),
        gpu=("bf16", "fp16", "fp32", "fp8"),
        on_request=("fp32", "fp8"),
        artifact="reference_graph",
    ),
    "openvino": EngineKind("openvino", cpu=("int8", "bf16", "fp32")),
    "onnxruntime": EngineKind("onnxruntime", "onnxruntime", cpu=("int8", "fp32")),  # it has no bf16 on x86
}


def wants_gpu_workers(engine: str) -> bool:
    """Whether to start one engine worker per GPU. For ``auto``: if the library of any GPU engine is installed."""
    if engine == "auto":
        return any(kind.installed for kind in ENGINES.values() if kind.gpu)
    return bool(ENGINES[engine].gpu)
