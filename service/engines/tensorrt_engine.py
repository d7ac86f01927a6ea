"""TensorRT on one GPU, from a plan made by export/to_tensorrt.py. Imported by engines/open.py alone.

Calls: TensorRT 11's Python API, https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tensorrt as trt

from model.parity import Outputs, Precision
from model.preprocess import Pixels
from service.engines import cuda
from service.engines.engine import EngineUnavailable
from service.engines.padding import worthwhile
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


class TensorRtEngine:
    """One plan, whose weights exist once; one context, stream and set of CUDA graphs a lane.

    A batch runs as the graph of the smallest captured size that holds it. Which sizes are worth a graph is found by measuring all of them.
    """

    name = "tensorrt"

    def __init__(self, plan: Path, precision: Precision, lanes: int, max_batch: int) -> None:
        """Raises EngineUnavailable without a device, or where the plan is of another GPU or TensorRT, or for smaller batches."""
        cuda.count_devices()
        self.precision, self.lanes, self.max_batch = precision, lanes, max_batch
        logger = TensorRtLogger()
        self._runtime = trt.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise EngineUnavailable(f"{plan} cannot be used here: {'; '.join(logger.errors)}")
        largest = _largest_batch(engine)
        if largest < max_batch:
            raise EngineUnavailable(f"{plan} takes batches of at most {largest}; {max_batch} are wanted")
        self._lanes = [_Lane(engine, max_batch) for _ in range(lanes)]
        every = range(max_batch, 0, -1)  # largest first: the memory that it takes is there for the smaller
        self._lanes[0].capture(every)
        self._sizes = worthwhile({size: self._lanes[0].seconds(size) for size in every})
        self._lanes[0].keep(self._sizes)
        for lane in self._lanes[1:]:
            lane.capture(sorted(self._sizes, reverse=True))
        self._shared: cuda.Pinned | None = None

    def run(self, lane: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        if rows is not None and self._shared is None:
            self._shared = cuda.Pinned(pixels)  # the ring: from now on the device reads from the slots by itself
        images = [pixels] if rows is None else [pixels[row] for row in rows]
        count = len(pixels) if rows is None else len(rows)
        return self._lanes[lane].run(images, count, next(size for size in self._sizes if size >= count))

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        if self._shared is not None:
            self._shared.close()


class _Closable(Protocol):
    def close(self) -> None: ...


class _Lane:
    """Addresses are fixed for its life, because the graphs hold them."""

    def __init__(self, engine: trt.ICudaEngine, max_batch: int) -> None:
        self._engine, self._stream = engine, cuda.Stream()
        self._context = engine.create_execution_context()
        if self._context is None:
            raise cuda.CudaError("TensorRT made no execution context: there is too little device memory for another lane")
        self._image_shape = shape_of(engine.get_tensor_shape("pixels"))[1:]  # H, W, 3
        classes, width = (engine.get_tensor_shape(name)[1] for name in ("logits", "embedding"))
        self._pixels = cuda.DeviceMemory(max_batch * self._image_shape[0] * self._image_shape[1] * 3)
        self._host = {"logits": cuda.pinned_zeros(max_batch, classes), "embedding": cuda.pinned_zeros(max_batch, width)}
        self._device = {name: cuda.DeviceMemory(pinned.array.nbytes) for name, pinned in self._host.items()}
        self._graphs: dict[int, cuda.Graph] = {}

    def capture(self, sizes: Sequence[int]) -> None:
        for name, memory in {"pixels": self._pixels, **self._device}.items():
            self._said(self._context.set_tensor_address(name, memory.address), "set_tensor_address")
        for size in sizes:
            profile = _profile_of(self._engine, size)
            if self._context.active_optimization_profile != profile:
                self._said(self._context.set_optimization_profile_async(profile, self._stream.handle), "set_optimization_profile_async")
            self._said(self._context.set_input_shape("pixels", (size, *self._image_shape)), "set_input_shape")
            self._enqueue(size)  # once outside of a graph, as TensorRT asks: what it does only the first time cannot be captured
            self._stream.synchronize()
            with self._stream.captured() as self._graphs[size]:
                self._enqueue(size)

    def _enqueue(self, size: int) -> None:
        self._said(self._context.execute_async_v3(self._stream.handle), "execute_async_v3")
        for name, memory in self._device.items():
            memory.read_into(self._host[name].array[:size], self._stream)

    def _said(self, succeeded: bool, call: str) -> None:
        if not succeeded:
            raise cuda.CudaError(f"TensorRT's {call} failed; its log says why")

    def seconds(self, size: int) -> float:
        """Of a run of the graph, the best of three after one that does not count."""
        times = []
        for _ in range(4):
            began = time.monotonic()
            self._graphs[size].launch(self._stream)
            self._stream.synchronize()
            times.append(time.monotonic() - began)
        return min(times[1:])

    def keep(self, sizes: Sequence[int]) -> None:
        for size in set(self._graphs) - set(sizes):
            self._graphs.pop(size).close()

    def run(self, images: Sequence[Pixels], count: int, size: int) -> Outputs:
        """``images`` are ``count`` in all, in order; the rest up to ``size`` is whatever was there before, and is not looked at."""
        offset = 0
        for image in images:
            self._pixels.fill(offset, image, self._stream)
            offset += image.nbytes
        self._graphs[size].launch(self._stream)
        self._stream.synchronize()
        return Outputs(*(self._host[name].array[:count].copy() for name in ("logits", "embedding")))

    def close(self) -> None:
        held: list[_Closable] = [*self._graphs.values(), self._pixels, *self._device.values(), *self._host.values(), self._stream]
        for each in held:
            each.close()
        self._graphs.clear()


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
