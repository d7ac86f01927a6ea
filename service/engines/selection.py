"""Chooses the engine: the best that can run here and reproduces the golden images, else the next. The only place that knows them all."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vitserve.model.arrays import Outputs, Precision
from vitserve.model.bundle.bundle import GRAPH, Artifact, Bundle
from vitserve.model.bundle.parity import CALIBRATED, Parity, compare
from vitserve.service import machine
from vitserve.service.engines.engine import Engine, EngineOptions, EngineUnavailableError
from vitserve.service.engines.gpu_artifacts import PlanOptions, build_cast_graph, build_plan, cast_graph_path, plan_path

log = logging.getLogger(__name__)

# OpenVINO and NNCF report their use to a server of their makers, from a fork of the process that imports them, which has been seen to lock up: it then held an
# engine worker's channel, whose end the supervisor waited for in vain. Without this module they report nothing. It is set before either is imported, for
# whatever imports them imports this file first.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


# Fastest first, where nobody has measured: ViT-B/16 on two cores with VNNI and bf16, docs/benchmarks.md.
_FASTEST = (
    ("openvino", "int8"),
    ("onnxruntime", "int8"),
    ("openvino", "bf16"),
    ("openvino", "fp32"),
    ("onnxruntime", "fp32"),
)
_PACKAGES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "vitserve[tensorrt]",
    "onnxruntime-cuda": "vitserve[gpu]",
    "torch": "vitserve[torch]",
}
_ON_A_GPU: tuple[tuple[str, Precision], ...] = (
    ("tensorrt", "bf16"),
    ("tensorrt", "fp16"),
    ("onnxruntime-cuda", "bf16"),
    ("onnxruntime-cuda", "fp16"),
    ("torch", "bf16"),
    ("torch", "fp16"),
)
FP8_CAPABILITY = (8, 9)  # Ada; https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html
# An engine may be as far from its source as it was when it was accepted, and as far again: other CPUs round and saturate differently.
_SPREAD, _SLACK = 2.0, 0.01


class NoEngineError(RuntimeError):
    """No engine can serve the bundle here; the message gives each one's reason."""


class NotBuiltError(EngineUnavailableError):
    """It can serve once its plan is built."""


class DamagedArtifactError(ValueError):
    """A file of the artifact is not the one that was verified."""


@dataclass(frozen=True)
class EngineRejection:
    engine: str
    precision: Precision
    cause: Literal["unavailable", "not_built", "damaged", "crashed", "golden_check"]
    reason: str

    def __str__(self) -> str:
        return f"{self.engine} in {self.precision}: {self.reason}"


@dataclass(frozen=True)
class Opened:
    engine: Engine
    parity: Parity  # shown here and now, by the golden check
    rejected: tuple[EngineRejection, ...]  # why each better candidate is not the one


def open_engine(
    bundle: Bundle,
    options: EngineOptions,
    first: tuple[str, str] | None = None,
    progress: Callable[[str], None] = lambda step: None,
    trying: Callable[[str], None] = lambda engine: None,
    skipped: Collection[str] = (),
) -> Opened:
    """Opens the fastest of the bundle's artifacts that fits ``options``, can run here and passes the golden check. Raises NoEngine.

    ``first`` is the engine and precision to try before all others, because they were measured to be the fastest here.
    ``progress`` is told of what takes minutes, ``trying`` of each engine and precision before it is opened; what is in ``skipped``, named so, is rejected.
    """
    rejected: list[EngineRejection] = []
    for artifact in candidates(bundle, options, first):
        engine = None
        cause: Literal["unavailable", "not_built", "damaged", "crashed", "golden_check"] = "unavailable"
        trying(called := f"{artifact.engine} in {artifact.precision}")
        try:
            if called in skipped:
                cause = "crashed"
                raise EngineUnavailableError("it ended the processes that opened it")
            engine = open_artifact(bundle, artifact, options, progress)
            cause = "golden_check"
            return Opened(engine, golden_check(engine, bundle, artifact), tuple(rejected))
        except (
            Exception
        ) as error:  # whatever a foreign library raises while it compiles or runs, the next engine may still serve
            if engine is not None:
                engine.close()
            if isinstance(error, DamagedArtifactError):
                cause = "damaged"
            elif isinstance(error, NotBuiltError):
                cause = "not_built"
            rejected.append(EngineRejection(artifact.engine, artifact.precision, cause, str(error)))
            log.warning("rejected: %s", rejected[-1])
    raise NoEngineError(
        "; ".join(map(str, rejected))
        or f"the bundle has no artifact for engine {options.engine!r} in precision {options.precision!r}"
    )


def build_missing(bundle: Bundle, options: EngineOptions, rejected: Iterable[EngineRejection]) -> bool:
    """Builds the best plan that was missing when ``rejected`` were; the next best where that fails. True once one is there."""
    missing = {(each.engine, each.precision) for each in rejected if each.cause == "not_built"}
    for artifact in candidates(bundle, options):
        if (artifact.engine, artifact.precision) in missing:
            try:
                _made_for_the_gpu(bundle, artifact, dataclasses.replace(options, serve_meanwhile=False), log.debug)
            except Exception as error:  # what serves goes on serving
                log.error("what was to serve better cannot be built: %s", error)
                continue
            return True
    return False


def open_artifact(
    bundle: Bundle, artifact: Artifact, options: EngineOptions, progress: Callable[[str], None] = lambda step: None
) -> Engine:
    """As open_one(), of what candidates() gives; what it needs is built first. Not yet verified. Raises Damaged, EngineUnavailable, and what libraries raise."""
    damage = [bundle.damaged_files[name] for name in artifact.files if name in bundle.damaged_files]
    if damage:
        raise DamagedArtifactError("; ".join(damage))
    try:
        graph = _made_for_the_gpu(bundle, artifact, options, progress)
    except ImportError as error:
        raise _not_installed(artifact.engine, error) from error
    return open_one(artifact.engine, artifact.precision, graph or bundle.path / artifact.path, options)


def open_one(name: str, precision: Precision, graph: Path, options: EngineOptions) -> Engine:
    """``graph`` is the file that the engine runs; for TensorRT a plan, for ONNX Runtime on CUDA a typed graph.

    Raises EngineUnavailable where the library is absent or the hardware cannot do it.
    """
    threads = options.threads or max(1, machine.cores() // options.streams)
    try:
        if name == "onnxruntime":
            from vitserve.service.engines.onnxruntime_engine import OnnxRuntimeEngine

            return OnnxRuntimeEngine(graph, precision, options.streams, threads, options.max_batch)
        if name == "openvino":
            from vitserve.service.engines.openvino_engine import OpenVinoEngine

            return OpenVinoEngine(
                graph, precision, options.streams, threads, options.max_batch, options.engine_cache_dir
            )
        if name == "tensorrt":
            from vitserve.service.engines.tensorrt.engine import TensorRtEngine

            return TensorRtEngine(graph, precision, options.streams, options.max_batch)
        if name == "onnxruntime-cuda":
            from vitserve.service.engines.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine

            return OnnxRuntimeCudaEngine(graph, precision, options.streams, options.max_batch)
        if name == "torch":
            from vitserve.service.engines.torch.engine import open_torch

            return open_torch(graph, precision, options.streams, threads, options.max_batch, compiled=options.compile)
    except ImportError as error:
        raise _not_installed(name, error) from error
    raise EngineUnavailableError(f"there is no engine called {name!r}")


def _not_installed(name: str, error: ImportError) -> EngineUnavailableError:
    return EngineUnavailableError(f"{name} is not installed ({error}): pip install '{_PACKAGES[name]}'")


def _made_for_the_gpu(
    bundle: Bundle, artifact: Artifact, options: EngineOptions, progress: Callable[[str], None]
) -> Path | None:
    """What TensorRT or ONNX Runtime on CUDA runs; built if it is not there yet. None for other engines. Raises ImportError, EngineUnavailable."""
    directory, precision = Path(options.plan_dir), artifact.precision
    if artifact.engine == "tensorrt":
        from vitserve.service.engines.tensorrt.engine import target

        gpu = target()
        if precision == "fp8" and gpu.compute_capability < FP8_CAPABILITY:
            raise EngineUnavailableError(
                f"fp8 needs compute capability {FP8_CAPABILITY}; the {gpu.gpu} has {gpu.compute_capability}"
            )
        assert precision in ("bf16", "fp16", "fp8")
        chosen = PlanOptions(precision, max_batch=options.max_batch)
        path = plan_path(directory, bundle, artifact.path, chosen, gpu)
        failed = path.with_suffix(".failed")
        if not path.exists() and options.serve_meanwhile:
            if (
                failed.exists()
            ):  # else every start and every reload would try again for minutes, on the device that serves
                raise EngineUnavailableError(f"{failed.read_text()}; remove {failed} to have it tried again")
            raise NotBuiltError("its plan is not built yet")
        if not path.exists():
            try:
                build_plan(bundle, artifact.path, path, chosen, progress)
            except EngineUnavailableError as error:
                directory.mkdir(parents=True, exist_ok=True)
                failed.write_text(str(error))
                raise
            failed.unlink(missing_ok=True)
        return path
    if artifact.engine == "onnxruntime-cuda":
        from vitserve.service.engines.cuda import runtime

        runtime.count_devices()  # before anything is built for it
        path = cast_graph_path(directory, bundle, precision)
        if not path.exists():
            build_cast_graph(bundle, path, precision, progress)
        return path
    return None


def golden_check(engine: Engine, bundle: Bundle, artifact: Artifact) -> Parity:
    """Runs the golden images. Raises ValueError where the outputs are not the source network's within what the precision allows and the artifact showed."""
    golden = bundle.golden()
    if not len(golden.pixels):
        raise ValueError("the bundle has no golden images")
    parts = [
        engine.run(0, golden.pixels[start : start + engine.max_batch])
        for start in range(0, len(golden.pixels), engine.max_batch)
    ]
    parity = compare(Outputs(*(np.concatenate(each) for each in zip(*parts, strict=True))), golden.reference)
    failure = parity.failure(engine.precision)
    if (
        failure is None and engine.precision in CALIBRATED
    ):  # what they may lose by themselves would hide much that is broken
        failure = _further_than(parity, artifact.parity)
    if failure:
        raise ValueError(f"golden images: {failure}")
    return parity


def _further_than(shown: Parity, accepted: Parity) -> str | None:
    if shown.typical > _SPREAD * accepted.typical + _SLACK:
        return f"typical outputs differ by {shown.typical:.2e} of their range; {accepted.typical:.2e} when the bundle was made"
    return None


def candidates(bundle: Bundle, options: EngineOptions, first: tuple[str, str] | None = None) -> list[Artifact]:
    """What fits ``options``, best first. Of every precision if none is asked for: each was found good enough by whoever exported it."""

    def place(artifact: Artifact) -> int:
        key = (artifact.engine, artifact.precision)
        if key == first:
            return -1
        if key not in _FASTEST or (artifact.precision == "int8" and not machine.multiplies_int8()):
            return len(_FASTEST)
        return _FASTEST.index(key)

    on_cpu = [each for each in bundle.manifest.artifacts if each.engine != "tensorrt"]
    return [
        *_fitting(_on_a_gpu(bundle, options), options),
        *sorted(_fitting([*on_cpu, *_torch_on_the_cpu(bundle, options)], options), key=place),
    ]


def runs_on_gpu(artifact: Artifact) -> bool:
    return artifact.engine in ("tensorrt", "onnxruntime-cuda") or (artifact.engine == "torch" and bool(machine.gpus()))


def _fitting(artifacts: Iterable[Artifact], options: EngineOptions) -> Iterator[Artifact]:
    return (
        each
        for each in artifacts
        if options.engine in ("auto", each.engine) and options.precision in ("auto", each.precision)
    )


def _on_a_gpu(bundle: Bundle, options: EngineOptions) -> Iterator[Artifact]:
    """What is made of the reference graph for the very GPU that runs it, and what the bundle holds for TensorRT."""
    asked_for = options.engine in ("tensorrt", "onnxruntime-cuda")
    if not (asked_for or machine.gpus()):
        return
    if options.plan_dir:
        yield from (
            each for each in bundle.manifest.artifacts if each.engine == "tensorrt"
        )  # fp8, which somebody wanted
    for engine, precision in _ON_A_GPU:
        if options.plan_dir or engine == "torch":
            yield from _of_reference_graph(bundle, engine, precision)
    if options.engine == "torch":  # which on a GPU is only for who asks for it
        yield from _of_reference_graph(bundle, "torch", "fp32")


def _torch_on_the_cpu(bundle: Bundle, options: EngineOptions) -> Iterator[Artifact]:
    """Only for who asks for it: every other engine is quicker."""
    if options.engine == "torch" and not machine.gpus():
        yield from _of_reference_graph(bundle, "torch", "fp32")
        yield from _of_reference_graph(bundle, "torch", "bf16")


def _of_reference_graph(bundle: Bundle, engine: str, precision: Precision) -> Iterator[Artifact]:
    source = next((each for each in bundle.manifest.artifacts if each.path == GRAPH and each.precision == "fp32"), None)
    if source is not None:
        yield dataclasses.replace(source, engine=engine, precision=precision, attention=None, evaluation=None)
