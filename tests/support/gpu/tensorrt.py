"""A double of TensorRT: plans run on the GPU double, computed by ONNX's reference evaluator.

It rejects a shape outside the active profile, and a capture before the shape's first run. test_tensorrt_stubs.py checks
that every name and argument exists in the real bindings.
"""

from __future__ import annotations

import ctypes
import json
import types
from importlib.machinery import ModuleSpec

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from tests.support.gpu.cuda import Device
from tests.support.gpu.tensorrt_builder import (
    Builder,
    Dims,
    ExecutionContextAllocationStrategy,
    IBuilderConfig,
    IHostMemory,
    ILogger,
    INetworkDefinition,
    IOptimizationProfile,
    IProfiler,
    IProgressMonitor,
    ITensor,
    ITimingCache,
    LayerInformationFormat,
    LogSeverity,
    MemoryPoolType,
    OnnxParser,
    ParserError,
    ProfilingVerbosity,
    dimensions_of,
    layers_of,
)


class ICudaEngine:
    def __init__(self, device: Device, plan: bytes) -> None:
        header, _, graph = plan.removeprefix(b"PLAN").partition(b"\n")
        self.device, self.header, self.model = device, json.loads(header), onnx.load_from_string(graph)
        self.evaluator = ReferenceEvaluator(self.model)
        values = [*self.model.graph.input, *self.model.graph.output]
        self.shapes = {value.name: dimensions_of(value) for value in values}

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.header["profiles"])

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self.shapes[name])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        assert name == "pixels"
        return [Dims(tuple(shape)) for shape in self.header["profiles"][profile_index]]

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
        self._initialized: set[tuple[int, tuple[int, ...]]] = set()
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
        assert not self._captured, "the context changed after its graph was captured"
        self._profile, self._shape = profile_index, ()
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self._captured, "the context changed after its graph was captured"
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shape = tuple(shape)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine.shapes

    def execute_async_v3(self, stream_handle: int) -> bool:
        if set(self._addresses) != set(self._engine.shapes) or not self._shape or not self._scratch:
            return False
        self._captured |= stream_handle in self._engine.device.capturing
        shape, addresses, device = self._shape, dict(self._addresses), self._engine.device
        if stream_handle in device.capturing and (self._profile, shape) not in self._initialized:
            return False
        self._initialized.add((self._profile, shape))

        def run() -> None:
            pixels = np.frombuffer(ctypes.string_at(addresses["pixels"], int(np.prod(shape))), np.uint8).reshape(shape)
            outputs = self._engine.evaluator.run(None, {"pixels": pixels})
            for name, values in zip(("logits", "embedding"), outputs, strict=True):
                content = np.asarray(values, np.float32).tobytes()
                ctypes.memmove(addresses[name], content, len(content))
            if self.profiler is not None:
                for layer in layers_of(self._engine.model, self._engine.header):
                    if f"_myl{self._profile}_" in layer["Name"]:
                        self.profiler.report_layer_time(layer["Name"], 0.25)

        device.enqueue(stream_handle, run)
        return True


class Runtime:
    device: Device
    engine: type[ICudaEngine] = ICudaEngine

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if not serialized_engine.startswith(b"PLAN"):
            self._logger.log(LogSeverity.ERROR, "header.magicTag == kEXPECTED_MAGIC_TAG failed")
            return None
        engine = self.engine(self.device, serialized_engine)
        if list(self.device.capability) not in engine.header["capabilities"]:
            self._logger.log(LogSeverity.ERROR, "the engine was not built for the compute capability of this device")
            return None
        return engine


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert format is LayerInformationFormat.JSON
        layers = layers_of(self._engine.model, self._engine.header)
        return json.dumps({"Layers": layers if self._engine.header["detailed"] else [each["Name"] for each in layers]})


VERSION = "11.4.0.106"
TYPES: list[type] = [
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
    # returned by the classes above
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
    """The module ``tensorrt`` for ``device``. Resets what a test set on Builder."""
    return module_of("tensorrt", VERSION, TYPES, device)


def module_of(name: str, version: str, kinds: list[type], device: Device) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # for find_spec()
    vars(module).update(__version__=version)
    for kind in kinds:
        setattr(module, kind.__name__, kind)
    Runtime.device, Builder.device, Builder.unfused, Builder.impossible, Builder.builds = device, device, 0, "", 0
    return module
