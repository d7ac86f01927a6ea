"""A double of the CUDA runtime: a GPU in host memory, for machines without one.

It is as strict as the real one where code goes wrong: work on a stream runs only when the stream is synchronized,
memory that is not pinned is read at the call, and a graph replays addresses. test_tensorrt_stubs.py checks that every
name and argument exists in the real bindings.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from enum import IntEnum
from importlib.machinery import ModuleSpec
from typing import Any

Operation = Callable[[], object]


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorHostMemoryAlreadyRegistered = 712
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class Device:
    """One GPU: memory with real host addresses, streams, graphs, and the errors that a test injects."""

    def __init__(
        self,
        devices: int = 1,
        memory_bytes: int = 1 << 30,
        gpu: str = "NVIDIA H200",
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        self.devices, self.memory_bytes = devices, memory_bytes
        self.gpu, self.capability = gpu, capability
        self.allocated: dict[int, Any] = {}
        self.pinned: dict[int, int] = {}
        self.streams: dict[int, list[Operation]] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self.capturing: dict[int, list[Operation]] = {}
        self.faults: dict[str, cudaError_t] = {}  # call → error of the next one
        self.lost: cudaError_t | None = None  # error of every call from now on
        self.launches = 0
        self._ids = iter(range(1, 1 << 30))

    def fail(self, call: str, error: cudaError_t) -> None:
        self.faults[call] = error

    def enqueue(self, stream: int, operation: Operation) -> None:
        self.capturing.get(stream, self.streams[stream]).append(operation)

    # The calls of cuda.bindings.runtime:

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (cudaError_t.cudaSuccess, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, 0)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, types.SimpleNamespace(
            name=self.gpu.encode(), major=self.capability[0], minor=self.capability[1]
        )

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, f"error {error.name} of the GPU double".encode()

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (self.lost or cudaError_t.cudaSuccess,)

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        unlost = cudaError_t.cudaErrorStreamCaptureUnsupported if self.capturing else cudaError_t.cudaSuccess
        return (self.lost or unlost,)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if sum(len(memory) for memory in self.allocated.values()) + size > self.memory_bytes:
            return (cudaError_t.cudaErrorMemoryAllocation, None)
        memory = (ctypes.c_ubyte * size)()
        self.allocated[ctypes.addressof(memory)] = memory
        return cudaError_t.cudaSuccess, ctypes.addressof(memory)

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        del self.allocated[devPtr]
        return (cudaError_t.cudaSuccess,)

    def cudaHostRegister(self, ptr: int, size: int, flags: int) -> tuple[Any, ...]:
        assert ptr not in self.pinned, "registered twice"
        self.pinned[ptr] = size
        return (cudaError_t.cudaSuccess,)

    def cudaHostUnregister(self, ptr: int) -> tuple[Any, ...]:
        del self.pinned[ptr]
        return (cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int) -> tuple[Any, ...]:
        on_device, on_host = (dst, src) if kind is cudaMemcpyKind.cudaMemcpyHostToDevice else (src, dst)
        assert any(
            start <= on_device and on_device + count <= start + len(memory) for start, memory in self.allocated.items()
        ), "not the device's memory"
        pinned = any(start <= on_host and on_host + count <= start + size for start, size in self.pinned.items())
        if kind is cudaMemcpyKind.cudaMemcpyHostToDevice and not pinned:
            staged = ctypes.string_at(src, count)
            self.enqueue(stream, lambda: ctypes.memmove(dst, staged, count))
        else:
            self.enqueue(stream, lambda: ctypes.memmove(dst, src, count))
        return (cudaError_t.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        stream = next(self._ids)
        self.streams[stream] = []
        return cudaError_t.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        del self.streams[stream]
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        operations, self.streams[stream] = self.streams[stream], []
        for operation in operations:
            operation()
        return (cudaError_t.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        self.capturing[stream] = []
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        graph = next(self._ids)
        self.graphs[graph] = self.capturing.pop(stream)
        return cudaError_t.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        instance = next(self._ids)
        self.graphs[instance] = self.graphs[graph]
        return cudaError_t.cudaSuccess, instance

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[Any, ...]:
        self.launches += 1
        for operation in self.graphs[graphExec]:
            self.enqueue(stream, operation)
        return (cudaError_t.cudaSuccess,)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (cudaError_t.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[Any, ...]:
        del self.graphs[graphExec]
        return (cudaError_t.cudaSuccess,)


def runtime_of(device: Device) -> types.ModuleType:
    """The module ``cuda.bindings.runtime`` for ``device``."""
    module = types.ModuleType("cuda.bindings.runtime")
    vars(module).update(cudaStreamNonBlocking=1, cudaHostRegisterDefault=0)
    for enumeration in ENUMERATIONS:
        setattr(module, enumeration.__name__, enumeration)
    for name in CALLS:
        setattr(module, name, _failing(device, name, getattr(device, name)))
    return module


def cuda_modules(device: Device) -> dict[str, types.ModuleType]:
    """What sys.modules holds once ``cuda.bindings.runtime`` is imported."""
    runtime, bindings, cuda = runtime_of(device), types.ModuleType("cuda.bindings"), types.ModuleType("cuda")
    cuda.__spec__ = ModuleSpec("cuda", None)  # for find_spec()
    vars(bindings).update(runtime=runtime)
    return {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}


ENUMERATIONS = (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode)
CALLS = [name for name in vars(Device) if name.startswith("cuda")]
CALLS_WITH_VALUE = {
    "cudaGetDeviceCount",
    "cudaGetDeviceProperties",
    "cudaMalloc",
    "cudaStreamCreateWithFlags",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
}


def _failing(device: Device, name: str, call: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    def called(*arguments: Any, **named: Any) -> tuple[Any, ...]:
        fault = device.faults.pop(name, None) or (device.lost if not name.startswith("cudaGetError") else None)
        if fault is None:
            return call(*arguments, **named)
        return (fault, None) if name in CALLS_WITH_VALUE else (fault,)

    return called
