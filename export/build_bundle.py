"""Exports a checkpoint to a bundle: trace the graph, make golden images, verify every artifact, write the bundle."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vitserve.export.artifacts import (
    check_precisions,
    float32_artifacts,
    recorded_outputs,
    reduced_artifacts,
    remove_unused_files,
    with_limit,
    with_merging_limit,
)
from vitserve.export.calibrate_probabilities import calibrated, check_labeled
from vitserve.export.checkpoint.labels import checked_labels
from vitserve.export.golden_images import make_golden
from vitserve.export.graph.onnxruntime_attention import write_onnxruntime_graph
from vitserve.export.report.model_card import model_card
from vitserve.export.source_model import Exportable, SourceModel
from vitserve.export.tensorrt.bundle_plans import PlanRequest, check_plan_request, plan_artifacts
from vitserve.export.workspace import ONNXRUNTIME_GRAPH, Workspace
from vitserve.model.arrays import Precision
from vitserve.model.bundle.bundle import (
    GRAPH,
    SCHEMA_VERSION,
    WEIGHTS,
    Bundle,
    Manifest,
    check_destination,
    save_golden,
    sha256,
    write_bundle,
)
from vitserve.model.bundle.evaluation import Images
from vitserve.model.bundle.labels import write_labels
from vitserve.model.bundle.processor import ProcessorComparison
from vitserve.model.config import LibraryConfig, NetworkConfig, merges_tokens

MAX_LOSS = 0.5  # percentage points of accuracy


def build_bundle(
    checkpoint: Exportable,
    path: Path,
    *,
    name: str,
    version: str | None = None,
    training: dict[str, Any] | None = None,
    golden_images: int = 0,
    precisions: Sequence[Precision] | None = None,
    calibration_images: Images | None = None,
    evaluation_images: Images | None = None,
    max_loss: float = MAX_LOSS,
    plans: PlanRequest | None = None,
    labeled_images: Images | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Exports the checkpoint, verifies every artifact and writes the bundle to ``path``.

    A bundle always holds float32 artifacts. ``precisions`` are required in addition. None adds bf16 if it passes.
    ``calibration_images`` calibrate int8 and fp8. A reduced precision may lose ``max_loss`` percentage points of
    accuracy on the ``evaluation_images``, or on the golden images if there are none. Without labels, half of the
    changed predictions count as lost.
    ``plans`` adds TensorRT plans, built without a GPU.
    ``labeled_images`` calibrate the probabilities.
    ``golden_images`` of the evaluation images become golden images too, so that the bundle contains them.

    Raises ExportError if float32, a required precision or a plan fails, BundleError if a bundle cannot be written to
    ``path``. ``path`` is then unchanged.
    """
    check_destination(path)
    check_precisions(precisions or (), calibration_images)
    check_plan_request(plans)
    check_labeled(labeled_images, checkpoint.activation)
    checked_labels(checkpoint.labels, checkpoint.classes, "the checkpoint")
    progress("building the source network")
    source = checkpoint.source_model(progress)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        graph, weights = directory / GRAPH, directory / WEIGHTS
        progress("writing the ONNX graph")
        source.write_graph(graph)
        write_onnxruntime_graph(graph, directory / ONNXRUNTIME_GRAPH)

        progress("running the source network on golden images")
        domain = evaluation_images.pixels[:golden_images] if evaluation_images is not None else None
        golden, merges = make_golden(source.run, source.preprocessing.shape, domain), merges_tokens(source.config)
        golden = replace(golden, judged_by_median=merges)

        processor = _compared_processor(checkpoint, source, progress)
        workspace = Workspace(directory, source, golden, calibration_images, None, progress, checkpoint.activation)
        if merges:
            workspace = with_merging_limit(workspace, evaluation_images, max_loss)
        float32 = float32_artifacts(workspace)
        if not merges:
            workspace = with_limit(workspace, float32[0], evaluation_images, max_loss)
        artifacts = (*float32, *reduced_artifacts(workspace, precisions))
        if plans is not None:
            artifacts = (*artifacts, *plan_artifacts(workspace, artifacts, plans))
        remove_unused_files(workspace, artifacts)

        progress("writing the bundle")
        golden = replace(golden, recorded=recorded_outputs(workspace, artifacts))
        calibration = calibrated(source, labeled_images, progress)
        save_golden(directory / "golden.npz", golden)
        labels = write_labels(directory, checkpoint.labels)
        if training is not None:
            card = model_card(name, source.architecture, training, artifacts, processor, calibration)
            (directory / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            version=version or hashlib.sha256(f"{sha256(graph)} {sha256(weights)}".encode()).hexdigest()[:12],
            variant=source.architecture,
            config=_with_attention(source.config, graph),
            preprocessing=source.preprocessing,
            artifacts=artifacts,
            training=training,
            activation=checkpoint.activation,
            labels=labels,
            reference=source.reference,
            processor=processor,
            probability_calibration=calibration,
        )
        return write_bundle(path, manifest, directory)


def _compared_processor(
    checkpoint: Exportable, source: SourceModel, progress: Callable[[str], None]
) -> ProcessorComparison | None:
    if checkpoint.processor is None:
        return None
    from vitserve.export.checkpoint.library.processor_comparison import compare_processor  # needs torch

    return compare_processor(checkpoint.processor, source, progress)


def _with_attention(config: NetworkConfig, graph: Path) -> NetworkConfig:
    """The configuration of a library's network with the number of attention operators, which only the graph shows."""
    if not isinstance(config, LibraryConfig):
        return config
    return replace(config, attention_layers=sum(node.op_type == "Attention" for node in ir.load(graph).graph))
