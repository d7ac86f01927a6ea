"""The search for OpenVINO's int8 model: SmoothQuant on or off, or some layers in float32 if both lose too much."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from vitserve.export.quantize import int8
from vitserve.export.verify import Candidate, EvaluationSet, Search, loss_of
from vitserve.export.workspace import Workspace, opened
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import GRAPH, Artifact
from vitserve.model.bundle.evaluation import Images, evaluate

if TYPE_CHECKING:
    import openvino

_SMOOTHQUANT = {"int8-smooth": True, "int8-plain": False}


def search_int8(workspace: Workspace, calibration: Images) -> Search:
    """Quantizes with and without SmoothQuant. If neither is within the limit, the better one gets float32 layers.

    Finding these layers takes minutes and needs evaluation images.
    """
    assert workspace.limit is not None
    losses = dict[bool, float]()
    accepted = False
    for name, smooth in _SMOOTHQUANT.items():
        setting = "with" if smooth else "without"
        workspace.progress(f"quantizing to int8 with {len(calibration.pixels)} images, {setting} SmoothQuant")
        model = int8.quantize(workspace.directory / GRAPH, calibration.pixels, smooth=smooth)
        with _saved(model, workspace, name) as candidate:
            outcome = yield candidate
        accepted = accepted or isinstance(outcome, Artifact)
        loss = loss_of(outcome) if isinstance(outcome, Artifact) else outcome.loss
        if loss is not None:
            losses[smooth] = loss
            workspace.progress(f"int8 {setting} SmoothQuant loses {loss:.2f} percentage points")
    evaluation, max_loss = workspace.limit.evaluation, workspace.limit.max_loss
    if losses and not accepted and evaluation is not None:
        workspace.progress(f"keeping layers in float32 until at most {max_loss} percentage points are lost")
        smooth = min(losses, key=lambda setting: losses[setting])
        model = _quantize_partially(workspace, calibration, evaluation, max_loss, smooth)
        with _saved(model, workspace, "int8-partial") as candidate:
            yield candidate


def _quantize_partially(
    workspace: Workspace, calibration: Images, evaluation: EvaluationSet, max_loss: float, smooth: bool
) -> openvino.Model:
    images = evaluation.images

    def loss(outputs: Outputs) -> float:
        return evaluate(lambda _: outputs, evaluation.float32_outputs, images, workspace.activation).loss

    graph = workspace.directory / GRAPH
    return int8.quantize_within_loss(graph, calibration.pixels, images.pixels, loss, max_loss, smooth=smooth)


def _saved(model: openvino.Model, workspace: Workspace, name: str) -> AbstractContextManager[Candidate]:
    int8.save(model, workspace.directory / f"{name}.xml")
    return opened(workspace, "openvino", "int8", f"{name}.xml", f"{name}.bin")
