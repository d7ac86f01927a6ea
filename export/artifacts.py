"""Makes the artifacts of a bundle and verifies each one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitserve.export.candidates import float32_searches, reduced_search
from vitserve.export.verify import AccuracyLimit, EvaluationSet, best_artifact
from vitserve.export.workspace import ONNXRUNTIME_GRAPH, Workspace, opened
from vitserve.model.arrays import Outputs, Precision
from vitserve.model.bundle.bundle import GRAPH, WEIGHTS, Artifact
from vitserve.model.bundle.evaluation import Images
from vitserve.model.config import LibraryConfig
from vitserve.service import machine

DEFAULT_PRECISIONS: tuple[Precision, ...] = ("bf16",)  # besides float32


class ExportError(RuntimeError):
    """The exported model does not match its source. No bundle was written."""


def check_precisions(precisions: Sequence[Precision], calibration_images: Images | None) -> None:
    """Raises ExportError for a precision that cannot be exported."""
    if "fp16" in precisions:
        raise ExportError("fp16 cannot be exported: it is for GPUs, and is made from any bundle when a GPU serves it")
    if "fp8" in precisions and calibration_images is None:
        raise ExportError("fp8 needs images to calibrate with (--images)")


def float32_artifacts(workspace: Workspace) -> list[Artifact]:
    """The artifacts of all engines that can run here, the fastest first.

    Raises ExportError if there is none, or if an engine does not match one of our networks. An engine that cannot run
    another library's network, or does not match it, is skipped.
    """
    artifacts, reasons = list[Artifact](), list[str]()
    foreign = isinstance(workspace.source.config, LibraryConfig)
    for search in float32_searches(workspace):
        outcome = best_artifact(search, workspace.golden, workspace.limit, workspace.progress, workspace.activation)
        if isinstance(outcome, Artifact):
            artifacts.append(outcome)
        elif outcome.cause == "unavailable" or foreign:
            reasons.append(outcome.reason)
            workspace.progress(f"skipped: {outcome.reason}")
        else:
            raise ExportError(f"{outcome.reason}{_other_network(workspace)}")
    if not artifacts:
        raise ExportError("; ".join(reasons))
    return artifacts


def _other_network(workspace: Workspace) -> str:
    """For an error about our network: the library's may be within the tolerance, or run in one of the engines."""
    reference = workspace.source.reference
    return "" if reference == "vitserve" else f"; --network library exports the network as {reference} computes it"


def with_merging_limit(workspace: Workspace, images: Images | None, max_loss: float) -> Workspace:
    """For a network that merges tokens: all artifacts are compared with the network that does not."""
    if images is None:
        workspace.progress("note: without --images, the loss of accuracy by token merging is not measured")
        return replace(workspace, limit=AccuracyLimit(max_loss))
    workspace.progress(f"running the network without token merging on {len(images.pixels)} evaluation images")
    outputs = workspace.source.run_unmerged(images.pixels)
    assert outputs is not None
    return replace(workspace, limit=AccuracyLimit(max_loss, EvaluationSet(images, outputs)))


def with_limit(workspace: Workspace, float32: Artifact, images: Images | None, max_loss: float) -> Workspace:
    """The workspace with the limit for reduced precisions. Runs the verified ``float32`` artifact on the images."""
    if images is None:
        return replace(workspace, limit=AccuracyLimit(max_loss))
    workspace.progress(f"running {float32.engine} in float32 on {len(images.pixels)} evaluation images")
    with opened(workspace, float32.engine, "fp32", float32.path, float32.weights) as reference:
        evaluation = EvaluationSet(images, reference.run(images.pixels))
    return replace(workspace, limit=AccuracyLimit(max_loss, evaluation))


def reduced_artifacts(workspace: Workspace, precisions: Sequence[Precision] | None) -> list[Artifact]:
    """One artifact for each precision. None stands for DEFAULT_PRECISIONS, which are skipped if they fail.

    Raises ExportError if one of ``precisions`` fails.
    """
    artifacts = []
    for precision in DEFAULT_PRECISIONS if precisions is None else precisions:
        if precision == "fp32":
            continue
        search = reduced_search(precision, workspace)
        outcome = best_artifact(search, workspace.golden, workspace.limit, workspace.progress, workspace.activation)
        if isinstance(outcome, Artifact):
            artifacts.append(outcome)
        elif precisions is not None:
            raise ExportError(outcome.reason)
        else:
            workspace.progress(f"skipped: {outcome.reason}")
    return artifacts


def recorded_outputs(workspace: Workspace, artifacts: Sequence[Artifact]) -> dict[tuple[str, str], Outputs]:
    """The outputs for the golden images of the artifacts that are later held to them, by engine and precision.

    These are OpenVINO's int8 artifacts, if this CPU's products are exact. ONNX Runtime's depend on the other images of
    a batch, and the outputs of other precisions are close to the source network's.
    """
    recorded = {}
    for artifact in artifacts:
        if (artifact.engine, artifact.precision) == ("openvino", "int8") and machine.multiplies_int8_exactly():
            with opened(workspace, "openvino", "int8", artifact.path, artifact.weights) as candidate:
                recorded["openvino", "int8"] = candidate.run(workspace.golden.pixels)
    return recorded


def remove_unused_files(workspace: Workspace, artifacts: Sequence[Artifact]) -> None:
    """Deletes the graphs of rejected candidates."""
    used = {GRAPH, WEIGHTS, ONNXRUNTIME_GRAPH, *(name for artifact in artifacts for name in artifact.files)}
    for path in workspace.directory.iterdir():
        if path.name not in used:
            path.unlink()
