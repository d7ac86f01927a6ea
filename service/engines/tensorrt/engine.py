"""TensorRT on one GPU. Runs a plan that export/build_plan.py built, with either library (provider.py).

Reference: TensorRT 11's Python API, https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, SupportsFloat

from vitserve.model.arrays import Precision
from vitserve.model.bundle.plan import PlanReport
from vitserve.service.engines.cuda import runtime
from vitserve.service.engines.cuda.batching import Buffers, GpuEngine, candidate_sizes
from vitserve.service.engines.engine import EngineUnavailableError
from vitserve.service.engines.tensorrt.logger import LOGGER
from vitserve.service.engines.tensorrt.provider import Contexts, choose
from vitserve.service.engines.tensorrt.target import local_target

if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = choose().load()


class TensorRtEngine(GpuEngine):
    """One plan for all streams, so the weights are loaded once. Contexts and CUDA graphs per stream and batch size."""

    name = "tensorrt"

    def __init__(
        self, plan: Path, report: PlanReport, precision: Precision, streams: int, max_batch: int, cache_dir: str = ""
    ) -> None:
        """``report`` describes the plan. ``cache_dir`` keeps kernels that are compiled here; empty: nothing is kept.

        Raises EngineUnavailableError without a device, or if the plan is for another GPU, TensorRT or batch size.
        """
        runtime.count_devices()
        target = local_target()
        mismatch = target.mismatch(report)
        if mismatch is None and report.max_batch < max_batch:
            mismatch = f"the plan supports batches of up to {report.max_batch}; max_batch is {max_batch}"
        if mismatch is not None:
            raise EngineUnavailableError(f"{plan.name} cannot be used: {mismatch}")
        content = plan.read_bytes()
        self.plan, self.report = plan, report
        self._runtime = trt.Runtime(LOGGER)
        engine = self._engine = _deserialize(self._runtime, plan.name, content)
        kernels = f"{hashlib.sha256(content).hexdigest()[:12]}-{target.slug}.jit"
        provider = choose()
        self._contexts = Contexts(provider, trt, engine, Path(cache_dir) / kernels if cache_dir else None)
        image = shape_of(engine.get_tensor_shape("pixels"))[1:]
        classes, width = (int(engine.get_tensor_shape(name)[1]) for name in ("logits", "embedding"))
        super().__init__(
            precision,
            streams,
            max_batch,
            candidate_sizes(max_batch) if provider.compiles_late else range(1, max_batch + 1),
            lambda: Buffers(image, classes, width, max_batch),
            lambda buffers: _Program(engine, self._contexts, buffers),
        )
        self._contexts.save()

    def layer_milliseconds(self, size: int) -> dict[str, float]:
        """Milliseconds per layer of one batch, from TensorRT's profiler. No stream may run at the same time.

        The profiler runs layers one by one: use the layers' shares, because their sum exceeds the time of a batch.
        """
        buffers, _ = self._streams[0]
        program, profiler = _Program(self._engine, self._contexts, buffers), _Profiler()
        try:
            program.profile(size, profiler)
        finally:
            program.close()
        return profiler.milliseconds


class _Profiler(trt.IProfiler):  # type: ignore[misc, unused-ignore]  # as TensorRtLogger
    def __init__(self) -> None:
        super().__init__()
        self.milliseconds = dict[str, float]()

    def report_layer_time(self, layer_name: str, ms: SupportsFloat) -> None:
        self.milliseconds[layer_name] = float(ms)


class _Program:
    """A context and a CUDA graph per batch size.

    A context does not change after its graph is captured. The contexts share scratch memory, because one runs at a
    time. A graph holds the kernels and the copies of the outputs to the host.
    """

    def __init__(self, engine: trt.ICudaEngine, contexts: Contexts, buffers: Buffers) -> None:
        self._engine, self._contexts, self._buffers = engine, contexts, buffers
        self._scratch_bytes = max(engine.device_memory_size_v2, 1)
        self._scratch = runtime.DeviceMemory(self._scratch_bytes)
        self._prepared = dict[int, tuple[trt.IExecutionContext, runtime.Graph]]()

    def prepare(self, size: int) -> None:
        context, stream = self._context(size), self._buffers.stream
        self._run(context, size)  # outside the graph: TensorRT's initialization cannot be captured
        stream.synchronize()
        with stream.captured() as graph:
            self._run(context, size)
        self._prepared[size] = context, graph

    def profile(self, size: int, profiler: trt.IProfiler) -> None:
        context = self._context(size)
        context.profiler = profiler
        for _ in range(3):  # the profiler keeps the last run's times
            self._run(context, size)
            self._buffers.stream.synchronize()

    def _context(self, size: int) -> trt.IExecutionContext:
        stream, profile = self._buffers.stream, _profile_of(self._engine, size)
        context: trt.IExecutionContext | None = self._contexts.create()
        if context is None:
            raise runtime.CudaError("TensorRT cannot create an execution context: too little device memory")
        context.set_device_memory(self._scratch.address, self._scratch_bytes)
        if context.active_optimization_profile != profile:
            _check(context.set_optimization_profile_async(profile, stream.handle), "set_optimization_profile_async")
        _check(context.set_input_shape("pixels", (size, *self._buffers.image_shape)), "set_input_shape")
        for name, memory in {"pixels": self._buffers.pixels, **self._buffers.device}.items():
            _check(context.set_tensor_address(name, memory.address), "set_tensor_address")
        return context

    def _run(self, context: trt.IExecutionContext, size: int) -> None:
        _check(context.execute_async_v3(self._buffers.stream.handle), "execute_async_v3")
        self._buffers.read(size)

    def enqueue(self, size: int) -> None:
        _, graph = self._prepared[size]
        graph.launch(self._buffers.stream)

    def forget(self, size: int) -> None:
        _, graph = self._prepared.pop(size)
        graph.close()

    def close(self) -> None:
        for _, graph in self._prepared.values():
            graph.close()
        self._prepared.clear()
        self._scratch.close()


def _deserialize(loader: trt.Runtime, name: str, plan: bytes) -> trt.ICudaEngine:
    """Raises EngineUnavailableError with TensorRT's own reasons."""
    with LOGGER.collected() as messages:
        engine = loader.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineUnavailableError(f"{name} cannot be used: TensorRT rejects it: {'; '.join(messages.errors)}")
    return engine


def _check(succeeded: bool, call: str) -> None:
    if not succeeded:
        raise runtime.CudaError(f"TensorRT's {call} failed; its log has the reason")


def shape_of(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(int(dims[index]) for index in range(len(dims)))


def _profile_of(engine: trt.ICudaEngine, size: int) -> int:
    """The profile with the smallest largest batch that holds ``size``: its kernels were tuned for the nearest size."""
    fitting = [profile for profile in range(engine.num_optimization_profiles) if _largest_of(engine, profile) >= size]
    return min(fitting, key=lambda profile: _largest_of(engine, profile))


def _largest_of(engine: trt.ICudaEngine, profile: int) -> int:
    _, _, largest = engine.get_tensor_profile_shape("pixels", profile)
    return int(largest[0])
