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
from vitserve.model.bundle.bundle import GRAPH, Artefact, Bundle
from vitserve.model.bundle.parity import CALIBRATED, Parity, compare
from vitserve.service import machine
from vitserve.service.engines.engine import Engine, EngineUnavailable
from vitserve.service.engines.gpu_artifacts import PlanOptions, build_plan, build_typed, plan_path, typed_path

log = logging.getLogger(__name__)

# OpenVINO and NNCF report their use to a server of their makers, from a fork of the process that imports them, which has been seen to lock up: it then held an
# engine process's channel, whose end the supervisor waited for in vain. Without this module they report nothing. It is set before either is imported, for
# whatever imports them imports this file first.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


@dataclass(frozen=True)
class EngineOptions:
    engine: str = "auto"
    precision: str = "auto"
    lanes: int = 1
    threads: int = 0  # per lane; 0: the machine's cores shared among the lanes
    max_batch: int = 8
    compiled_folder: str = ""  # where engines keep what they compiled, for a quicker start; empty: nowhere
    plan_folder: str = ""  # where TensorRT's plans and typed graphs lie or are built; empty: neither TensorRT nor ONNX Runtime on CUDA is used
    serve_meanwhile: bool = False  # leave out what has to be built first for minutes; missing_plans() says what that is
    compile: bool = False  # torch: have it make kernels of its own


# Fastest first, where nobody has measured: ViT-B/16 on two cores with VNNI and bf16, docs/benchmarks.md.
_FASTEST = (("openvino", "int8"), ("onnxruntime", "int8"), ("openvino", "bf16"), ("openvino", "fp32"), ("onnxruntime", "fp32"))
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


class NoEngine(RuntimeError):
    """No engine can serve the bundle here; the message gives each one's reason."""


class NotBuiltYet(EngineUnavailable):
    """It can serve once its plan is built."""


class Damaged(ValueError):
    """A file of the artefact is not the one that was proven."""


@dataclass(frozen=True)
class Refusal:
    engine: str
    precision: Precision
    cause: Literal["unavailable", "not_built", "damaged", "crashed", "golden_gate"]
    reason: str

    def __str__(self) -> str:
        return f"{self.engine} in {self.precision}: {self.reason}"


@dataclass(frozen=True)
class Opened:
    engine: Engine
    parity: Parity  # shown here and now, by the golden gate
    refused: tuple[Refusal, ...]  # why each better candidate is not the one


def open_engine(
    bundle: Bundle,
    options: EngineOptions,
    first: tuple[str, str] | None = None,
    progress: Callable[[str], None] = lambda step: None,
    trying: Callable[[str], None] = lambda engine: None,
    left_out: Collection[str] = (),
) -> Opened:
    """Opens the fastest of the bundle's artefacts that fits ``options``, can run here and passes the golden gate. Raises NoEngine.

    ``first`` is the engine and precision to try before all others, because they were measured to be the fastest here.
    ``progress`` is told of what takes minutes, ``trying`` of each engine and precision before it is opened; what is in ``left_out``, named so, is refused.
    """
    refused: list[Refusal] = []
    for artefact in candidates(bundle, options, first):
        engine = None
        cause: Literal["unavailable", "not_built", "damaged", "crashed", "golden_gate"] = "unavailable"
        trying(called := f"{artefact.engine} in {artefact.precision}")
        try:
            if called in left_out:
                cause = "crashed"
                raise EngineUnavailable("it ended the processes that opened it")
            engine = open_artefact(bundle, artefact, options, progress)
            cause = "golden_gate"
            return Opened(engine, golden_gate(engine, bundle, artefact), tuple(refused))
        except Exception as error:  # whatever a foreign library raises while it compiles or runs, the next engine may still serve
            if engine is not None:
                engine.close()
            if isinstance(error, Damaged):
                cause = "damaged"
            elif isinstance(error, NotBuiltYet):
                cause = "not_built"
            refused.append(Refusal(artefact.engine, artefact.precision, cause, str(error)))
            log.warning("refused: %s", refused[-1])
    raise NoEngine("; ".join(map(str, refused)) or f"the bundle has no artefact for engine {options.engine!r} in precision {options.precision!r}")


def build_missing(bundle: Bundle, options: EngineOptions, refused: Iterable[Refusal]) -> bool:
    """Builds the best plan that was missing when ``refused`` were; the next best where that fails. True once one is there."""
    missing = {(each.engine, each.precision) for each in refused if each.cause == "not_built"}
    for artefact in candidates(bundle, options):
        if (artefact.engine, artefact.precision) in missing:
            try:
                _made_for_the_gpu(bundle, artefact, dataclasses.replace(options, serve_meanwhile=False), log.debug)
            except Exception as error:  # what serves goes on serving
                log.error("what was to serve better cannot be built: %s", error)
                continue
            return True
    return False


def open_artefact(bundle: Bundle, artefact: Artefact, options: EngineOptions, progress: Callable[[str], None] = lambda step: None) -> Engine:
    """As open_one(), of what candidates() gives; what it needs is built first. Not yet proven. Raises Damaged, EngineUnavailable, and what libraries raise."""
    damage = [bundle.damaged[name] for name in artefact.files if name in bundle.damaged]
    if damage:
        raise Damaged("; ".join(damage))
    try:
        graph = _made_for_the_gpu(bundle, artefact, options, progress)
    except ImportError as error:
        raise _not_installed(artefact.engine, error) from error
    return open_one(artefact.engine, artefact.precision, graph or bundle.path / artefact.path, options)


def open_one(name: str, precision: Precision, graph: Path, options: EngineOptions) -> Engine:
    """``graph`` is the file that the engine runs; for TensorRT a plan, for ONNX Runtime on CUDA a typed graph.

    Raises EngineUnavailable where the library is absent or the hardware cannot do it.
    """
    threads = options.threads or max(1, machine.cores() // options.lanes)
    try:
        if name == "onnxruntime":
            from vitserve.service.engines.onnxruntime_engine import OnnxRuntimeEngine

            return OnnxRuntimeEngine(graph, precision, options.lanes, threads, options.max_batch)
        if name == "openvino":
            from vitserve.service.engines.openvino_engine import OpenVinoEngine

            return OpenVinoEngine(graph, precision, options.lanes, threads, options.max_batch, options.compiled_folder)
        if name == "tensorrt":
            from vitserve.service.engines.tensorrt.engine import TensorRtEngine

            return TensorRtEngine(graph, precision, options.lanes, options.max_batch)
        if name == "onnxruntime-cuda":
            from vitserve.service.engines.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine

            return OnnxRuntimeCudaEngine(graph, precision, options.lanes, options.max_batch)
        if name == "torch":
            from vitserve.service.engines.torch.engine import open_torch

            return open_torch(graph, precision, options.lanes, threads, options.max_batch, compiled=options.compile)
    except ImportError as error:
        raise _not_installed(name, error) from error
    raise EngineUnavailable(f"there is no engine called {name!r}")


def _not_installed(name: str, error: ImportError) -> EngineUnavailable:
    return EngineUnavailable(f"{name} is not installed ({error}): pip install '{_PACKAGES[name]}'")


def _made_for_the_gpu(bundle: Bundle, artefact: Artefact, options: EngineOptions, progress: Callable[[str], None]) -> Path | None:
    """What TensorRT or ONNX Runtime on CUDA runs; built if it is not there yet. None for other engines. Raises ImportError, EngineUnavailable."""
    folder, precision = Path(options.plan_folder), artefact.precision
    if artefact.engine == "tensorrt":
        from vitserve.service.engines.tensorrt.engine import target

        gpu = target()
        if precision == "fp8" and gpu.compute_capability < FP8_CAPABILITY:
            raise EngineUnavailable(f"fp8 needs compute capability {FP8_CAPABILITY}; the {gpu.gpu} has {gpu.compute_capability}")
        assert precision in ("bf16", "fp16", "fp8")
        chosen = PlanOptions(precision, max_batch=options.max_batch)
        path = plan_path(folder, bundle, artefact.path, chosen, gpu)
        failed = path.with_suffix(".failed")
        if not path.exists() and options.serve_meanwhile:
            if failed.exists():  # else every start and every reload would try again for minutes, on the device that serves
                raise EngineUnavailable(f"{failed.read_text()}; remove {failed} to have it tried again")
            raise NotBuiltYet("its plan is not built yet")
        if not path.exists():
            try:
                build_plan(bundle, artefact.path, path, chosen, progress)
            except EngineUnavailable as error:
                folder.mkdir(parents=True, exist_ok=True)
                failed.write_text(str(error))
                raise
            failed.unlink(missing_ok=True)
        return path
    if artefact.engine == "onnxruntime-cuda":
        from vitserve.service.engines.cuda import runtime

        runtime.count_devices()  # before anything is built for it
        path = typed_path(folder, bundle, precision)
        if not path.exists():
            build_typed(bundle, path, precision, progress)
        return path
    return None


def golden_gate(engine: Engine, bundle: Bundle, artefact: Artefact) -> Parity:
    """Runs the golden images. Raises ValueError where the outputs are not the source network's within what the precision allows and the artefact showed."""
    golden = bundle.golden()
    if not len(golden.pixels):
        raise ValueError("the bundle has no golden images")
    parts = [engine.run(0, golden.pixels[start : start + engine.max_batch]) for start in range(0, len(golden.pixels), engine.max_batch)]
    parity = compare(Outputs(*(np.concatenate(each) for each in zip(*parts, strict=True))), golden.reference)
    failure = parity.failure(engine.precision)
    if failure is None and engine.precision in CALIBRATED:  # what they may lose by themselves would hide much that is broken
        failure = _further_than(parity, artefact.parity)
    if failure:
        raise ValueError(f"golden images: {failure}")
    return parity


def _further_than(shown: Parity, accepted: Parity) -> str | None:
    if shown.typical > _SPREAD * accepted.typical + _SLACK:
        return f"typical outputs differ by {shown.typical:.2e} of their range; {accepted.typical:.2e} when the bundle was made"
    return None


def candidates(bundle: Bundle, options: EngineOptions, first: tuple[str, str] | None = None) -> list[Artefact]:
    """What fits ``options``, best first. Of every precision if none is asked for: each was found good enough by whoever exported it."""

    def place(artefact: Artefact) -> int:
        key = (artefact.engine, artefact.precision)
        if key == first:
            return -1
        if key not in _FASTEST or (artefact.precision == "int8" and not machine.multiplies_int8()):
            return len(_FASTEST)
        return _FASTEST.index(key)

    on_cpu = [each for each in bundle.manifest.artefacts if each.engine != "tensorrt"]
    return [*_fitting(_on_a_gpu(bundle, options), options), *sorted(_fitting([*on_cpu, *_torch_on_the_cpu(bundle, options)], options), key=place)]


def runs_on_gpu(artefact: Artefact) -> bool:
    return artefact.engine in ("tensorrt", "onnxruntime-cuda") or (artefact.engine == "torch" and bool(machine.gpus()))


def _fitting(artefacts: Iterable[Artefact], options: EngineOptions) -> Iterator[Artefact]:
    return (each for each in artefacts if options.engine in ("auto", each.engine) and options.precision in ("auto", each.precision))


def _on_a_gpu(bundle: Bundle, options: EngineOptions) -> Iterator[Artefact]:
    """What is made of the canonical graph for the very GPU that runs it, and what the bundle holds for TensorRT."""
    asked_for = options.engine in ("tensorrt", "onnxruntime-cuda")
    if not (asked_for or machine.gpus()):
        return
    if options.plan_folder:
        yield from (each for each in bundle.manifest.artefacts if each.engine == "tensorrt")  # fp8, which somebody wanted
    for engine, precision in _ON_A_GPU:
        if options.plan_folder or engine == "torch":
            yield from _of_the_canonical_graph(bundle, engine, precision)
    if options.engine == "torch":  # which on a GPU is only for who asks for it
        yield from _of_the_canonical_graph(bundle, "torch", "fp32")


def _torch_on_the_cpu(bundle: Bundle, options: EngineOptions) -> Iterator[Artefact]:
    """Only for who asks for it: every other engine is quicker."""
    if options.engine == "torch" and not machine.gpus():
        yield from _of_the_canonical_graph(bundle, "torch", "fp32")
        yield from _of_the_canonical_graph(bundle, "torch", "bf16")


def _of_the_canonical_graph(bundle: Bundle, engine: str, precision: Precision) -> Iterator[Artefact]:
    source = next((each for each in bundle.manifest.artefacts if each.path == GRAPH and each.precision == "fp32"), None)
    if source is not None:
        yield dataclasses.replace(source, engine=engine, precision=precision, attention=None, evaluation=None)
