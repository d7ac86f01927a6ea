"""Selects the engine: which candidates there are for a bundle, in which order, and which of them work here."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from vitserve.model.arrays import Precision
from vitserve.model.bundle.bundle import GRAPH, Artifact, Bundle
from vitserve.model.bundle.parity import CALIBRATED, Parity
from vitserve.service import machine
from vitserve.service.engines.catalog import ENGINES, PRECISIONS
from vitserve.service.engines.construct import construct_engine, not_installed
from vitserve.service.engines.engine import Engine, EngineOptions, EngineUnavailableError
from vitserve.service.engines.golden_check import GoldenCheckError, golden_check
from vitserve.service.engines.gpu_artifacts import NotBuiltError, Progress, gpu_artifact

log = logging.getLogger(__name__)

T = TypeVar("T")
Cause = Literal["unavailable", "not_built", "damaged", "crashed", "golden_check"]


class NoEngineError(RuntimeError):
    """No engine can serve the bundle here. The message gives the reason for each candidate."""


class DamagedArtifactError(ValueError):
    """A file of the artifact differs from the manifest."""


class EngineCrashedError(RuntimeError):
    """The engine crashed earlier engine workers, so it is not opened again."""


_CAUSES: dict[type[Exception], Cause] = {
    NotBuiltError: "not_built",
    DamagedArtifactError: "damaged",
    EngineCrashedError: "crashed",
    GoldenCheckError: "golden_check",
}


@dataclass(frozen=True)
class EngineRejection:
    engine: str
    precision: Precision
    cause: Cause
    reason: str

    def __str__(self) -> str:
        return f"{self.engine} in {self.precision}: {self.reason}"


@dataclass(frozen=True)
class Opened:
    engine: Engine
    parity: Parity  # of this engine on this machine, from the golden check
    rejected: tuple[EngineRejection, ...]  # the candidates before it


class VerifiedEngine(NamedTuple):
    engine: Engine
    parity: Parity


def open_engine(
    bundle: Bundle,
    options: EngineOptions,
    first: tuple[str, str] | None = None,
    progress: Progress = lambda step: None,
    trying: Callable[[str], None] = lambda engine: None,
    skipped: Collection[str] = (),
) -> Opened:
    """Opens the fastest candidate that works here and passes the golden check. Raises NoEngineError.

    ``first`` is the engine and precision that `vitserve tune` found fastest on this machine.
    ``progress`` receives the steps of a build that takes minutes.
    ``trying`` receives "ENGINE in PRECISION" before each candidate is opened. A candidate in ``skipped`` is not opened.
    """
    rejected: list[EngineRejection] = []

    def announced() -> Iterator[Artifact]:
        for artifact in candidates(bundle, options, first):
            trying(f"{artifact.engine} in {artifact.precision}")
            yield artifact

    def opener(artifact: Artifact) -> VerifiedEngine:
        if f"{artifact.engine} in {artifact.precision}" in skipped:
            raise EngineCrashedError("engine workers crashed while opening it")
        return open_verified(bundle, artifact, options, progress)

    def reject(rejection: EngineRejection) -> None:
        rejected.append(rejection)
        log.warning("rejected: %s", rejection)

    for _, (engine, parity) in openable(announced(), opener, reject):
        return Opened(engine, parity, tuple(rejected))
    raise no_engine(options, rejected)


def openable(
    artifacts: Iterable[Artifact], opener: Callable[[Artifact], T], reject: Callable[[EngineRejection], None]
) -> Iterator[tuple[Artifact, T]]:
    """Opens the artifacts in order, each when the iteration reaches it, and passes those that fail to ``reject``.

    ``opener`` is open_verified(), or open_artifact() without the golden check. The engines are the client's to close.
    """
    for artifact in artifacts:
        try:
            result = opener(artifact)
        except Exception as error:  # any error of a foreign library: the next engine may work
            reject(EngineRejection(artifact.engine, artifact.precision, _cause(error), str(error)))
            continue
        yield artifact, result


def _cause(error: Exception) -> Cause:
    for kind, cause in _CAUSES.items():
        if isinstance(error, kind):
            return cause
    return "unavailable"


def no_engine(options: EngineOptions, rejected: Iterable[EngineRejection]) -> NoEngineError:
    return NoEngineError(
        "; ".join(map(str, rejected))
        or f"the bundle has no artifact for engine {options.engine!r} in precision {options.precision!r}"
    )


def open_verified(
    bundle: Bundle, artifact: Artifact, options: EngineOptions, progress: Progress = lambda step: None
) -> VerifiedEngine:
    """As open_artifact(), with the golden check. Raises GoldenCheckError too; then the engine is closed."""
    engine = open_artifact(bundle, artifact, options, progress)
    try:
        return VerifiedEngine(engine, golden_check(engine, bundle, artifact))
    except Exception as error:
        engine.close()
        if isinstance(error, GoldenCheckError):
            raise
        raise GoldenCheckError(str(error)) from error


def open_artifact(
    bundle: Bundle, artifact: Artifact, options: EngineOptions, progress: Progress = lambda step: None
) -> Engine:
    """Opens one of candidates(), and builds its plan or cast graph first if that is missing. No golden check.

    Raises DamagedArtifactError, EngineUnavailableError, and the errors of the engine's library.
    """
    damage = [bundle.damaged_files[name] for name in artifact.files if name in bundle.damaged_files]
    if damage:
        raise DamagedArtifactError("; ".join(damage))
    if artifact.engine not in ENGINES:
        raise EngineUnavailableError(f"unknown engine: {artifact.engine}")
    try:
        graph = gpu_artifact(bundle, artifact, options, progress) or bundle.path / artifact.path
    except ImportError as error:
        raise not_installed(artifact.engine, error) from error
    return construct_engine(artifact.engine, artifact.precision, graph, options, artifact.plan)


def build_missing(bundle: Bundle, options: EngineOptions, rejected: Iterable[EngineRejection]) -> bool:
    """Builds the first plan that was rejected as not built, or the next one if that fails. Whether one was built."""
    not_built = {(rejection.engine, rejection.precision) for rejection in rejected if rejection.cause == "not_built"}
    for artifact in candidates(bundle, options):
        if artifact.plan is None and (artifact.engine, artifact.precision) in not_built:
            try:
                gpu_artifact(bundle, artifact, dataclasses.replace(options, defer_builds=False), log.debug)
            except Exception as error:  # the current engine continues to serve
                log.error("failed to build the preferred engine: %s", error)
                continue
            return True
    return False


def candidates(bundle: Bundle, options: EngineOptions, first: tuple[str, str] | None = None) -> list[Artifact]:
    """Artifacts that match ``options``, in the order in which to try them: GPU, then ``first``, then the CPU by speed.

    All precisions of the bundle are candidates, because each passed its check at export.
    """
    on_cpu = sorted(_on_cpu(bundle, options), key=lambda artifact: (artifact.engine, artifact.precision) != first)
    return [
        artifact
        for artifact in (*_on_gpu(bundle, options), *on_cpu)
        if options.engine in ("auto", artifact.engine) and options.precision in ("auto", artifact.precision)
    ]


def runs_on_gpu(artifact: Artifact) -> bool:
    kind = ENGINES.get(artifact.engine)
    return kind is not None and (kind.device == "gpu" or (kind.device == "either" and bool(machine.gpus())))


def _on_gpu(bundle: Bundle, options: EngineOptions) -> Iterator[Artifact]:
    """For each engine, the plans of the bundle, and then the artifacts from which it builds its own.

    Calibrated artifacts come from the bundle; the others are made from the reference graph.
    """
    requested = options.engine in ENGINES and ENGINES[options.engine].device == "gpu"
    if not (requested or machine.gpus()):
        return
    for engine, kind in ENGINES.items():
        plans = [
            artifact
            for artifact in bundle.manifest.artifacts
            if artifact.engine == engine and artifact.plan is not None
        ]
        yield from sorted(plans, key=lambda artifact: PRECISIONS.index(artifact.precision))
        if kind.needs_plan_dir and not options.plan_dir:
            continue
        for precision in kind.gpu:
            if precision not in kind.on_request or options.engine == engine:
                yield from _source_of(bundle, engine, precision)


def _on_cpu(bundle: Bundle, options: EngineOptions) -> Iterator[Artifact]:
    """The bundle's artifacts, then those of a requested engine that runs the reference graph, which are slower."""
    yield from sorted((artifact for artifact in bundle.manifest.artifacts if _is_for_cpu(artifact)), key=_speed_rank)
    kind = ENGINES.get(options.engine)
    if kind is not None and kind.artifact == "reference_graph" and not (kind.gpu and machine.gpus()):
        for precision in kind.cpu:
            yield from _source_of(bundle, options.engine, precision)


def _is_for_cpu(artifact: Artifact) -> bool:
    """An engine that this version does not know counts too, so that its rejection is reported."""
    return artifact.engine not in ENGINES or ENGINES[artifact.engine].device == "cpu"


def _speed_rank(artifact: Artifact) -> tuple[int, int]:
    """By precision, then by engine. Without int8 instructions, int8 is the slowest precision of a CPU."""
    precision = PRECISIONS.index(artifact.precision)
    if artifact.precision == "int8" and not machine.multiplies_int8():
        precision = len(PRECISIONS)
    engines = list(ENGINES)
    return precision, engines.index(artifact.engine) if artifact.engine in engines else len(engines)


def _source_of(bundle: Bundle, engine: str, precision: Precision) -> Iterator[Artifact]:
    """The artifact of the bundle that the engine runs, or from which it builds its own, in the precision."""
    artifacts = [artifact for artifact in bundle.manifest.artifacts if artifact.plan is None]
    if precision in CALIBRATED:  # one graph for all engines of a GPU
        yield from (dataclasses.replace(each, engine=engine) for each in artifacts if each.precision == precision)
        return
    reference = next((each for each in artifacts if (each.path, each.precision) == (GRAPH, "fp32")), None)
    if reference is not None:
        yield dataclasses.replace(reference, engine=engine, precision=precision, attention=None, evaluation=None)
