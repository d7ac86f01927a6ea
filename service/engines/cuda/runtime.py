"""CUDA's runtime without torch: memory, streams and graphs, the error of every call checked.

Calls, flags and their meaning: the CUDA runtime API, https://docs.nvidia.com/cuda/cuda-runtime-api.
An engine worker sees one device (CUDA_VISIBLE_DEVICES), so that none of its threads has to choose one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import runtime

from vitserve.service.engines.engine import DeviceLostError, EngineUnavailableError

_OF_CAPTURE = range(
    900, 910
)  # cudaErrorStreamCaptureUnsupported … cudaErrorGraphExecUpdateFailure and its neighbors: of a stream, not of the device
_LOST = "; the device answers every further call so, until the process ends"


class CudaError(RuntimeError):
    """A call failed, and the device can still be used."""


def checked(returned: tuple[Any, ...]) -> Any:
    """What a call returned behind its error: nothing, one value or several. Raises CudaError, or DeviceLost where the error stays."""
    error, *values = returned
    if error != runtime.cudaError_t.cudaSuccess:
        raise _failure(error)
    return values[0] if len(values) == 1 else tuple(values)


def _failure(error: Any) -> BaseException:
    _, name = runtime.cudaGetErrorName(error)
    _, text = runtime.cudaGetErrorString(error)
    message = f"{name.decode()}: {text.decode()}"
    runtime.cudaGetLastError()  # forgets what can be forgotten
    return DeviceLostError(f"{message}{_LOST}") if _is_lost() else CudaError(message)


def raise_if_lost(error: Exception) -> None:
    """For what other libraries raise of the device's errors: raises DeviceLost where the error stays."""
    if _is_lost():
        raise DeviceLostError(f"{error}{_LOST}") from error


def _is_lost() -> bool:
    """Whether the error is still there when all work has been waited for; a device that cannot be waited for, because a stream captures, is not lost."""
    (still,) = runtime.cudaDeviceSynchronize()
    return still != runtime.cudaError_t.cudaSuccess and int(still) not in _OF_CAPTURE


def count_devices() -> int:
    """Raises EngineUnavailable without a device or its driver."""
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess or not count:
        _, text = runtime.cudaGetErrorString(error)
        raise EngineUnavailableError(f"CUDA finds no device: {text.decode()}")
    return int(count)


def describe_device() -> tuple[str, tuple[int, int]]:
    """Its name and compute capability."""
    properties = checked(runtime.cudaGetDeviceProperties(0))
    return properties.name.decode(), (properties.major, properties.minor)


class Stream:
    def __init__(self) -> None:
        self.handle = int(checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))

    def synchronize(self) -> None:
        checked(runtime.cudaStreamSynchronize(self.handle))

    @contextmanager
    def captured(self) -> Iterator[Graph]:
        """What is enqueued inside is not run, but becomes the graph."""
        graph = Graph()
        checked(
            runtime.cudaStreamBeginCapture(self.handle, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        )
        try:
            yield graph
        except BaseException:
            runtime.cudaStreamEndCapture(self.handle)  # whose own error is that of what went wrong inside
            raise
        graph.instantiate(checked(runtime.cudaStreamEndCapture(self.handle)))

    def close(self) -> None:
        checked(runtime.cudaStreamDestroy(self.handle))


class Graph:
    """Kernels and copies with fixed addresses and sizes, launched as one."""

    def instantiate(self, drawn: Any) -> None:
        self._graph = checked(runtime.cudaGraphInstantiate(drawn, 0))
        checked(runtime.cudaGraphDestroy(drawn))

    def launch(self, stream: Stream) -> None:
        checked(runtime.cudaGraphLaunch(self._graph, stream.handle))

    def close(self) -> None:
        checked(runtime.cudaGraphExecDestroy(self._graph))


class DeviceMemory:
    def __init__(self, size_bytes: int) -> None:
        self.address = int(checked(runtime.cudaMalloc(size_bytes)))

    def fill(self, offset_bytes: int, array: npt.NDArray[Any], stream: Stream) -> None:
        """From ``array``, contiguous. Without a stop on the host where the array lies in pinned memory; it must then stay as it is until the stream has run."""
        to_device = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        checked(
            runtime.cudaMemcpyAsync(
                self.address + offset_bytes, array.ctypes.data, array.nbytes, to_device, stream.handle
            )
        )

    def read_into(self, array: npt.NDArray[Any], stream: Stream) -> None:
        to_host = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        checked(runtime.cudaMemcpyAsync(array.ctypes.data, self.address, array.nbytes, to_host, stream.handle))

    def close(self) -> None:
        checked(runtime.cudaFree(self.address))


class Pinned:
    """Memory of ours that the device may read and write by itself: an array that is there, registered."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        checked(runtime.cudaHostRegister(array.ctypes.data, array.nbytes, runtime.cudaHostRegisterDefault))

    def close(self) -> None:
        checked(runtime.cudaHostUnregister(self.array.ctypes.data))


def pinned_zeros(*shape: int) -> Pinned:
    """float32. On pages of its own, because whole pages are registered."""
    size, page = int(np.prod(shape)) * 4, 4096
    room = np.zeros(size + page, np.uint8)
    start = -room.ctypes.data % page
    return Pinned(room[start : start + size].view(np.float32).reshape(shape))
