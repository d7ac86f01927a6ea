"""`vitserve verify`: one engine of one bundle, opened, verified and measured on the machine that it is to serve on, in one report.

It is what somebody sends back who has a device that we have not.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vitserve.bench.engine import subject, take_turns
from vitserve.bench.report import EngineRow, engine_table, printer, where
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

MOST_DISAGREEMENT = 0.01  # share of the images whose class may be another than float32's; as export allows
_PACKAGES = ("vitserve", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "cuda-bindings", "torch", "numpy")


@dataclass(frozen=True)
class Attention:
    """What the engine made of the attention, as it says itself."""

    said: str
    fused: bool
    share_of_time: float | None = None  # of a batch of the largest size


@dataclass(frozen=True)
class Verified:
    """The report. It fails where ``failures`` are not empty."""

    model: str
    version: str
    engine: str
    precision: str
    streams: int
    machine: Mapping[str, Any]
    open_seconds: float  # with building what was not there yet
    steps: Sequence[str]  # of that
    parity: Parity | None  # on the golden images; None where the gate rejected it
    attention: Attention | None
    evaluation: Evaluation | None  # on a directory, against float32 on the CPU
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
) -> Verified:
    """Raises NoEngine, naming the reasons, where nothing that ``options`` name can be opened."""
    steps = list[str]()

    def told(step: str) -> None:
        steps.append(step)
        progress(step)

    began = time.monotonic()
    engine, artifact = _open(bundle, options, told)
    open_seconds = time.monotonic() - began
    failures = list[str]()
    try:
        progress("golden images")
        parity = None
        try:
            parity = golden_check(engine, bundle, artifact)
        except ValueError as error:
            failures.append(str(error))
        progress("attention")
        attention = _attention(bundle, artifact, engine)
        if (
            attention is not None and not attention.fused and engine.name == "tensorrt"
        ):  # on a CPU it may be so, and is said
            failures.append(f"attention is not fused: {attention.said}")
        evaluation = None
        if images is not None:
            progress(f"{len(images.pixels)} images, here and in float32 on the CPU")
            evaluation = _evaluate(bundle, engine, images)
            if 1 - evaluation.top1_agreement > MOST_DISAGREEMENT and evaluation.loss > 100 * MOST_DISAGREEMENT / 2:
                failures.append(
                    f"{1 - evaluation.top1_agreement:.2%} of the images are classified otherwise than in float32; {MOST_DISAGREEMENT:.0%} may be"
                )
        progress("measuring")
        measured = subject(engine, options)
        results = take_turns([measured], bundle.golden().pixels, sizes, seconds, rounds)
        rows = [results[0, size].row(measured, size) for size in sizes]
    finally:
        engine.close()
    manifest, device = (
        bundle.manifest,
        {**where(), "device": _device(engine), "packages": _versions(), "system": platform.platform()},
    )
    found = (
        engine.name,
        engine.precision,
        engine.streams,
        device,
        open_seconds,
        steps,
        parity,
        attention,
        evaluation,
        rows,
        failures,
    )
    return Verified(manifest.name, manifest.version, *found)


def _open(bundle: Bundle, options: EngineOptions, progress: Callable[[str], None]) -> tuple[Engine, Artifact]:
    """Opens the first candidate that can be opened, without the golden check, whose failure belongs in the report."""
    rejected: list[EngineRejection] = []

    def opener(artifact: Artifact) -> Engine:
        return open_artifact(bundle, artifact, options, progress)

    for artifact, engine in openable(candidates(bundle, options), opener, rejected.append):
        return engine, artifact
    raise no_engine(options, rejected)


def _attention(bundle: Bundle, artifact: Artifact, engine: Engine) -> Attention | None:
    """None where nothing is known: torch tells nothing of its kernels, and ONNX Runtime on CUDA not without a profile."""
    if engine.name == "tensorrt":
        plan: TensorRtEngine = engine  # type: ignore[assignment]  # the engine of that name
        report = PlanReport.from_json(plan.plan.with_suffix(".json").read_text())
        spent = plan.layer_milliseconds(engine.max_batch)
        names = {layer.name for layer in report.attention}
        return Attention(
            str(report),
            report.fused,
            sum(ms for name, ms in spent.items() if name in names) / max(sum(spent.values()), 1e-9),
        )
    if artifact.attention is None or engine.name not in ("openvino", "onnxruntime"):
        return None
    kernels = ", ".join(f"{count} × {name}" for name, count in artifact.attention.kernels.items()) or "none"
    softmaxes = artifact.attention.softmax_layers
    return Attention(f"fused when the bundle was made: {kernels}; {softmaxes} softmax layers beside", not softmaxes)


def _evaluate(bundle: Bundle, engine: Engine, images: Images) -> Evaluation:
    reference = open_engine(bundle, EngineOptions(precision="fp32", max_batch=8)).engine
    try:
        expected = in_batches(lambda pixels: reference.run(0, pixels), 8)(images.pixels)
    finally:
        reference.close()
    return evaluate(in_batches(lambda pixels: engine.run(0, pixels), engine.max_batch), expected, images)


def _device(engine: Engine) -> str | None:
    if engine.name not in ("tensorrt", "onnxruntime-cuda") and not (engine.name == "torch" and machine.gpus()):
        return None
    from vitserve.service.engines.cuda import runtime

    name, (major, minor) = runtime.describe_device()
    return f"{name}, compute capability {major}.{minor}"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def show(report: Verified) -> None:
    console = printer()
    device = report.machine["device"] or f"{report.machine['cores']} cores of {report.machine['cpu']}"
    console.print(
        f"[bold]{report.model}[/bold] {report.version}, {report.engine} in {report.precision}, on {device}",
        highlight=False,
    )
    console.print(f"opened in {report.open_seconds:.1f} s; streams: {report.streams}", highlight=False)
    if report.parity is not None:
        golden = report.parity
        console.print(
            f"golden images: logits differ by {golden.logits:.1e} of their range; {golden.top1_agreement:.0%} of the classes agree",
            highlight=False,
        )
    if report.attention is not None:
        share = "" if report.attention.share_of_time is None else f"; {report.attention.share_of_time:.0%} of the time"
        console.print(f"attention: {report.attention.said}{share}", highlight=False)
    if report.evaluation is not None:
        judged = report.evaluation
        accuracy = (
            ""
            if judged.accuracy is None
            else f"; accuracy {judged.accuracy:.2%}, in float32 {judged.source_accuracy:.2%}"
        )
        console.print(
            f"{judged.images} images: {judged.top1_agreement:.2%} agree with float32, probabilities within {judged.probability:.1e}{accuracy}",
            highlight=False,
        )
    console.print(engine_table(report.rows))
    for failure in report.failures:
        console.print(f"[red]failed: {failure}[/red]", highlight=False)
