"""Builds a TensorRT plan from a graph, and reads from TensorRT's layer information whether its attention is fused.

    graph ──parse──► network ──build──► plan ──layer information──► PlanReport

No attention is marked as decomposable, so TensorRT has to compute it in one kernel or fail. This is not a guarantee:
some networks of one head were taken apart without an error. So the layers are read in any case, for every profile.

Reference, for TensorRT 11:
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, SupportsBytes, SupportsInt, cast

from vitserve.model.bundle.plan import TITLES, PlanReport
from vitserve.service.engines.gpu_artifacts import PlanOptions
from vitserve.service.engines.tensorrt.logger import LOGGER, Messages
from vitserve.service.engines.tensorrt.plan_report import (
    PlanLayer,
    attention_types,
    inspected_layers,
    kernels_of_profiles,
    logged_layers,
)
from vitserve.service.engines.tensorrt.provider import choose, set_target
from vitserve.service.engines.tensorrt.target import local_target

if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = choose().load()

PROFILES = (1, 8)  # largest batch of each profile; the last profile reaches max_batch
WORKSPACE_BYTES = 4 << 30  # limit for building and for the plan's scratch memory

Progress = Callable[[str], bool]  # receives a step; returns False to cancel the build


class PlanError(RuntimeError):
    """No plan was built. The message has TensorRT's reasons, or the attention that it did not fuse."""


class BuildCanceledError(PlanError):
    """``progress`` returned False."""


class BuiltPlan(NamedTuple):
    plan: bytes
    report: PlanReport


def build(
    graph: bytes, attention: int, options: PlanOptions, cache: Path | None = None, progress: Progress = lambda _: True
) -> BuiltPlan:
    """The plan of a serialized ONNX graph with ``attention`` Attention operators.

    The directory ``cache`` keeps measurements of kernels for the next build.

    Raises PlanError.
    """
    builder, monitor = trt.Builder(LOGGER), _Monitor(progress)
    timings = cache / f"timings-trt{trt.__version__}.cache" if cache and choose().times_kernels else None
    with LOGGER.collected() as messages:
        network = _parse(builder, graph, messages)
        config = _config(builder, network, options, monitor)
        if timings is not None:
            _use_timings(config, timings)
        started = time.monotonic()
        serialized = builder.build_serialized_network(network, config)
        seconds = time.monotonic() - started
    if monitor.canceled:
        raise BuildCanceledError("the build was canceled")
    if serialized is None:
        raise PlanError(
            f"TensorRT failed to build a plan with {attention} fused attention layers: {'; '.join(messages.errors)}"
        )
    plan = _content(serialized)
    report = _report(plan, messages, attention, options, seconds)
    if not report.fused:
        raise PlanError(f"TensorRT did not fuse all of the attention: {report}")
    if timings is not None:
        timings.write_bytes(_content(config.get_timing_cache().serialize()))
    return BuiltPlan(plan, report)


def profile_ranges(max_batch: int) -> list[tuple[int, int]]:
    """(smallest, largest) batch of each profile, tuned for the largest. A batch of 1 has its own profile."""
    largest = [*(size for size in PROFILES if size < max_batch), max_batch]
    return [(1, size) for size in largest]


def _parse(builder: trt.Builder, graph: bytes, messages: Messages) -> trt.INetworkDefinition:
    network = builder.create_network(0)  # strongly typed: TensorRT 11 has no other kind
    parser = trt.OnnxParser(network, LOGGER)
    if not parser.parse(graph):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
        raise PlanError(f"TensorRT rejects the graph: {'; '.join(reasons or messages.errors)}")
    return network


def _config(
    builder: trt.Builder, network: trt.INetworkDefinition, options: PlanOptions, monitor: trt.IProgressMonitor
) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # otherwise nothing names the kernels
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.progress_monitor = monitor
    set_target(choose(), trt, config, options.capabilities)
    pixels = network.get_input(0)
    image = tuple(int(pixels.shape[index]) for index in range(1, len(pixels.shape)))
    for least, most in profile_ranges(options.max_batch):
        profile = builder.create_optimization_profile()
        profile.set_shape(pixels.name, trt.Dims((least, *image)), trt.Dims((most, *image)), trt.Dims((most, *image)))
        config.add_optimization_profile(profile)
    return config


def _use_timings(config: trt.IBuilderConfig, path: Path) -> None:
    """Reuses the timings of earlier builds. Those of another GPU or TensorRT are ignored, and all tactics are timed."""
    timings = config.create_timing_cache(path.read_bytes()) if path.exists() else None  # None if it cannot be read
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _report(plan: bytes, messages: Messages, attention: int, options: PlanOptions, seconds: float) -> PlanReport:
    layers, provider = _layers(plan, messages), choose()
    kernels = kernels_of_profiles(layers, [most for _, most in profile_ranges(options.max_batch)])
    return PlanReport(
        provider.library,
        str(trt.__version__),
        options.capabilities or (local_target().compute_capability,),
        attention,
        attention_types(layers),
        kernels,
        len(plan),
        seconds,
    )


def _layers(plan: bytes, messages: Messages) -> Sequence[PlanLayer]:
    if choose().logs_layers:
        try:
            return logged_layers(messages.layers)
        except ValueError as error:
            raise PlanError(
                f"the layers of {TITLES[choose().library]} {trt.__version__} are unknown: {error}"
            ) from error
    with LOGGER.collected() as reading:
        engine = trt.Runtime(LOGGER).deserialize_cuda_engine(plan)
    if engine is None:
        raise PlanError(f"TensorRT cannot read the plan that it built: {'; '.join(reading.errors)}")
    inspected = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return inspected_layers(inspected)


def _content(memory: trt.IHostMemory) -> bytes:
    return bytes(cast(SupportsBytes, memory))  # it supports the buffer protocol, which its stubs do not declare


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]  # untyped unless TensorRT is installed
    """TensorRT calls these methods from its own threads."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress, self._steps = progress, dict[str, int]()
        self.canceled = False

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: SupportsInt) -> None:
        self._steps[phase_name] = int(num_steps)

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        """Returns False to cancel the build."""
        if not self._progress(f"{phase_name}: {int(step) + 1} of {self._steps.get(phase_name, 0)}"):
            self.canceled = True
        return not self.canceled

    def phase_finish(self, phase_name: str) -> None:
        self._steps.pop(phase_name, None)
