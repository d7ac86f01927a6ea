"""A bundle's graph → a TensorRT plan for the GPU of this machine, with the proof that its attention is fused. Run by service/engines/gpu_artifacts.py; no torch.

    python -m vitserve.export.build_plan GRAPH PLAN DEPTH OPTIONS

says on each line what it is at; the last one tells the proof, or why there is no plan.

    typed graph ──parse──► strongly typed network ──build──► plan ──inspect──► AttentionProof

Attention is given as one operator that TensorRT may not take apart (``decomposable`` is False unless said otherwise), so that a build either fuses it or fails.
The steps follow https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html, for TensorRT 11.
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

PROFILES = (1, 8)  # largest batch of each profile; a further one goes up to the largest batch that is served


class PlanError(RuntimeError):
    """No plan was made; the message says which node TensorRT could not take, or which attention it did not fuse."""


class BuildCanceledError(PlanError):
    """Whoever watches the progress wanted no more of it."""


def plan_for(
    source: Path, path: Path, depth: int, options: PlanOptions, progress: Callable[[str], bool] = lambda step: True
) -> PlanReport:
    """Builds the plan at ``path`` unless it is there already. Two who ask at once: one builds, the other waits and finds it.

    ``source`` is the reference graph, or for fp8 the quantized one. ``depth`` attention layers must be fused.
    ``progress`` is told each phase, and cancels by answering False. Raises PlanError; then nothing is at ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_suffix(".lock")):
        kept = path.with_suffix(".json")
        if path.exists() and kept.exists():
            return PlanReport.from_json(kept.read_text())
        plan, report = _build(
            ir.to_proto(cast_graph(source, options.precision)).SerializeToString(),
            path.parent,
            depth,
            options,
            progress,
        )
        for target, content in ((kept, report.to_json().encode()), (path, plan)):  # a plan is there once its report is
            _write(target, content)
        return report


def _write(target: Path, content: bytes) -> None:
    """At once or not at all."""
    fresh = target.with_suffix(f"{target.suffix}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.replace(target)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """The kernel lets go of it when its holder dies, however it dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    graph: bytes, directory: Path, depth: int, options: PlanOptions, progress: Callable[[str], bool]
) -> tuple[bytes, PlanReport]:
    logger = TensorRtLogger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # strongly typed: there is no other kind since TensorRT 11
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise PlanError("; ".join(f"{each.node_operator()} {each.node_name()}: {each.desc()}" for each in errors))
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = (
        trt.ProfilingVerbosity.DETAILED
    )  # else the inspector names no kernels, and fusion cannot be verified
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    monitor = _Monitor(progress)
    config.progress_monitor = monitor
    timings = directory / f"timings-trt{trt.__version__}.cache"
    known = (
        config.create_timing_cache(timings.read_bytes()) if timings.exists() else None
    )  # None too where it cannot be read
    if known is None or not config.set_timing_cache(known, ignore_mismatch=False):
        config.set_timing_cache(
            config.create_timing_cache(b""), ignore_mismatch=False
        )  # of another GPU or version: then every tactic is timed again
    pixels = network.get_input(0)
    image = shape_of(pixels.shape)[1:]
    for least, most in profile_ranges(options.max_batch):
        profile = builder.create_optimization_profile()
        profile.set_shape(pixels.name, trt.Dims((least, *image)), trt.Dims((most, *image)), trt.Dims((most, *image)))
        config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if monitor.cancelled:
        raise BuildCanceledError("the build was cancelled")
    if serialized is None:
        raise PlanError(
            f"TensorRT could not build it, of {depth} attention layers that must be fused: {'; '.join(logger.errors)}"
        )
    plan = _content(serialized)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise PlanError(f"TensorRT cannot read the plan that it built: {'; '.join(logger.errors)}")
    report = report_of(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON), depth)
    if not report.fused and not options.allow_unfused:
        raise PlanError(f"{report}; allow it if it shall be so")
    _write(timings, _content(config.get_timing_cache().serialize()))
    return plan, report


def _content(memory: trt.IHostMemory) -> bytes:
    return bytes(cast(SupportsBytes, memory))  # it has Python's buffer protocol, which no signature tells


def profile_ranges(max_batch: int) -> list[tuple[int, int]]:
    """(least, most) of each profile's batch, tuned for the most. A batch of 1 gets kernels of its own."""
    tops = [*(top for top in PROFILES if top < max_batch), max_batch]
    return [(1, top) for top in tops]


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]  # as TensorRtLogger
    """Called by TensorRT's own threads."""

    def __init__(self, progress: Callable[[str], bool]) -> None:
        super().__init__()
        self._progress, self._steps = progress, dict[str, int]()
        self.cancelled = False

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: SupportsInt) -> None:
        self._steps[phase_name] = int(num_steps)

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        """False cancels the build."""
        if not self._progress(f"{phase_name}: {int(step) + 1} of {self._steps.get(phase_name, 0)}"):
            self.cancelled = True
        return not self.cancelled

    def phase_finish(self, phase_name: str) -> None:
        self._steps.pop(phase_name, None)


def main() -> int:
    graph, path, depth, options = sys.argv[1:]

    def progress(step: str) -> bool:
        try:
            print(step, flush=True)  # noqa: T201  # whoever wants the plan reads it
        except BrokenPipeError:  # nobody does any more
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
