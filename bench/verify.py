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
from vitserve.bench.image_check import ImageCheck, check_images
from vitserve.bench.image_check import lines as image_lines
from vitserve.bench.report import EngineRow, describe_machine, engine_table, stdout_console
from vitserve.model.bundle.bundle import Artifact, Bundle, Golden
from vitserve.model.bundle.evaluation import Images
from vitserve.model.bundle.parity import CALIBRATED, Parity
from vitserve.service import machine
from vitserve.service.engines.engine import Engine, EngineOptions
from vitserve.service.engines.golden_check import golden_check
from vitserve.service.engines.selection import (
    EngineRejection,
    candidates,
    no_engine,
    open_artifact,
    openable,
)

if TYPE_CHECKING:
    from vitserve.service.engines.tensorrt.engine import TensorRtEngine

_PACKAGES = (
    *("vitserve", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13-libs"),
    *("cuda-bindings", "torch", "numpy"),
)


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
    golden_images: str  # how many, and of which kind
    parity: Parity | None  # on the golden images; None if the golden check failed
    attention: AttentionReport | None
    images: ImageCheck | None  # on the user's images, against float32 on the CPU
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
    in_domain: bool = False,
) -> VerificationReport:
    """Opens, checks and measures the first engine that fits ``options``.

    ``in_domain`` states that images without labels are of the model's domain.
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
        checked = None
        if images is not None:
            progress(f"{len(images.pixels)} images, with this engine and in float32 on the CPU")
            checked = check_images(bundle, engine, artifact, images, in_domain)
            failures += checked.failures
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
        golden_images=_describe_golden(bundle.golden()),
        parity=parity,
        attention=attention,
        images=checked,
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
        report, layers = plan.report, plan.layer_milliseconds(engine.max_batch)
        names = {name for profile in report.profiles for name in profile.attention}
        attention_ms = sum(milliseconds for name, milliseconds in layers.items() if name in names)
        return AttentionReport(str(report), report.fused, attention_ms / max(sum(layers.values()), 1e-9))
    if artifact.attention is None or engine.name not in ("openvino", "onnxruntime"):
        return None
    kernels = ", ".join(f"{count} × {name}" for name, count in artifact.attention.kernels.items()) or "none"
    softmaxes = artifact.attention.softmax_layers
    description = f"fused kernels at export: {kernels}; separate softmax layers: {softmaxes}"
    return AttentionReport(description, fused=not softmaxes)


def _describe_golden(golden: Golden) -> str:
    textures = f"golden images: {len(golden.pixels) - golden.domain_images} textures"
    return f"{textures} and {golden.domain_images} images of the model's domain" if golden.domain_images else textures


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
        median = f"; of the median image, by which {report.precision} is judged: {parity.typical:.1e}"
        difference = f"maximum difference of the logits: {parity.logits:.1e} of their range"
        difference += median if report.precision in CALIBRATED else ""
        lines.append(f"{report.golden_images}, compared with the network that was exported: {difference}")
    if (attention := report.attention) is not None:
        share = "" if attention.share_of_time is None else f"; {attention.share_of_time:.0%} of the time"
        lines.append(f"attention: {attention.description}{share}")
    return lines if report.images is None else [*lines, *image_lines(report.images)]
