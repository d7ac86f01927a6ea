"""The CUDA runtime without torch: memory, streams and graphs. Every call's error is checked.

Reference: the CUDA runtime API, https://docs.nvidia.com/cuda/cuda-runtime-api.
An engine worker sees one device (CUDA_VISIBLE_DEVICES), so its threads need not select one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import runtime

from vitserve.service.engines.engine import DeviceLostError, EngineUnavailableError

# cudaErrorStreamCaptureUnsupported … cudaErrorGraphExecUpdateFailure concern one stream, not the device.
_CAPTURE_ERRORS = range(900, 910)
_LOST = "; the device fails every further call until the process ends"


class CudaError(RuntimeError):
    """A call failed. The device can still be used."""


def checked(returned: tuple[Any, ...]) -> Any:
    """The values that a call returned: none, one or several.

    Raises CudaError, or DeviceLostError if the error persists.
    """
    error, *values = returned
    if error != runtime.cudaError_t.cudaSuccess:
        raise _failure(error)
    return values[0] if len(values) == 1 else tuple(values)


def _failure(error: Any) -> BaseException:
    _, name = runtime.cudaGetErrorName(error)
    _, text = runtime.cudaGetErrorString(error)
    message = f"{name.decode()}: {text.decode()}"
    runtime.cudaGetLastError()  # clears an error that does not persist
    return DeviceLostError(f"{message}{_LOST}") if _is_lost() else CudaError(message)


def raise_if_lost(error: Exception) -> None:
    """For errors that another library raises: raises DeviceLostError if the device's error persists."""
    if _is_lost():
        raise DeviceLostError(f"{error}{_LOST}") from error


def _is_lost() -> bool:
    """Whether the device still reports an error after synchronization.

    It cannot be synchronized while a stream captures a graph. Then it is not lost.
    """
    (status,) = runtime.cudaDeviceSynchronize()
    return status != runtime.cudaError_t.cudaSuccess and int(status) not in _CAPTURE_ERRORS


def count_devices() -> int:
    """Raises EngineUnavailableError without a device or its driver."""
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess or not count:
        _, text = runtime.cudaGetErrorString(error)
        raise EngineUnavailableError(f"CUDA finds no device: {text.decode()}")
    return int(count)


def describe_device() -> tuple[str, tuple[int, int]]:
    """The device's name and compute capability."""
    properties = checked(runtime.cudaGetDeviceProperties(0))
    return properties.name.decode(), (properties.major, properties.minor)


class Stream:
    def __init__(self) -> None:
        self.handle = int(checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))

    def synchronize(self) -> None:
        checked(runtime.cudaStreamSynchronize(self.handle))

    @contextmanager
    def captured(self) -> Iterator[Graph]:
        """Work that is enqueued inside the ``with`` block is not run but recorded in the graph."""
        graph = Graph()
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        checked(runtime.cudaStreamBeginCapture(self.handle, mode))
        try:
            yield graph
        except BaseException:
            runtime.cudaStreamEndCapture(self.handle)  # its own error only repeats the one raised in the block
            raise
        graph.instantiate(checked(runtime.cudaStreamEndCapture(self.handle)))

    def close(self) -> None:
        checked(runtime.cudaStreamDestroy(self.handle))


class Graph:
    """Kernels and copies with fixed addresses and sizes, launched together."""

    def instantiate(self, captured: Any) -> None:
        self._graph = checked(runtime.cudaGraphInstantiate(captured, 0))
        checked(runtime.cudaGraphDestroy(captured))

    def launch(self, stream: Stream) -> None:
        checked(runtime.cudaGraphLaunch(self._graph, stream.handle))

    def close(self) -> None:
        checked(runtime.cudaGraphExecDestroy(self._graph))


class DeviceMemory:
    def __init__(self, size_bytes: int) -> None:
        self.address = int(checked(runtime.cudaMalloc(size_bytes)))

    def fill(self, offset_bytes: int, array: npt.NDArray[Any], stream: Stream) -> None:
        """Copies a contiguous array to the device.

        If the array is pinned, the copy is asynchronous: do not change the array before the stream is synchronized.
        """
        to_device = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        address = self.address + offset_bytes
        checked(runtime.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, to_device, stream.handle))

    def read_into(self, array: npt.NDArray[Any], stream: Stream) -> None:
        to_host = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        checked(runtime.cudaMemcpyAsync(array.ctypes.data, self.address, array.nbytes, to_host, stream.handle))

    def close(self) -> None:
        checked(runtime.cudaFree(self.address))


class Pinned:
    """An existing array, registered so that the device can access its memory directly."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        checked(runtime.cudaHostRegister(array.ctypes.data, array.nbytes, runtime.cudaHostRegisterDefault))

    def close(self) -> None:
        checked(runtime.cudaHostUnregister(self.array.ctypes.data))


def pinned_zeros(*shape: int) -> Pinned:
    """A float32 array on its own pages, because CUDA registers whole pages."""
    size, page = int(np.prod(shape)) * 4, 4096
    block = np.zeros(size + page, np.uint8)
    start = -block.ctypes.data % page
    return Pinned(block[start : start + size].view(np.float32).reshape(shape))
