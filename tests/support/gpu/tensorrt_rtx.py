"""A double of TensorRT for RTX: the double of TensorRT, with what this library has in addition.

It builds for listed compute capabilities, logs the layers of a plan, and compiles kernels at run time.
test_tensorrt_rtx.py checks that every name and argument exists in the genuine library.
"""

from __future__ import annotations

import types
from enum import Enum
from typing import Any, ClassVar

import onnx

from tests.support.gpu import tensorrt
from tests.support.gpu.cuda import Device
from tests.support.gpu.rejections import Capability
from tests.support.gpu.tensorrt_builder import (
    Builder,
    ExecutionContextAllocationStrategy,
    IBuilderConfig,
    IHostMemory,
    INetworkDefinition,
    LogSeverity,
    layers_of,
)

VERSION = "1.7.1.116"


class BuilderFlag(Enum):
    REQUIRE_USER_ALLOCATION = 20


class ComputeCapability(Enum):
    NONE, CURRENT, SM75, SM80, SM86, SM89, SM120, SM121 = range(8)


class CudaGraphStrategy(Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class RtxConfig(IBuilderConfig):
    def __init__(self) -> None:
        super().__init__()
        self.flags: set[BuilderFlag] = set()
        self.targets: list[ComputeCapability] = []

    @property
    def num_compute_capabilities(self) -> int:
        return len(self.targets)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self.targets = [ComputeCapability.NONE] * count

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        self.targets[index] = compute_capability
        return True

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        raise DeprecationWarning("TensorRT for RTX does not measure kernels")


class RtxBuilder(Builder):
    def create_builder_config(self) -> IBuilderConfig:
        return RtxConfig()

    def _capabilities(self, config: IBuilderConfig) -> list[Capability]:
        assert isinstance(config, RtxConfig)
        assert BuilderFlag.REQUIRE_USER_ALLOCATION in config.flags, "the plan could not be captured in a CUDA graph"
        digits = [target.name.removeprefix("SM") for target in config.targets]
        return [self.device.capability if each == "CURRENT" else (int(each[:-1]), int(each[-1])) for each in digits]

    def _describe(self, network: INetworkDefinition, header: dict[str, Any]) -> None:
        """The message of the genuine builder, shortened to what the report reads."""
        layers = layers_of(onnx.load_from_string(network.graph), header)
        lines = ["Layers:", *map(_line, layers if header["detailed"] else [])]
        self._logger.log(LogSeverity.VERBOSE, "\n".join(lines))


def _line(layer: dict[str, Any]) -> str:
    inputs = ", ".join(f"{{ Name: {each['Name']}, Datatype: {each['Datatype']} }}" for each in layer["Inputs"])
    return (
        f"Name: {layer['Name']}, LayerType: {layer['LayerType']}, Inputs: [ {inputs}], Constants: [], Outputs: [], "
        f"TacticName: {layer['TacticName']}, StreamId: 0, Metadata: "
    )


class IRuntimeCache:
    """Holds b"kernels of " and the GPU. Genuine caches are of one GPU, driver and version too."""

    def __init__(self, device: Device) -> None:
        self.device, self.loaded = device, False

    def serialize(self) -> IHostMemory:
        return IHostMemory(f"kernels of {self.device.gpu}".encode())

    def deserialize(self, blob: bytes) -> bool:
        self.loaded = blob == bytes(self.serialize())
        return self.loaded


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
    cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def __init__(self, device: Device) -> None:
        self._device = device
        self.strategy: ExecutionContextAllocationStrategy | None = None
        self.cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._device)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class RtxEngine(tensorrt.ICudaEngine):
    settings: ClassVar[list[IRuntimeConfig]] = []  # of all contexts, for tests

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self.device)

    def create_execution_context(self, strategy: Any) -> tensorrt.IExecutionContext | None:
        assert isinstance(strategy, IRuntimeConfig)
        eager = DynamicShapesKernelSpecializationStrategy.EAGER
        assert strategy.dynamic_shapes_kernel_specialization_strategy is eager, "kernels change under a CUDA graph"
        assert strategy.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        RtxEngine.settings.append(strategy)
        return tensorrt.IExecutionContext(self)


class RtxRuntime(tensorrt.Runtime):
    engine = RtxEngine


NAMES: dict[str, type] = {
    "BuilderFlag": BuilderFlag,
    "ComputeCapability": ComputeCapability,
    "CudaGraphStrategy": CudaGraphStrategy,
    "DynamicShapesKernelSpecializationStrategy": DynamicShapesKernelSpecializationStrategy,
    "IRuntimeCache": IRuntimeCache,
    "IRuntimeConfig": IRuntimeConfig,
    "IBuilderConfig": RtxConfig,
    "Builder": RtxBuilder,
    "ICudaEngine": RtxEngine,
    "Runtime": RtxRuntime,
}


def tensorrt_rtx_of(device: Device) -> types.ModuleType:
    """The module ``tensorrt_rtx_bindings`` for ``device``."""
    module = tensorrt.module_of("tensorrt_rtx_bindings", VERSION, tensorrt.TYPES, device)
    vars(module).update(NAMES)
    RtxEngine.settings = []
    return module
