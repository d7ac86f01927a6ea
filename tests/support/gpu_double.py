"""A GPU and TensorRT that are not there: the control flow of our code runs against them, and so do its numbers, slowly, by ONNX's own reference evaluator.

As strict as the real ones where code goes wrong: nothing happens on a stream until it is synchronized, memory that is not pinned is read at the call, a graph
replays addresses, a shape outside of the active profile is rejected, the first run of a shape cannot be captured. test_tensorrt_contract.py checks that every
name and argument here is one of the genuine bindings'.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import threading
import types
from collections.abc import Callable
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as genuine
from onnx.reference import ReferenceEvaluator

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
    """One GPU: its memory (which is the host's, so that addresses mean something), streams, graphs, and the faults that a test wants."""

    def __init__(self, devices: int = 1, memory_bytes: int = 1 << 30) -> None:
        self.devices, self.memory_bytes = devices, memory_bytes
        self.allocated: dict[int, Any] = {}
        self.pinned: dict[int, int] = {}
        self.streams: dict[int, list[Operation]] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self.capturing: dict[int, list[Operation]] = {}
        self.faults: dict[str, cudaError_t] = {}  # by call, once each
        self.dead: cudaError_t | None = None  # what it answers from now on
        self.launches = 0
        self._ids = iter(range(1, 1 << 30))

    def fail(self, call: str, error: cudaError_t) -> None:
        self.faults[call] = error

    def enqueue(self, stream: int, operation: Operation) -> None:
        self.capturing.get(stream, self.streams[stream]).append(operation)

    def drain(self) -> None:
        for operations in self.streams.values():
            for each in operations:
                each()
            operations.clear()

    # -- the calls of cuda.bindings.runtime

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (cudaError_t.cudaSuccess, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, 0)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, types.SimpleNamespace(name=b"NVIDIA H200", major=9, minor=0)

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, f"the double was told to answer {error.name}".encode()

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (self.dead or cudaError_t.cudaSuccess,)

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        return (
            self.dead or (cudaError_t.cudaErrorStreamCaptureUnsupported if self.capturing else cudaError_t.cudaSuccess),
        )

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if sum(len(each) for each in self.allocated.values()) + size > self.memory_bytes:
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
        of_device, of_host = (dst, src) if kind is cudaMemcpyKind.cudaMemcpyHostToDevice else (src, dst)
        assert any(
            start <= of_device and of_device + count <= start + len(memory) for start, memory in self.allocated.items()
        ), "not the device's memory"
        pinned = any(start <= of_host and of_host + count <= start + size for start, size in self.pinned.items())
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
        for each in operations:
            each()
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
        for each in self.graphs[graphExec]:
            self.enqueue(stream, each)
        return (cudaError_t.cudaSuccess,)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (cudaError_t.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[Any, ...]:
        del self.graphs[graphExec]
        return (cudaError_t.cudaSuccess,)


def install() -> None:
    """For a process of its own: TensorRT and CUDA are this double, of one device. Environment: DOUBLE_FAULT, a file whose first reader's device dies."""
    device = Device()
    fault = os.environ.get("DOUBLE_FAULT", "")
    genuine = device.cudaGraphLaunch

    def launch(graphExec: int, stream: int) -> tuple[Any, ...]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(fault)
            device.dead = cudaError_t.cudaErrorIllegalAddress
            return (device.dead,)
        return genuine(graphExec, stream)

    device.cudaGraphLaunch = launch  # type: ignore[method-assign]
    packages = {name: types.ModuleType(name) for name in ("cuda", "cuda.bindings")}
    packages["cuda.bindings"].runtime = runtime_of(device)  # type: ignore[attr-defined]
    sys.modules.update(packages)
    sys.modules["tensorrt"] = tensorrt_of(device)


def runtime_of(device: Device) -> types.ModuleType:
    """``cuda.bindings.runtime`` for that device."""
    module: Any = types.ModuleType("cuda.bindings.runtime")
    module.cudaStreamNonBlocking, module.cudaHostRegisterDefault = 1, 0
    module.cudaError_t, module.cudaMemcpyKind, module.cudaStreamCaptureMode = (
        cudaError_t,
        cudaMemcpyKind,
        cudaStreamCaptureMode,
    )
    for name in CALLS:
        setattr(module, name, _failing(device, name, getattr(device, name)))
    return module  # type: ignore[no-any-return]


CALLS = [name for name in vars(Device) if name.startswith("cuda")]
VALUED = {
    "cudaGetDeviceCount",
    "cudaGetDeviceProperties",
    "cudaMalloc",
    "cudaStreamCreateWithFlags",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
}


def _failing(device: Device, name: str, call: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    def called(*arguments: Any, **named: Any) -> tuple[Any, ...]:
        fault = device.faults.pop(name, None) or (device.dead if not name.startswith("cudaGetError") else None)
        if fault is None:
            return call(*arguments, **named)
        return (fault, None) if name in VALUED else (fault,)

    return called


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None: ...

    def log(self, severity: Severity, msg: str) -> None: ...


class IProgressMonitor:
    def __init__(self) -> None: ...


class IProfiler:
    def __init__(self) -> None: ...

    def report_layer_time(self, layer_name: str, ms: float) -> None: ...


class ProfilingVerbosity(Enum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class MemoryPoolType(Enum):
    WORKSPACE = 0


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class LayerInformationFormat(Enum):
    ONELINE, JSON = range(2)


class Dims(tuple[int, ...]):
    def __new__(cls, shape: tuple[int, ...]) -> Dims:
        return super().__new__(cls, shape)


class IHostMemory(bytes): ...


class ITensor:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, Dims(shape)


class INetworkDefinition:
    graph: bytes = b""

    def get_input(self, index: int) -> ITensor:
        (given,) = onnx.load_from_string(self.graph).graph.input
        return ITensor(given.name, tuple(each.dim_value or -1 for each in given.type.tensor_type.shape.dim))


class ParserError:
    def __init__(self, node: str) -> None:
        self._node = node

    def node_operator(self) -> str:
        return self._node

    def node_name(self) -> str:
        return f"{self._node}_7"

    def desc(self) -> str:
        return "no importer is registered for it"


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._wrong = network, list[ParserError]()

    def parse(self, model: bytes, path: str | None = None) -> bool:
        self._network.graph = model
        self._wrong = [
            ParserError(node.op_type) for node in onnx.load_from_string(model).graph.node if node.op_type == "NonZero"
        ]
        return not self._wrong

    @property
    def num_errors(self) -> int:
        return len(self._wrong)

    def get_error(self, index: int) -> ParserError:
        return self._wrong[index]


class IOptimizationProfile:
    shapes: dict[str, tuple[Dims, Dims, Dims]]

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        assert min[0] <= opt[0] <= max[0]
        self.shapes = {input: (min, opt, max)}


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(b"timed")


class IBuilderConfig:
    builder_optimization_level = 3
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.profiles: list[IOptimizationProfile] = []
        self._cache = ITimingCache(b"")

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool_size > 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache.content == b"of another GPU" and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Builder:
    unfused = 0  # how many attention layers a test wants to be left unfused
    impossible = ""  # why a test wants the build to fail
    builds = 0

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 0
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        Builder.builds += 1
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("timing", "", 2)
            if not all(config.progress_monitor.step_complete("timing", step) for step in range(2)):
                return None
            gate = os.environ.get(
                "DOUBLE_GATE"
            )  # a pipe, which blocks until the test has seen what it wants and writes
            if gate is not None:
                Path(gate).read_bytes()
            config.progress_monitor.phase_finish("timing")
        if self.impossible:
            self._logger.log(Severity.ERROR, self.impossible)
            return None
        profiles = [profile.shapes["pixels"] for profile in config.profiles]
        header = {
            "profiles": profiles,
            "unfused": self.unfused,
            "detailed": config.profiling_verbosity is ProfilingVerbosity.DETAILED,
        }
        return IHostMemory(b"PLAN" + json.dumps(header).encode() + b"\n" + network.graph)


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert format is LayerInformationFormat.JSON
        header, layers = self._engine.header, list[Any]()
        for node in self._engine.model.graph.node:
            layer = {
                "Name": node.name,
                "LayerType": "myelin",
                "TacticName": "",
                "Inputs": [{"Format/Datatype": "BFloat16"}],
            }
            if (
                node.op_type == "Attention"
                and len([each for each in layers if "softmax" in each["Name"]]) < header["unfused"]
            ):
                layer["Name"] = f"__myl_softmax_{node.name}"
            elif node.op_type == "Attention":
                layer["TacticName"] = "_gemm_mha_v2_0x1f"
            layers.append(layer)
        return json.dumps({"Layers": layers if header["detailed"] else [each["Name"] for each in layers]})


class ICudaEngine:
    def __init__(self, device: Device, plan: bytes) -> None:
        header, _, graph = plan.removeprefix(b"PLAN").partition(b"\n")
        self.device, self.header, self.model = device, json.loads(header), onnx.load_from_string(graph)
        self.evaluator = ReferenceEvaluator(self.model)
        self.shapes = {
            each.name: tuple(dim.dim_value or -1 for dim in each.type.tensor_type.shape.dim)
            for each in [*self.model.graph.input, *self.model.graph.output]
        }

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.header["profiles"])

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self.shapes[name])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        assert name == "pixels"
        return [Dims(tuple(each)) for each in self.header["profiles"][profile_index]]

    @property
    def device_memory_size_v2(self) -> int:
        return 256

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext | None:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)


class IExecutionContext:
    profiler: IProfiler | None = None

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._profile = engine, 0
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()
        self._seen: set[tuple[int, tuple[int, ...]]] = set()
        self._captured = False
        self._scratch = 0

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        assert len(self._engine.device.allocated[memory]) >= size
        self._scratch = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert not self._captured, "a graph holds the context as it was"
        self._profile, self._shape = profile_index, ()
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self._captured, "a graph holds the context as it was"
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shape = tuple(shape)
        return all(low <= each <= high for low, each, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine.shapes

    def execute_async_v3(self, stream_handle: int) -> bool:
        if set(self._addresses) != set(self._engine.shapes) or not self._shape or not self._scratch:
            return False
        self._captured |= stream_handle in self._engine.device.capturing
        shape, addresses, device = self._shape, dict(self._addresses), self._engine.device
        if stream_handle in device.capturing and (self._profile, shape) not in self._seen:
            return False
        self._seen.add((self._profile, shape))

        def run() -> None:
            pixels = np.frombuffer(ctypes.string_at(addresses["pixels"], int(np.prod(shape))), np.uint8).reshape(shape)
            for name, values in zip(
                ("logits", "embedding"), self._engine.evaluator.run(None, {"pixels": pixels}), strict=True
            ):
                content = np.asarray(values, np.float32).tobytes()
                ctypes.memmove(addresses[name], content, len(content))
            if self.profiler is not None:
                for node in self._engine.model.graph.node:
                    self.profiler.report_layer_time(node.name, 0.25)

        device.enqueue(stream_handle, run)
        return True


class Runtime:
    device: Device

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if not serialized_engine.startswith(b"PLAN"):
            self._logger.log(Severity.ERROR, "the plan is of another version")
            return None
        return ICudaEngine(self.device, serialized_engine)


class Binding:
    """ONNX Runtime's own IOBinding, of memory that is the device's."""

    def __init__(self, session: Any, device: Device) -> None:
        self.genuine, self._device = session.io_binding(), device

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        self._check(device_type, device_id, element_type, shape, buffer_ptr)
        self.genuine.bind_input(name, "cpu", 0, element_type, shape, buffer_ptr)

    def bind_output(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        self._check(device_type, device_id, element_type, shape, buffer_ptr)
        self.genuine.bind_output(name, "cpu", 0, element_type, shape, buffer_ptr)

    def _check(self, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        assert np.prod(shape) * np.dtype(element_type).itemsize <= len(self._device.allocated[buffer_ptr]), (
            "beyond the memory that was allocated"
        )


def onnxruntime_of(device: Device, *, unplaced: str = "", loads: bool = True) -> types.ModuleType:
    """``onnxruntime`` with a CUDA provider for that device: the genuine one computes, on the CPU, when the stream runs.

    ``unplaced`` is an operator that the provider has no kernel for. Without ``loads`` the provider's libraries are missing, as where CUDA is not installed.
    """

    class InferenceSession:
        def __init__(
            self, path: Path, sess_options: Any, providers: list[tuple[str, dict[str, str]]], enable_fallback: int
        ) -> None:
            ((name, self._options),) = providers
            assert (name, enable_fallback) == ("CUDAExecutionProvider", 0)
            assert sess_options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
            if not loads or any(
                node.op_type == unplaced for node in onnx.load(path, load_external_data=False).graph.node
            ):
                raise RuntimeError(
                    "This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been disabled"
                )
            self._session = genuine.InferenceSession(path, providers=["CPUExecutionProvider"])
            self._thread: int | None = None

        def io_binding(self) -> Binding:
            return Binding(self._session, device)

        def run_with_iobinding(self, iobinding: Binding, run_options: Any) -> None:
            assert run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
            assert run_options.get_run_config_entry("gpu_graph_id")
            self._thread = self._thread or threading.get_ident()
            assert self._thread == threading.get_ident(), (
                "another thread would capture its graphs again, while the device is at work"
            )
            if device.dead:
                raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")
            device.enqueue(
                int(self._options["user_compute_stream"]), lambda: self._session.run_with_iobinding(iobinding.genuine)
            )

    module: Any = types.ModuleType("onnxruntime")
    module.SessionOptions, module.RunOptions, module.IOBinding, module.InferenceSession = (
        genuine.SessionOptions,
        genuine.RunOptions,
        Binding,
        InferenceSession,
    )
    module.preload_dlls = lambda: None
    module.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return module  # type: ignore[no-any-return]


VERSION = "11.4.0.106"
TYPES: list[Any] = [
    ILogger,
    IProgressMonitor,
    IProfiler,
    ProfilingVerbosity,
    MemoryPoolType,
    LayerInformationFormat,
    ExecutionContextAllocationStrategy,
    Dims,
    OnnxParser,
    Builder,
    Runtime,
    # not called by their names, but as what the above return
    INetworkDefinition,
    ITensor,
    ParserError,
    IOptimizationProfile,
    ITimingCache,
    IBuilderConfig,
    IHostMemory,
    EngineInspector,
    ICudaEngine,
    IExecutionContext,
]


def tensorrt_of(device: Device) -> types.ModuleType:
    """``tensorrt`` for that device. What a test set on Builder is forgotten."""
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = VERSION
    for each in TYPES:
        setattr(module, each.__name__, each)
    Runtime.device, Builder.unfused, Builder.impossible, Builder.builds = device, 0, "", 0
    return module  # type: ignore[no-any-return]
