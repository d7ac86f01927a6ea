"""Runs `vitserve verify`: opens one engine on this machine, checks its outputs, measures it and writes one report.

The report is what a user of hardware that is not in the test matrix can attach to an issue.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vitserve.bench.engine import measure_in_rounds, subject
from vitserve.bench.report import EngineRow, describe_machine, engine_table, stdout_console
from vitserve.model.bundle.bundle import Artifact, Bundle, Evaluation
from vitserve.model.bundle.evaluation import Images, evaluate, in_batches
from vitserve.model.bundle.parity import Parity
from vitserve.service import machine
from vitserve.service.engines.engine import Engine, EngineOptions
from vitserve.service.engines.golden_check import golden_check
from vitserve.service.engines.selection import (
    EngineRejection,
    candidates,
    no_engine,
    open_artifact,
    open_engine,
    openable,
)
from vitserve.service.engines.tensorrt.plan_report import PlanReport

if TYPE_CHECKING:
    from vitserve.service.engines.tensorrt.engine import TensorRtEngine

MAX_DISAGREEMENT = 0.01  # share of images whose class may differ from float32's, the same as in `vitserve export`
_PACKAGES = ("vitserve", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "cuda-bindings", "torch", "numpy")


@dataclass(frozen=True)
class AttentionReport:
    """How the engine executes attention."""

    description: str
    fused: bool
    share_of_time: float | None = None  # of a batch of the largest size


@dataclass(frozen=True)
class VerificationReport:
    """The verification failed if ``failures`` is not empty."""

    model: str
    version: str
    engine: str
    precision: str
    streams: int
    machine: Mapping[str, Any]
    open_seconds: float  # including the time to build a plan or graph
    steps: Sequence[str]  # of opening the engine
    parity: Parity | None  # on the golden images; None if the golden check failed
    attention: AttentionReport | None
    evaluation: Evaluation | None  # on a directory of images, against float32 on the CPU
    rows: Sequence[EngineRow]
    failures: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def verify(
    bundle: Bundle,
    options: EngineOptions,
    images: Images | None,
    sizes: Sequence[int],
    seconds: float,
    rounds: int,
    progress: Callable[[str], None] = lambda step: None,
) -> VerificationReport:
    """Opens, checks and measures the first engine that fits ``options``.

    Raises NoEngineError, with the reasons, if none can be opened.
    """
    steps = list[str]()

    def opening(step: str) -> None:
        steps.append(step)
        progress(step)

    began = time.monotonic()
    engine, artifact = _open(bundle, options, opening)
    open_seconds = time.monotonic() - began
    failures = list[str]()
    try:
        progress("golden images")
        parity = _check_golden(engine, bundle, artifact, failures)
        progress("attention")
        attention = _attention(bundle, artifact, engine)
        if attention is not None and not attention.fused and engine.name == "tensorrt":  # may happen on a CPU
            failures.append(f"attention is not fused: {attention.description}")
        evaluation = None
        if images is not None:
            progress(f"{len(images.pixels)} images, with this engine and in float32 on the CPU")
            evaluation = _evaluate(bundle, engine, images, failures)
        progress("measuring")
        measured = subject(engine, options)
        results = measure_in_rounds([measured], bundle.golden().pixels, sizes, seconds, rounds)
        rows = [results[0, size].row(measured, size) for size in sizes]
    finally:
        engine.close()
    return VerificationReport(
        model=bundle.manifest.name,
        version=bundle.manifest.version,
        engine=engine.name,
        precision=engine.precision,
        streams=engine.streams,
        machine=describe_machine()
        | {"device": _device(engine), "packages": _versions(), "system": platform.platform()},
        open_seconds=open_seconds,
        steps=steps,
        parity=parity,
        attention=attention,
        evaluation=evaluation,
        rows=rows,
        failures=failures,
    )


def _open(bundle: Bundle, options: EngineOptions, progress: Callable[[str], None]) -> tuple[Engine, Artifact]:
    """Opens the first candidate that can be opened, without the golden check, whose failure belongs in the report."""
    rejected: list[EngineRejection] = []

    def opener(artifact: Artifact) -> Engine:
        return open_artifact(bundle, artifact, options, progress)

    for artifact, engine in openable(candidates(bundle, options), opener, rejected.append):
        return engine, artifact
    raise no_engine(options, rejected)


def _check_golden(engine: Engine, bundle: Bundle, artifact: Artifact, failures: list[str]) -> Parity | None:
    try:
        return golden_check(engine, bundle, artifact)
    except ValueError as error:
        failures.append(str(error))
        return None


def _attention(bundle: Bundle, artifact: Artifact, engine: Engine) -> AttentionReport | None:
    """Returns None if unknown: torch does not report its kernels, and ONNX Runtime on CUDA only in a profile."""
    if engine.name == "tensorrt":
        plan: TensorRtEngine = engine  # type: ignore[assignment]  # the engine of that name
        report = PlanReport.from_json(plan.plan.with_suffix(".json").read_text())
        layers = plan.layer_milliseconds(engine.max_batch)
        names = {layer.name for layer in report.attention}
        attention_ms = sum(milliseconds for name, milliseconds in layers.items() if name in names)
        return AttentionReport(str(report), report.fused, attention_ms / max(sum(layers.values()), 1e-9))
    if artifact.attention is None or engine.name not in ("openvino", "onnxruntime"):
        return None
    kernels = ", ".join(f"{count} × {name}" for name, count in artifact.attention.kernels.items()) or "none"
    softmaxes = artifact.attention.softmax_layers
    description = f"fused kernels at export: {kernels}; separate softmax layers: {softmaxes}"
    return AttentionReport(description, fused=not softmaxes)


def _evaluate(bundle: Bundle, engine: Engine, images: Images, failures: list[str]) -> Evaluation:
    reference = open_engine(bundle, EngineOptions(precision="fp32", max_batch=8)).engine
    try:
        expected = in_batches(lambda pixels: reference.run(0, pixels), 8)(images.pixels)
    finally:
        reference.close()
    evaluation = evaluate(in_batches(lambda pixels: engine.run(0, pixels), engine.max_batch), expected, images)
    disagreement = 1 - evaluation.top1_agreement
    if disagreement > MAX_DISAGREEMENT and evaluation.loss > 100 * MAX_DISAGREEMENT / 2:
        failures.append(
            f"{disagreement:.2%} of the images have another class than in float32 (limit: {MAX_DISAGREEMENT:.0%})"
        )
    return evaluation


def _device(engine: Engine) -> str | None:
    if engine.name not in ("tensorrt", "onnxruntime-cuda") and not (engine.name == "torch" and machine.gpus()):
        return None
    from vitserve.service.engines.cuda import runtime

    name, (major, minor) = runtime.describe_device()
    return f"{name}, compute capability {major}.{minor}"


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def show(report: VerificationReport) -> None:
    """Prints the report."""
    console = stdout_console()
    device = report.machine["device"] or f"{report.machine['cores']} cores of {report.machine['cpu']}"
    engine = f"{report.engine} in {report.precision}, on {device}"
    console.print(f"[bold]{report.model}[/bold] {report.version}, {engine}", highlight=False)
    for line in _lines(report):
        console.print(line, highlight=False)
    console.print(engine_table(report.rows))
    for failure in report.failures:
        console.print(f"[red]failed: {failure}[/red]", highlight=False)


def _lines(report: VerificationReport) -> list[str]:
    lines = [f"opened in {report.open_seconds:.1f} s; streams: {report.streams}"]
    if (parity := report.parity) is not None:
        difference = f"maximum difference of the logits: {parity.logits:.1e} of their range"
        lines.append(f"golden images: {difference}; same class: {parity.top1_agreement:.0%}")
    if (attention := report.attention) is not None:
        share = "" if attention.share_of_time is None else f"; {attention.share_of_time:.0%} of the time"
        lines.append(f"attention: {attention.description}{share}")
    if (evaluation := report.evaluation) is not None:
        agreement = f"{evaluation.images} images: same class as in float32: {evaluation.top1_agreement:.2%}"
        line = f"{agreement}; maximum difference of a probability: {evaluation.probability:.1e}"
        if evaluation.accuracy is not None:
            line += f"; accuracy {evaluation.accuracy:.2%}, in float32 {evaluation.source_accuracy:.2%}"
        lines.append(line)
    return lines
