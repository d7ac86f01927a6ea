"""Checkpoint → bundle: trace, make golden images, verify every artifact equal to the source, and only then accept it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitserve.export import attention_report
from vitserve.export.checkpoint.load import Checkpoint
from vitserve.export.golden_images import golden
from vitserve.export.graph.onnxruntime_attention import for_onnxruntime
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.trace import Servable, trace
from vitserve.export.model_card import model_card
from vitserve.export.quantize import fp8, int8
from vitserve.export.quantize.bf16_simulation import simulated
from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.model.bundle.bundle import (
    GRAPH,
    SCHEMA_VERSION,
    WEIGHTS,
    Artifact,
    AttentionKernels,
    Bundle,
    Golden,
    Manifest,
    save_golden,
    sha256,
    write_bundle,
)
from vitserve.model.bundle.evaluation import Images, evaluate, in_batches
from vitserve.model.bundle.parity import compare
from vitserve.model.config import variant_of
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError
from vitserve.service.engines.telemetry import disable_telemetry

ONNXRUNTIME_GRAPH = "model.onnxruntime.onnx"
FP8_GRAPH = "fp8.onnx"
DEFAULT_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
MAX_LOSS = 0.5  # points of accuracy; without labels, twice as many points of disagreement


class ExportError(RuntimeError):
    """The exported model does not do what its source does; no bundle was written."""


class ArtifactRejectedError(Exception):
    """An artifact that is not good enough, or cannot be made here; the message says why."""


def build_bundle(
    checkpoint: Checkpoint,
    path: Path,
    *,
    name: str,
    version: str | None = None,
    training: dict[str, Any] | None = None,
    precisions: Sequence[Precision] | None = None,
    calibration: Images | None = None,
    evaluation_images: Images | None = None,
    max_loss: float = MAX_LOSS,
    progress: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Exports, verifies and writes. float32 is always in it; ``precisions`` are those that must be there besides, None for what can be had without asking.

    Raises ExportError where an artifact of float32, or every one of a precision asked for, is not equal enough to the source, naming the difference;
    then ``path`` is untouched.
    """
    servable = Servable(checkpoint.network, checkpoint.preprocessing).eval()
    image_size = checkpoint.preprocessing.image_size
    with tempfile.TemporaryDirectory() as directory:
        contents = Path(directory)
        progress("tracing the network to ONNX")
        trace(OptimizedNetwork(checkpoint.network, checkpoint.preprocessing).eval(), image_size, contents / GRAPH)
        for_onnxruntime(contents / GRAPH, contents / ONNXRUNTIME_GRAPH)
        progress("running the source network on golden images")
        reference = golden(servable, image_size)
        save_golden(contents / "golden.npz", reference.pixels, reference.reference)
        (contents / "labels.txt").write_text("".join(f"{label}\n" for label in checkpoint.labels), encoding="utf-8")
        if training is not None:
            (contents / "MODEL_CARD.md").write_text(
                model_card(name, variant_of(checkpoint.network.config), training), encoding="utf-8"
            )
        prover = Prover(contents, servable, reference, calibration, evaluation_images, max_loss, progress)
        artifacts = prover.prove(
            DEFAULT_PRECISIONS if precisions is None else precisions, asked_for=precisions is not None
        )
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            version=version
            or hashlib.sha256(f"{sha256(contents / GRAPH)} {sha256(contents / WEIGHTS)}".encode()).hexdigest()[:12],
            variant=variant_of(checkpoint.network.config),
            config=checkpoint.network.config,
            preprocessing=checkpoint.preprocessing,
            artifacts=tuple(artifacts),
            training=training,
        )
        progress("writing the bundle")
        return write_bundle(path, manifest, contents)


@dataclass
class Prover:
    """Makes the artifacts of a bundle in ``contents`` and keeps those that are verified."""

    contents: Path
    source: Servable
    golden: Golden
    calibration: Images | None
    evaluation_images: Images | None
    max_loss: float
    progress: Callable[[str], None]
    _reference: Outputs | None = None  # of the float32 artifact, for the images judged on

    def prove(self, precisions: Sequence[Precision], *, asked_for: bool) -> list[Artifact]:
        """Of each precision the faster engine first, since that is the order in which serving tries them. Raises ExportError."""
        proven: list[Artifact] = []
        wanted: list[Precision] = ["fp32", *(each for each in precisions if each != "fp32")]
        for precision in wanted:
            reasons = []
            for make in self._makers(precision):
                try:
                    proven.append(make())
                except (ArtifactRejectedError, EngineUnavailableError, ImportError) as error:
                    reasons.append(str(error))
                    self.progress(f"skipped: {error}")
            if not any(each.precision == precision for each in proven) and (asked_for or precision == "fp32"):
                raise ExportError("; ".join(reasons))
        return proven

    def _makers(self, precision: Precision) -> list[Callable[[], Artifact]]:
        match precision:
            case "fp32":
                return [
                    lambda: self._proven("openvino", "fp32", GRAPH, WEIGHTS),
                    lambda: self._proven("onnxruntime", "fp32", ONNXRUNTIME_GRAPH, WEIGHTS),
                ]
            case "bf16":
                return [self._bf16]
            case "int8":
                return [self._without_calibration if self.calibration is None else self._calibrated]
            case "fp8":
                return [self._fp8]
            case "fp16":
                raise ExportError("fp16 is for GPUs alone, and made of every bundle where one serves it")

    def _bf16(self) -> Artifact:
        try:
            return self._proven("openvino", "bf16", GRAPH, WEIGHTS)
        except EngineUnavailableError as error:
            self.progress(f"simulating bf16: {error}")
        network = simulated(self.source).eval()

        def run(pixels: Pixels) -> Outputs:
            with torch.inference_mode():
                logits, embedding = network(torch.from_numpy(pixels))
            return Outputs(logits.numpy(), embedding.numpy())

        return self._judge("openvino", "bf16", GRAPH, WEIGHTS, in_batches(run, 16), attention=None, simulated=True)

    def _calibrated(self) -> Artifact:
        """SmoothQuant on and off, the better is kept; where both lose too much, with layers left in float."""
        disable_telemetry()
        import openvino

        assert self.calibration is not None
        graph, pixels = self.contents / GRAPH, self.calibration.pixels
        best: tuple[float, Artifact] | None = None
        rejected: ArtifactRejectedError | None = None
        for smooth in (True, False):
            self.progress(
                f"quantizing to int8 with {len(pixels)} images, {'with' if smooth else 'without'} SmoothQuant"
            )
            name = f"int8-{'smooth' if smooth else 'plain'}.xml"
            openvino.save_model(
                int8.calibrated(graph, pixels, smooth=smooth), self.contents / name, compress_to_fp16=False
            )
            try:
                artifact = self._proven("openvino", "int8", name, name.replace(".xml", ".bin"), gate=False)
            except ArtifactRejectedError as error:  # the other may still do
                rejected = error
                self.progress(f"skipped: {error}")
                continue
            loss = self._loss(artifact)
            self.progress(f"it loses {loss:.2f} points")
            if best is not None and loss >= best[0]:
                self._remove(artifact.files)
                continue
            if best is not None:
                self._remove(best[1].files)
            best = (loss, artifact)
        if best is None:
            assert rejected is not None
            raise rejected
        if best[0] > self.max_loss and self.evaluation_images is not None:
            self._remove(best[1].files)
            return self._calibrated_until("smooth" in best[1].path)
        return self._gate(best[1])

    def _calibrated_until(self, smooth: bool) -> Artifact:
        disable_telemetry()
        import openvino

        assert self.calibration is not None
        assert self.evaluation_images is not None
        assert self._reference is not None
        reference, evaluation_images = self._reference, self.evaluation_images
        self.progress(f"leaving layers in float until no more than {self.max_loss} points are lost")

        def loss(outputs: Outputs) -> float:
            return evaluate(lambda _: outputs, reference, evaluation_images).loss

        model = int8.calibrated_until(
            self.contents / GRAPH, self.calibration.pixels, evaluation_images.pixels, loss, self.max_loss, smooth=smooth
        )
        openvino.save_model(model, self.contents / "int8-partial.xml", compress_to_fp16=False)
        return self._proven("openvino", "int8", "int8-partial.xml", "int8-partial.bin")

    def _without_calibration(self) -> Artifact:
        self.progress("quantizing to int8 without calibration images")
        int8.without_calibration(self.contents / ONNXRUNTIME_GRAPH, self.contents / "int8.onnx")
        return self._proven("onnxruntime", "int8", "int8.onnx", None)

    def _fp8(self) -> Artifact:
        """For TensorRT. What fp8 costs shows here already, in float32 arithmetic on values that are rounded to fp8; the golden check shows the GPU's."""
        if self.calibration is None:
            raise ArtifactRejectedError("fp8 needs images to calibrate with (--images)")
        self.progress(f"quantizing to fp8 with {len(self.calibration.pixels)} images")
        fp8.calibrated(self.contents / GRAPH, self.contents / FP8_GRAPH, self.calibration.pixels)
        runs = construct_engine(
            "onnxruntime", "fp8", self.contents / FP8_GRAPH, EngineOptions(max_batch=len(self.golden.pixels))
        )
        try:
            return self._judge(
                "tensorrt",
                "fp8",
                FP8_GRAPH,
                WEIGHTS,
                lambda pixels: runs.run(0, pixels),
                attention=None,
                simulated=True,
            )
        finally:
            runs.close()

    def _proven(
        self, engine: str, precision: Precision, path: str, weights: str | None, *, gate: bool = True
    ) -> Artifact:
        """Raises EngineUnavailable where it cannot run here, Rejected where it is not good enough, ExportError where it should be and is not."""
        self.progress(f"proving {engine} in {precision}")
        from vitserve.service.engines.openvino_engine import OpenVinoEngine

        opened = construct_engine(
            engine, precision, self.contents / path, EngineOptions(max_batch=len(self.golden.pixels))
        )
        try:
            attention = (
                attention_report.of_openvino(opened.compiled)
                if isinstance(opened, OpenVinoEngine)
                else attention_report.of_onnxruntime(self.contents / path)
            )
            return self._judge(
                engine, precision, path, weights, lambda pixels: opened.run(0, pixels), attention, gate=gate
            )
        finally:
            opened.close()

    def _judge(
        self,
        engine: str,
        precision: Precision,
        path: str,
        weights: str | None,
        run: Callable[[Pixels], Outputs],
        attention: AttentionKernels | None,
        *,
        simulated: bool = False,
        gate: bool = True,
    ) -> Artifact:
        parity = compare(run(self.golden.pixels), self.golden.reference)
        failure = parity.failure(precision)
        if failure:
            self._remove([each for each in (path, weights) if each is not None])
            message = f"{engine} in {precision} is not equal to its source: {failure}"
            raise ExportError(message) if precision == "fp32" else ArtifactRejectedError(message)
        run = in_batches(run, len(self.golden.pixels))
        evaluation = None
        if self.evaluation_images is not None:
            if self._reference is None:
                self._reference = run(
                    self.evaluation_images.pixels
                )  # float32 comes first, and has just been shown to be the source
            if precision != "fp32":
                evaluation = evaluate(run, self._reference, self.evaluation_images)
        artifact = Artifact(engine, precision, path, parity, weights, attention, evaluation, simulated)
        return self._gate(artifact) if gate else artifact

    def _gate(self, artifact: Artifact) -> Artifact:
        loss = self._loss(artifact)
        if artifact.precision != "fp32" and loss > self.max_loss:
            self._remove(artifact.files)
            raise ArtifactRejectedError(
                f"{artifact.engine} in {artifact.precision} loses {loss:.2f} points; at most {self.max_loss} are allowed (--max-loss)"
            )
        return artifact

    def _loss(self, artifact: Artifact) -> float:
        """On the images judged on, or else on the golden ones."""
        return (
            artifact.evaluation.loss if artifact.evaluation is not None else 50 * (1 - artifact.parity.top1_agreement)
        )

    def _remove(self, files: Iterable[str]) -> None:
        """An artifact's own, not those that it shares with others."""
        for name in set(files) - {GRAPH, ONNXRUNTIME_GRAPH, WEIGHTS}:
            (self.contents / name).unlink()
