"""The two libraries with TensorRT's API, the choice between them, and all that differs between them.

DATA_CENTER  TensorRT. Builds on the GPU that serves, and measures its kernels while it builds.
RTX          TensorRT for RTX, from the package index alone. Builds without a GPU, for the compute capabilities in
             RTX_CAPABILITIES. Kernels are compiled just in time on the GPU that serves; a cache file keeps them.

References: https://docs.nvidia.com/deeplearning/tensorrt and https://docs.nvidia.com/deeplearning/tensorrt-rtx.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from vitserve.model.bundle.plan import TITLES, Capability, Library, name_of
from vitserve.service.engines.engine import EngineUnavailableError

log = logging.getLogger(__name__)

# trt.ComputeCapability has these, besides CURRENT. H100, H200 (9.0) and B200 (10.0) are not among them.
RTX_CAPABILITIES: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True)
class Provider:
    library: Library
    module: str  # that the package installs
    extra: str  # of vitserve, that installs the package
    logs_layers: bool  # the builder's log has the layers of the plan; otherwise the inspector is needed, and a GPU
    times_kernels: bool  # the builder measures kernels, and keeps the results in a timing cache
    compiles_late: bool  # kernels are compiled when a shape runs first, and a cache file keeps them
    builds_for_others: bool  # the builder gets compute capabilities; otherwise it builds for the GPU of its machine

    @property
    def installed(self) -> bool:
        return find_spec(self.module) is not None

    def load(self) -> ModuleType:
        """TensorRT's module. Raises ImportError."""
        return importlib.import_module(self.module)


DATA_CENTER = Provider(
    "data-center",
    "tensorrt",
    "tensorrt",
    logs_layers=False,
    times_kernels=True,
    compiles_late=False,
    builds_for_others=False,
)
RTX = Provider(
    "rtx",
    "tensorrt_rtx_bindings",
    "tensorrt-rtx",
    logs_layers=True,
    times_kernels=False,
    compiles_late=True,
    builds_for_others=True,
)


def choose() -> Provider:
    """The installed library. If both are: RTX on a GPU that it supports and without a GPU, otherwise the other one.

    Raises ImportError if none is installed.
    """
    installed = [provider for provider in (RTX, DATA_CENTER) if provider.installed]
    if not installed:
        raise ImportError(f"No module named {DATA_CENTER.module!r} or {RTX.module!r}")
    capability = None if len(installed) == 1 else _capability_of_the_gpu()
    return installed[-1] if capability is not None and capability not in RTX_CAPABILITIES else installed[0]


def _capability_of_the_gpu() -> Capability | None:
    try:
        from vitserve.service.engines.cuda import runtime

        runtime.count_devices()
        return runtime.describe_device()[1]
    except (ImportError, EngineUnavailableError):
        return None


def require_rtx() -> None:
    """Raises EngineUnavailableError if TensorRT for RTX is not installed: it alone builds plans without a GPU."""
    if not RTX.installed:
        raise EngineUnavailableError(
            f"{TITLES[RTX.library]} is not installed, which builds plans without a GPU: "
            f"pip install 'vitserve[{RTX.extra}]'"
        )


def set_target(provider: Provider, trt: Any, config: Any, capabilities: Sequence[Capability]) -> None:
    """The plan is built for ``capabilities``, or for the GPU of this machine if there are none."""
    if not provider.builds_for_others:
        assert not capabilities, "the builder of TensorRT for data centers builds for its own GPU"
        return
    # Otherwise the plan might allocate memory in a run, which cannot be captured in a CUDA graph.
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    names = [name_of(capability).upper() for capability in capabilities] or ["CURRENT"]
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(trt.ComputeCapability.__members__[name], index)


class Contexts:
    """Makes the execution contexts of an engine. They use memory that is set for each one.

    If the provider compiles late, kernels are compiled for each shape when it runs first, before CUDA graphs are
    captured, and are kept in the file ``jit_cache``. TensorRT checks the file's GPU, driver and version, and ignores a
    file that does not match.
    """

    def __init__(self, provider: Provider, trt: Any, engine: Any, jit_cache: Path | None) -> None:
        self._trt, self._engine, self._path = trt, engine, jit_cache
        self._cache: Any = None
        self._settings = self._late_compilation() if provider.compiles_late else None

    def _late_compilation(self) -> Any:
        trt, settings = self._trt, self._engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # LAZY would replace kernels in the background, under a captured graph. We capture graphs ourselves.
        settings.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        settings.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        if self._path is not None:
            self._cache = settings.create_runtime_cache()
            if self._path.exists() and not self._cache.deserialize(self._path.read_bytes()):
                log.info("kernels are compiled again: %s is of another GPU, driver or version", self._path)
            settings.set_runtime_cache(self._cache)
        return settings

    def create(self) -> Any:
        """A context, or None if there is too little memory."""
        if self._settings is not None:
            return self._engine.create_execution_context(self._settings)
        return self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def save(self) -> None:
        """Writes the compiled kernels to the cache file. A directory that cannot be written costs only time."""
        if self._cache is None or self._path is None:
            return
        temporary = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(bytes(self._cache.serialize()))
            temporary.replace(self._path)
        except OSError as error:
            log.warning("compiled kernels cannot be kept, so the next start compiles them again: %s", error)
