"""A double of TensorRT's builder. A "plan" is the ONNX graph with a header that holds what the build decided.

It rejects the graphs that the genuine library rejects (rejections.py).
"""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

import onnx

from tests.support.gpu.cuda import Device
from tests.support.gpu.rejections import Capability, Rejected, builder_rejection, parser_rejections


class LogSeverity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = LogSeverity

    def __init__(self) -> None: ...

    def log(self, severity: LogSeverity, msg: str) -> None: ...


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
        (value,) = onnx.load_from_string(self.graph).graph.input
        return ITensor(value.name, dimensions_of(value))


def dimensions_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """With -1 for the batch."""
    return tuple(dimension.dim_value or -1 for dimension in value.type.tensor_type.shape.dim)


class ParserError:
    def __init__(self, rejected: Rejected) -> None:
        self._rejected = rejected

    def node_operator(self) -> str:
        return self._rejected.operator

    def node_name(self) -> str:
        return self._rejected.node

    def desc(self) -> str:
        return self._rejected.reason


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, list[ParserError]()

    def parse(self, model: bytes, path: str | None = None) -> bool:
        self._network.graph = model
        self._errors = [ParserError(rejected) for rejected in parser_rejections(onnx.load_from_string(model))]
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


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
    unfused = 0  # number of attention layers that the next plans do not fuse
    impossible = ""  # if set, builds fail for this reason
    builds = 0
    device: Device

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
            gate = os.environ.get("DOUBLE_GATE")  # a named pipe: the build continues once the test has written to it
            if gate is not None:
                Path(gate).read_bytes()
            config.progress_monitor.phase_finish("timing")
        reason = self.impossible or self._rejection(network, config)
        if reason:
            self._logger.log(LogSeverity.ERROR, reason)
            return None
        header = {
            "profiles": [profile.shapes["pixels"] for profile in config.profiles],
            "unfused": self.unfused,
            "detailed": config.profiling_verbosity is ProfilingVerbosity.DETAILED,
            "capabilities": self._capabilities(config),
        }
        self._describe(network, header)
        return IHostMemory(b"PLAN" + json.dumps(header).encode() + b"\n" + network.graph)

    def _capabilities(self, config: IBuilderConfig) -> list[Capability]:
        return [self.device.capability]

    def _rejection(self, network: INetworkDefinition, config: IBuilderConfig) -> str | None:
        smallest = [profile.shapes["pixels"][0][0] for profile in config.profiles]
        return builder_rejection(onnx.load_from_string(network.graph), self._capabilities(config), smallest)

    def _describe(self, network: INetworkDefinition, header: dict[str, Any]) -> None:
        """TensorRT for data centers describes a plan only through its inspector."""


def layers_of(model: onnx.ModelProto, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of a plan, named as in plans of TensorRT for RTX: one for each node, in every profile."""
    return [
        _layer(node, profile, place, unfused=place in _unfused_places(model, header["unfused"]))
        for profile in range(len(header["profiles"]))
        for place, node in enumerate(model.graph.node)
    ]


def _unfused_places(model: onnx.ModelProto, count: int) -> list[int]:
    return [place for place, node in enumerate(model.graph.node) if node.op_type == "Attention"][:count]


def _layer(node: onnx.NodeProto, profile: int, place: int, unfused: bool) -> dict[str, Any]:
    kernel = node.name
    if node.op_type == "Attention":
        kernel = "__myl_SlicMaxrSubExpSumDiv" if unfused else "_gemm_mha_v2"
    inputs = [{"Name": name, "Datatype": "BFloat16"} for name in node.input]
    tactic = f"{kernel}_0x1f" if node.op_type == "Attention" else ""
    return {"Name": f"{kernel}_myl{profile}_{place}", "LayerType": "kgen", "TacticName": tactic, "Inputs": inputs}
