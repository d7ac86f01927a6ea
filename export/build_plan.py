"""Builds a TensorRT plan for the GPU of this machine and checks that its attention is fused. Needs no torch.

    python -m vitserve.export.build_plan GRAPH PLAN DEPTH OPTIONS

prints one line per step. The last line is the PlanReport, or the reason why there is no plan. The service runs this
module when a plan is missing (service/engines/gpu_artifacts.py).

    cast graph ──parse──► network ──build──► plan ──inspect──► PlanReport

In the graph each attention is one operator, which TensorRT may not decompose by default. A build either fuses it or
fails. Reference, for TensorRT 11:
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import SupportsBytes, SupportsInt, cast

import onnx_ir as ir
import tensorrt as trt

from vitserve.export.graph.cast_precision import cast_graph
from vitserve.service.engines.gpu_artifacts import PlanOptions
from vitserve.service.engines.tensorrt.engine import TensorRtLogger, shape_of
from vitserve.service.engines.tensorrt.plan_report import PlanReport, report_of

PROFILES = (1, 8)  # largest batch of each profile; the last profile reaches max_batch
WORKSPACE_BYTES = 4 << 30  # limit for building and for the plan's scratch memory

Progress = Callable[[str], bool]  # receives a step; returns False to cancel the build


class PlanError(RuntimeError):
    """No plan was built. The message names the node that TensorRT rejects, or the attention that it does not fuse."""


class BuildCanceledError(PlanError):
    """``progress`` returned False."""


def plan_for(
    source: Path, path: Path, depth: int, options: PlanOptions, progress: Progress = lambda step: True
) -> PlanReport:
    """Builds the plan at ``path``, unless it exists. Of two concurrent calls one builds and the other waits.

    ``source`` is the reference graph, or the quantized graph for fp8. ``depth`` attention layers must be fused.
    Raises PlanError; then there is no file at ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        report_path = path.with_suffix(".json")
        if path.exists() and report_path.exists():
            return PlanReport.from_json(report_path.read_text())
        graph = ir.to_proto(cast_graph(source, options.precision)).SerializeToString()
        plan, report = _build(graph, path.parent, depth, options, progress)
        _write(report_path, report.to_json().encode())
        _write(path, plan)  # after its report, because a plan is complete once it exists
        return report


def _write(path: Path, content: bytes) -> None:
    """Atomic."""
    temporary = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """The kernel releases the lock when the process ends, however it ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    graph: bytes, directory: Path, depth: int, options: PlanOptions, progress: Progress
) -> tuple[bytes, PlanReport]:
    logger = TensorRtLogger()
    builder = trt.Builder(logger)
    network = _parse(builder, graph, logger)
    monitor, timings = _Monitor(progress), directory / f"timings-trt{trt.__version__}.cache"
    config = _config(builder, network, options.max_batch, monitor, timings)
    serialized = builder.build_serialized_network(network, config)
    if monitor.canceled:
        raise BuildCanceledError("the build was canceled")
    if serialized is None:
        raise PlanError(
            f"TensorRT failed to build a plan with {depth} fused attention layers: {'; '.join(logger.errors)}"
        )
    plan = _content(serialized)
    report = _inspect(plan, depth, logger)
    if not report.fused:
        raise PlanError(f"TensorRT did not fuse all of the attention: {report}")
    _write(timings, _content(config.get_timing_cache().serialize()))
    return plan, report


def _parse(builder: trt.Builder, graph: bytes, logger: TensorRtLogger) -> trt.INetworkDefinition:
    network = builder.create_network(0)  # strongly typed: TensorRT 11 has no other kind
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise PlanError("; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors))
    return network


def _config(
    builder: trt.Builder, network: trt.INetworkDefinition, max_batch: int, monitor: trt.IProgressMonitor, timings: Path
) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector does not name the kernels
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.progress_monitor = monitor
    _use_timings(config, timings)
    pixels = network.get_input(0)
    image = shape_of(pixels.shape)[1:]
    for least, most in profile_ranges(max_batch):
        profile = builder.create_optimization_profile()
        profile.set_shape(pixels.name, trt.Dims((least, *image)), trt.Dims((most, *image)), trt.Dims((most, *image)))
        config.add_optimization_profile(profile)
    return config


def _use_timings(config: trt.IBuilderConfig, path: Path) -> None:
    """Reuses the timings of earlier builds. Those of another GPU or TensorRT are ignored, and all tactics are timed."""
    timings = config.create_timing_cache(path.read_bytes()) if path.exists() else None  # None if it cannot be read
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _inspect(plan: bytes, depth: int, logger: TensorRtLogger) -> PlanReport:
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise PlanError(f"TensorRT cannot read the plan that it built: {'; '.join(logger.errors)}")
    return report_of(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON), depth)


def _content(memory: trt.IHostMemory) -> bytes:
    return bytes(cast(SupportsBytes, memory))  # it supports the buffer protocol, which its stubs do not declare


def profile_ranges(max_batch: int) -> list[tuple[int, int]]:
    """(smallest, largest) batch of each profile, tuned for the largest. A batch of 1 has its own profile."""
    largest = [*(size for size in PROFILES if size < max_batch), max_batch]
    return [(1, size) for size in largest]


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]  # as TensorRtLogger
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


def main() -> int:
    graph, path, depth, options = sys.argv[1:]

    def progress(step: str) -> bool:
        try:
            print(step, flush=True)  # noqa: T201  # the output is this program's interface
        except BrokenPipeError:  # the parent process has exited
            return False
        return True

    try:
        progress(str(plan_for(Path(graph), Path(path), int(depth), PlanOptions(**json.loads(options)), progress)))
    except PlanError as error:
        progress(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
