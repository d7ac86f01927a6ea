"""Chooses the engine: the best that can run here and reproduces the golden images, else the next. The only place that knows them all."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.bundle import GRAPH, Artefact, Bundle
from model.parity import Outputs, Parity, Precision, compare
from service import machine
from service.engines.engine import Engine, EngineUnavailable
from service.engines.plans import PlanOptions, build_elsewhere, plan_path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    engine: str = "auto"
    precision: str = "auto"
    lanes: int = 1
    threads: int = 0  # per lane; 0: the machine's cores shared among the lanes
    max_batch: int = 8
    compiled_folder: str = ""  # where engines keep what they compiled, for a quicker start; empty: nowhere
    plan_folder: str = ""  # where TensorRT's plans lie or are built; empty: TensorRT is not used


# Fastest first, where nobody has measured: ViT-B/16 on two cores with VNNI and bf16, docs/benchmarks.md.
_FASTEST = (("openvino", "int8"), ("onnxruntime", "int8"), ("openvino", "bf16"), ("openvino", "fp32"), ("onnxruntime", "fp32"))
_PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "vitserve[tensorrt]"}
# An engine may be as far from its source as it was when it was accepted, and as far again: other CPUs round and saturate differently.
_SPREAD, _SLACK = 2.0, 0.01


class NoEngine(RuntimeError):
    """No engine can serve the bundle here; the message gives each one's reason."""


@dataclass(frozen=True)
class Refusal:
    engine: str
    precision: Precision
    cause: Literal["unavailable", "damaged", "golden_gate"]
    reason: str

    def __str__(self) -> str:
        return f"{self.engine} in {self.precision}: {self.reason}"


@dataclass(frozen=True)
class Opened:
    engine: Engine
    parity: Parity  # shown here and now, by the golden gate
    refused: tuple[Refusal, ...]  # why each better candidate is not the one


def open_engine(bundle: Bundle, options: EngineOptions, first: tuple[str, str] | None = None, progress: Callable[[str], None] = lambda step: None) -> Opened:
    """Opens the fastest of the bundle's artefacts that fits ``options``, can run here and passes the golden gate. Raises NoEngine.

    ``first`` is the engine and precision to try before all others, because they were measured to be the fastest here.
    ``progress`` is told of what takes minutes.
    """
    refused: list[Refusal] = []
    for artefact in _candidates(bundle, options, first):
        engine = None
        cause: Literal["unavailable", "damaged", "golden_gate"] = "unavailable"
        try:
            damage = [bundle.damaged[name] for name in artefact.files if name in bundle.damaged]
            if damage:
                cause = "damaged"
                raise ValueError("; ".join(damage))
            graph = _plan(bundle, artefact.precision, options, progress) if artefact.engine == "tensorrt" else bundle.path / artefact.path
            engine = open_one(artefact.engine, artefact.precision, graph, options)
            cause = "golden_gate"
            return Opened(engine, golden_gate(engine, bundle, artefact), tuple(refused))
        except Exception as error:  # whatever a foreign library raises while it compiles or runs, the next engine may still serve
            if engine is not None:
                engine.close()
            refused.append(Refusal(artefact.engine, artefact.precision, cause, str(error)))
            log.warning("refused: %s", refused[-1])
    raise NoEngine("; ".join(map(str, refused)) or f"the bundle has no artefact for engine {options.engine!r} in precision {options.precision!r}")


def open_one(name: str, precision: Precision, graph: Path, options: EngineOptions) -> Engine:
    """``graph`` is the file that the engine runs; for TensorRT, a plan. Raises EngineUnavailable where the library is absent or the hardware cannot do it."""
    threads = options.threads or max(1, machine.cores() // options.lanes)
    try:
        if name == "onnxruntime":
            from service.engines.onnxruntime_engine import OnnxRuntimeEngine

            return OnnxRuntimeEngine(graph, precision, options.lanes, threads, options.max_batch)
        if name == "openvino":
            from service.engines.openvino_engine import OpenVinoEngine

            return OpenVinoEngine(graph, precision, options.lanes, threads, options.max_batch, options.compiled_folder)
        if name == "tensorrt":
            from service.engines.tensorrt_engine import TensorRtEngine

            return TensorRtEngine(graph, precision, options.lanes, options.max_batch)
    except ImportError as error:
        raise _not_installed(name, error) from error
    raise EngineUnavailable(f"there is no engine called {name!r}")


def _not_installed(name: str, error: ImportError) -> EngineUnavailable:
    return EngineUnavailable(f"{name} is not installed ({error}): pip install '{_PACKAGES[name]}'")


def _plan(bundle: Bundle, precision: Precision, options: EngineOptions, progress: Callable[[str], None]) -> Path:
    """For the GPU that is here; built if it is not there yet. Raises EngineUnavailable."""
    try:
        from service.engines.tensorrt_engine import target
    except ImportError as error:
        raise _not_installed("tensorrt", error) from error
    if precision not in ("bf16", "fp16"):
        raise EngineUnavailable(f"tensorrt runs in bf16 or fp16, not in {precision}")
    chosen = PlanOptions(precision, max_batch=options.max_batch)
    path = plan_path(Path(options.plan_folder), bundle, chosen, target())
    if not path.exists():
        build_elsewhere(bundle, path, chosen, progress)
    return path


def golden_gate(engine: Engine, bundle: Bundle, artefact: Artefact) -> Parity:
    """Runs the golden images. Raises ValueError where the outputs are not the source network's within what the precision allows and the artefact showed."""
    golden = bundle.golden()
    parity = None
    for start in range(0, len(golden.pixels), engine.max_batch):
        part = slice(start, start + engine.max_batch)
        reference = Outputs(golden.reference.logits[part], golden.reference.embedding[part])
        shown = compare(engine.run(0, golden.pixels[part]), reference, scale=golden.reference)
        parity = shown if parity is None else worse(parity, shown)
    if parity is None:
        raise ValueError("the bundle has no golden images")
    failure = parity.failure(engine.precision)
    if failure is None and engine.precision in ("int8", "fp8"):  # what they may lose by themselves would hide much that is broken
        failure = _further_than(parity, artefact.parity)
    if failure:
        raise ValueError(f"golden images: {failure}")
    return parity


def _further_than(shown: Parity, accepted: Parity) -> str | None:
    for name in ("logits", "embedding"):
        difference, before = getattr(shown, name), getattr(accepted, name)
        if difference > _SPREAD * before + _SLACK:
            return f"{name} differ by {difference:.2e} of their range; {before:.2e} when the bundle was made"
    return None


def worse(one: Parity, other: Parity) -> Parity:
    return Parity(
        logits=max(one.logits, other.logits),
        embedding=max(one.embedding, other.embedding),
        probability=max(one.probability, other.probability),
        top1_agreement=min(one.top1_agreement, other.top1_agreement),
    )


def _candidates(bundle: Bundle, options: EngineOptions, first: tuple[str, str] | None) -> list[Artefact]:
    """Of every precision if none is asked for: each was found good enough by whoever exported it."""

    def place(artefact: Artefact) -> int:
        key = (artefact.engine, artefact.precision)
        if key == first:
            return -1
        if key not in _FASTEST or (artefact.precision == "int8" and not machine.multiplies_int8()):
            return len(_FASTEST)
        return _FASTEST.index(key)

    fitting = (each for each in bundle.manifest.artefacts if options.engine in ("auto", each.engine) and options.precision in ("auto", each.precision))
    return [*_on_a_gpu(bundle, options), *sorted(fitting, key=place)]


def _on_a_gpu(bundle: Bundle, options: EngineOptions) -> list[Artefact]:
    """What no bundle holds, because it is made of the canonical graph for the very GPU that runs it."""
    if not options.plan_folder or not (options.engine == "tensorrt" or (options.engine == "auto" and machine.gpus())):
        return []
    source = next((each for each in bundle.manifest.artefacts if each.path == GRAPH and each.precision == "fp32"), None)
    precisions: tuple[Precision, ...] = ("bf16", "fp16")
    return [dataclasses.replace(source, engine="tensorrt", precision=each) for each in precisions if source and options.precision in ("auto", each)]
