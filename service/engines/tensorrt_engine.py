"""TensorRT on one GPU, from a plan made by export/to_tensorrt.py. Imported by engines/open.py alone.

Calls: TensorRT 11's Python API, https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import SupportsFloat

import tensorrt as trt

from model.parity import Precision
from service.engines import cuda
from service.engines.engine import EngineUnavailable
from service.engines.gpu import Buffers, GpuEngine
from service.engines.plans import Target

log = logging.getLogger(__name__)


class TensorRtLogger(trt.ILogger):  # type: ignore[misc, unused-ignore]  # of no known type where TensorRT is not installed
    """Into our log. Keeps the errors, because TensorRT's calls tell by a None or False that there was one, and only here which."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
            self.errors.append(msg)
            log.error("TensorRT: %s", msg)
        else:
            log.log(logging.WARNING if severity == trt.ILogger.Severity.WARNING else logging.DEBUG, "TensorRT: %s", msg)


def target() -> Target:
    """What a plan built here is good for. Raises EngineUnavailable without a device."""
    cuda.count_devices()
    name, capability = cuda.describe_device()
    return Target(name, capability, trt.__version__)


class TensorRtEngine(GpuEngine):
    """One plan, whose weights exist once; one context and set of CUDA graphs a lane."""

    name = "tensorrt"

    def __init__(self, plan: Path, precision: Precision, lanes: int, max_batch: int) -> None:
        """Raises EngineUnavailable without a device, or where the plan is of another GPU or TensorRT, or for smaller batches."""
        cuda.count_devices()
        logger = TensorRtLogger()
        self._runtime = trt.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise EngineUnavailable(f"{plan} cannot be used here: {'; '.join(logger.errors)}")
        largest = _largest_batch(engine)
        if largest < max_batch:
            raise EngineUnavailable(f"{plan} takes batches of at most {largest}; {max_batch} are wanted")
        image = shape_of(engine.get_tensor_shape("pixels"))[1:]
        classes, width = (int(engine.get_tensor_shape(name)[1]) for name in ("logits", "embedding"))
        self.plan, self._engine = plan, engine
        super().__init__(
            precision, lanes, max_batch, range(1, max_batch + 1), lambda: Buffers(image, classes, width, max_batch), lambda buffers: _Program(engine, buffers)
        )

    def layer_milliseconds(self, size: int) -> dict[str, float]:
        """Of one batch, by TensorRT's profiler, which runs each layer alone: their shares are what is meant, not their sum. No lane may run meanwhile."""
        buffers, _ = self._lanes[0]
        program, profiler = _Program(self._engine, buffers), _Profiler()
        program.profile(size, profiler)
        return profiler.milliseconds


class _Profiler(trt.IProfiler):  # type: ignore[misc, unused-ignore]  # as TensorRtLogger
    def __init__(self) -> None:
        super().__init__()
        self.milliseconds = dict[str, float]()

    def report_layer_time(self, layer_name: str, ms: SupportsFloat) -> None:
        self.milliseconds[layer_name] = float(ms)


class _Program:
    """A CUDA graph for each size holds the kernels and the outputs' way to the host."""

    def __init__(self, engine: trt.ICudaEngine, buffers: Buffers) -> None:
        self._engine, self._buffers = engine, buffers
        self._context = engine.create_execution_context()
        if self._context is None:
            raise cuda.CudaError("TensorRT made no execution context: there is too little device memory for another lane")
        for name, memory in {"pixels": buffers.pixels, **buffers.device}.items():
            _said(self._context.set_tensor_address(name, memory.address), "set_tensor_address")
        self._graphs = dict[int, cuda.Graph]()

    def prepare(self, size: int) -> None:
        stream = self._buffers.stream
        self._shape(size)
        self._run(size)  # once outside of a graph, as TensorRT asks: what it does only the first time cannot be captured
        stream.synchronize()
        with stream.captured() as graph:
            self._run(size)
        self._graphs[size] = graph

    def profile(self, size: int, profiler: trt.IProfiler) -> None:
        self._context.profiler = profiler
        self._shape(size)
        for _ in range(3):  # the last counts
            self._run(size)
            self._buffers.stream.synchronize()

    def _shape(self, size: int) -> None:
        stream, profile = self._buffers.stream, _profile_of(self._engine, size)
        if self._context.active_optimization_profile != profile:
            _said(self._context.set_optimization_profile_async(profile, stream.handle), "set_optimization_profile_async")
        _said(self._context.set_input_shape("pixels", (size, *self._buffers.image_shape)), "set_input_shape")

    def _run(self, size: int) -> None:
        _said(self._context.execute_async_v3(self._buffers.stream.handle), "execute_async_v3")
        self._buffers.read(size)

    def enqueue(self, size: int) -> None:
        self._graphs[size].launch(self._buffers.stream)

    def forget(self, size: int) -> None:
        self._graphs.pop(size).close()

    def close(self) -> None:
        for each in self._graphs.values():
            each.close()
        self._graphs.clear()


def _said(succeeded: bool, call: str) -> None:
    if not succeeded:
        raise cuda.CudaError(f"TensorRT's {call} failed; its log says why")


def shape_of(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(int(dims[place]) for place in range(len(dims)))


def _largest_batch(engine: trt.ICudaEngine) -> int:
    return max(_largest_of(engine, profile) for profile in range(engine.num_optimization_profiles))


def _profile_of(engine: trt.ICudaEngine, size: int) -> int:
    """The profile of the smallest batches that holds ``size``: its kernels were chosen for the nearest."""
    fitting = [profile for profile in range(engine.num_optimization_profiles) if _largest_of(engine, profile) >= size]
    return min(fitting, key=lambda profile: _largest_of(engine, profile))


def _largest_of(engine: trt.ICudaEngine, profile: int) -> int:
    _, _, largest = engine.get_tensor_profile_shape("pixels", profile)
    return int(largest[0])
