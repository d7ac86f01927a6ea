"""TensorRT plans as artifacts of a bundle, built without a GPU by TensorRT for RTX.

A plan is portable among the compute capabilities that it lists. Each plan holds its weights, so it can be read without
the rest of the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from vitserve.export.artifacts import ExportError
from vitserve.export.graph.tensorrt_attention import UnsupportedAttentionError, tensorrt_graph
from vitserve.export.verify import Candidate, Search, best_artifact
from vitserve.export.workspace import Workspace, opened
from vitserve.model.bundle.bundle import GRAPH, Artifact
from vitserve.model.bundle.plan import Capability, PlanReport, name_of
from vitserve.service.engines.engine import EngineUnavailableError
from vitserve.service.engines.gpu_artifacts import (
    BF16_CAPABILITY,
    FP8_CAPABILITY,
    PlanOptions,
    build_plan,
    report_beside,
)
from vitserve.service.engines.tensorrt.provider import RTX_CAPABILITIES, require_rtx

MAX_BATCH = 64
_ENGINE = "tensorrt"
_GRAPH = "tensorrt.onnx"  # temporary


@dataclass(frozen=True)
class PlanRequest:
    """The GPUs for which a bundle gets plans."""

    capabilities: tuple[Capability, ...]


def plan_request(text: str) -> PlanRequest:
    """From ``rtx`` or ``rtx:sm89,sm120``. ``rtx`` alone stands for all compute capabilities with bf16.

    Raises ValueError, with the compute capabilities that are allowed.
    """
    library, _, listed = text.partition(":")
    known = {name_of(capability): capability for capability in RTX_CAPABILITIES}
    names = [name.strip() for name in listed.split(",")] if listed else []
    if library != "rtx" or any(name not in known for name in names) or text.endswith(":"):
        raise ValueError(f"--plan is {text!r}; expected rtx, or rtx: and a list of {', '.join(known)}")
    default = tuple(capability for capability in RTX_CAPABILITIES if capability >= BF16_CAPABILITY)
    return PlanRequest(tuple(dict.fromkeys(known[name] for name in names)) or default)


def check_plan_request(request: PlanRequest | None) -> None:
    """Raises ExportError if plans are requested and cannot be built here."""
    if request is not None:
        try:
            require_rtx()
        except EngineUnavailableError as error:
            raise ExportError(str(error)) from error


def plan_artifacts(workspace: Workspace, artifacts: Sequence[Artifact], request: PlanRequest) -> list[Artifact]:
    """A bf16 plan for all compute capabilities that have bf16, and an fp16 plan for the others.

    If ``artifacts`` has fp8, also an fp8 plan for those that have fp8.
    Raises ExportError if a plan cannot be built, or does not fuse its attention, or does not match the source network.
    """
    plans = []
    for options in _all_options(request, has_fp8=any(artifact.precision == "fp8" for artifact in artifacts)):
        fp8 = next((artifact for artifact in artifacts if artifact.precision == options.precision == "fp8"), None)
        try:
            artifact = _verified(workspace, options) if fp8 is None else fp8
        except UnsupportedAttentionError as error:
            raise ExportError(f"the plan in {options.precision}: {error}") from error
        graph = GRAPH if fp8 is None else fp8.path
        path = workspace.directory / f"{options.precision}-rtx.plan"
        report = _built(workspace.directory / graph, path, options, workspace.progress)
        plans.append(replace(artifact, path=path.name, weights=None, plan=report))
    return plans


def _all_options(request: PlanRequest, has_fp8: bool) -> Iterator[PlanOptions]:
    def of(allowed: Callable[[Capability], bool]) -> tuple[Capability, ...]:
        return tuple(sorted(capability for capability in request.capabilities if allowed(capability)))

    fp8, bf16 = (
        of(lambda capability: capability >= FP8_CAPABILITY),
        of(lambda capability: capability >= BF16_CAPABILITY),
    )
    if has_fp8 and fp8:
        yield PlanOptions("fp8", MAX_BATCH, fp8)
    if bf16:
        yield PlanOptions("bf16", MAX_BATCH, bf16)
    if fp16 := of(lambda capability: capability < BF16_CAPABILITY):
        yield PlanOptions("fp16", MAX_BATCH, fp16)


def _built(graph: Path, path: Path, options: PlanOptions, progress: Callable[[str], None]) -> PlanReport:
    progress(f"building the {options.precision} plan for {', '.join(map(name_of, options.capabilities))}")
    try:
        build_plan(graph, path, options, lambda step: None)
    except EngineUnavailableError as error:
        raise ExportError(f"{options.precision}: {error}") from error
    report = report_beside(path)
    assert report is not None  # or the build had failed
    return report


def _verified(workspace: Workspace, options: PlanOptions) -> Artifact:
    """OpenVINO runs the graph of the plan, with the weights in the plan's precision and arithmetic in float32.

    The golden check at start-up verifies the GPU's own arithmetic.
    """

    def search() -> Search:
        graph = workspace.directory / _GRAPH
        ir.save(tensorrt_graph(workspace.directory / GRAPH, options.precision), graph)
        try:
            with opened(workspace, "openvino", "fp32", graph.name, weights=None) as candidate:
                yield _of_tensorrt(candidate, options)
        finally:
            graph.unlink()

    outcome = best_artifact(search(), workspace.golden, workspace.limit, workspace.progress, workspace.activation)
    if not isinstance(outcome, Artifact):
        raise ExportError(f"the plan in {options.precision}: {outcome.reason}")
    return outcome


def _of_tensorrt(candidate: Candidate, options: PlanOptions) -> Candidate:
    return replace(candidate, engine=_ENGINE, precision=options.precision, attention=None, simulated=True)
