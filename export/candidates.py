"""The candidates for each precision. Each search yields the candidates for one artifact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vitserve.export.quantize.fp8 import write_fp8_graph
from vitserve.export.quantize.int8 import write_dynamic_int8_graph
from vitserve.export.quantize.int8_openvino import search_int8
from vitserve.export.verify import Candidate, Search
from vitserve.export.workspace import FP8_GRAPH, ONNXRUNTIME_GRAPH, Workspace, opened
from vitserve.model.arrays import Precision
from vitserve.model.bundle.bundle import GRAPH, WEIGHTS
from vitserve.model.bundle.evaluation import Images
from vitserve.service.engines.catalog import ENGINES
from vitserve.service.engines.engine import EngineUnavailableError

OWN_GRAPHS = {"onnxruntime": ONNXRUNTIME_GRAPH}  # other engines run the reference graph


def float32_searches(workspace: Workspace) -> Iterator[Search]:
    """One for each CPU engine that runs a file of the bundle, the fastest first."""
    for engine, kind in ENGINES.items():
        if kind.artifact == "bundle" and "fp32" in kind.cpu:
            yield _float32(workspace, engine, OWN_GRAPHS.get(engine, GRAPH))


def reduced_search(precision: Precision, workspace: Workspace) -> Search:
    """The candidates in bf16, int8 or fp8. fp8 needs calibration images."""
    calibration = workspace.calibration_images
    match precision:
        case "bf16":
            return _bf16(workspace)
        case "int8":
            return _dynamic_int8(workspace) if calibration is None else search_int8(workspace, calibration)
        case "fp8" if calibration is not None:
            return _fp8(workspace, calibration)
        case _:
            raise ValueError(f"cannot make an artifact in {precision}")


def _float32(workspace: Workspace, engine: str, graph: str) -> Search:
    with opened(workspace, engine, "fp32", graph) as candidate:
        yield candidate


def _bf16(workspace: Workspace) -> Search:
    """OpenVINO; simulated on a machine where it cannot run in bf16."""
    try:
        with opened(workspace, "openvino", "bf16", GRAPH) as candidate:
            yield candidate
            return
    except EngineUnavailableError as error:
        workspace.progress(f"simulating bf16: {error}")
    yield Candidate("openvino", "bf16", GRAPH, WEIGHTS, workspace.source.run_bf16, simulated=True)


def _dynamic_int8(workspace: Workspace) -> Search:
    workspace.progress("quantizing to int8 without calibration images")
    write_dynamic_int8_graph(workspace.directory / ONNXRUNTIME_GRAPH, workspace.directory / "int8.onnx")
    with opened(workspace, "onnxruntime", "int8", "int8.onnx", weights=None) as candidate:
        yield candidate


def _fp8(workspace: Workspace, calibration: Images) -> Search:
    """For TensorRT. ONNX Runtime measures the loss of rounding to fp8, in float32 arithmetic.

    The golden check at start-up verifies the GPU's own arithmetic.
    """
    workspace.progress(f"quantizing to fp8 with {len(calibration.pixels)} images")
    write_fp8_graph(workspace.directory / GRAPH, workspace.directory / FP8_GRAPH, calibration.pixels)
    with opened(workspace, "onnxruntime", "fp8", FP8_GRAPH) as candidate:
        yield replace(candidate, engine="tensorrt", attention=None, simulated=True)
