"""Chooses the engine: the best that can run here and reproduces the golden images, else the next. The only place that knows them all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.bundle import Artefact, Bundle
from model.parity import Outputs, Parity, Precision, compare
from service import machine
from service.engines.engine import Engine, EngineUnavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    engine: str = "auto"
    precision: str = "auto"
    lanes: int = 1
    threads: int = 0  # per lane; 0: the machine's cores shared among the lanes
    max_batch: int = 8


class NoEngine(RuntimeError):
    """No engine can serve the bundle here; the message gives each one's reason."""


@dataclass(frozen=True)
class Opened:
    engine: Engine
    parity: Parity  # shown here and now, by the golden gate
    refused: tuple[str, ...]  # why each better candidate is not the one


def open_engine(bundle: Bundle, options: EngineOptions) -> Opened:
    """Opens the first of the bundle's artefacts that fits ``options``, can run here and passes the golden gate. Raises NoEngine."""
    refused: list[str] = []
    for artefact in _candidates(bundle, options):
        name = f"{artefact.engine} in {artefact.precision}"
        try:
            engine = open_one(artefact.engine, artefact.precision, bundle.path / artefact.path, options)
        except Exception as error:  # whatever a foreign library raises while it compiles, the next engine may still serve
            log.warning("%s cannot run here: %s", name, error)
            refused.append(f"{name}: {error}")
            continue
        try:
            parity = golden_gate(engine, bundle)
        except Exception as error:
            engine.close()
            log.warning("%s was refused: %s", name, error)
            refused.append(f"{name}: {error}")
            continue
        return Opened(engine, parity, tuple(refused))
    raise NoEngine("; ".join(refused) or f"the bundle has no artefact for engine {options.engine!r} in precision {options.precision!r}")


def open_one(name: str, precision: Precision, graph: Path, options: EngineOptions) -> Engine:
    """Raises EngineUnavailable where the library is absent or the hardware cannot do it."""
    threads = options.threads or max(1, machine.cores() // options.lanes)
    try:
        if name == "onnxruntime":
            from service.engines.onnxruntime_engine import OnnxRuntimeEngine

            return OnnxRuntimeEngine(graph, options.lanes, threads, options.max_batch)
        if name == "openvino":
            from service.engines.openvino_engine import OpenVinoEngine

            return OpenVinoEngine(graph, precision, options.lanes, threads, options.max_batch)
    except ImportError as error:
        raise EngineUnavailable(f"{name} is not installed: {error}") from error
    raise EngineUnavailable(f"there is no engine called {name!r}")


def golden_gate(engine: Engine, bundle: Bundle) -> Parity:
    """Runs the golden images. Raises ValueError where the outputs are not the source network's within the precision's tolerance."""
    golden = bundle.golden()
    parity = None
    for start in range(0, len(golden.pixels), engine.max_batch):
        part = slice(start, start + engine.max_batch)
        reference = Outputs(golden.reference.logits[part], golden.reference.embedding[part])
        shown = compare(engine.run(0, golden.pixels[part]), reference)
        failure = shown.failure(engine.precision)
        if failure:
            raise ValueError(f"golden images: {failure}")
        parity = shown if parity is None else worse(parity, shown)
    if parity is None:
        raise ValueError("the bundle has no golden images")
    return parity


def worse(one: Parity, other: Parity) -> Parity:
    return Parity(
        logits=max(one.logits, other.logits),
        embedding=max(one.embedding, other.embedding),
        probability=max(one.probability, other.probability),
        top1_agreement=min(one.top1_agreement, other.top1_agreement),
    )


def _candidates(bundle: Bundle, options: EngineOptions) -> Iterator[Artefact]:
    """In the bundle's own order. "auto" precision means float32: faster arithmetic is chosen by whoever answers for its error."""
    precision = "fp32" if options.precision == "auto" else options.precision
    for artefact in bundle.manifest.artefacts:
        if artefact.precision == precision and options.engine in ("auto", artefact.engine):
            yield artefact
