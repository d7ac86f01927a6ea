"""TensorRT plans and cast graphs: the files that are built from a bundle for the GPU of this machine.

Names them, finds them in ``plan_dir`` and has missing ones built by a separate process. This module itself needs
neither TensorRT nor onnx.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vitserve.model.arrays import Precision
from vitserve.model.bundle.bundle import GRAPH, WEIGHTS, Artifact, Bundle
from vitserve.model.bundle.plan import TITLES, Capability, PlanReport, name_of
from vitserve.service.engines.catalog import ENGINES
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError
from vitserve.service.engines.tensorrt.provider import DATA_CENTER, RTX, RTX_CAPABILITIES
from vitserve.service.engines.tensorrt.target import Target, local_target
from vitserve.service.python_process import python_command, python_environment

# Modules that are run and never imported, so that a service without a GPU does not need their libraries.
PLAN_BUILDER = "vitserve.export.build_plan"
CAST_GRAPH_BUILDER = "vitserve.export.graph.cast_precision"
STATED_REASON = 3  # the exit status of a builder whose last line is the reason; Python's own errors have 1
# The first compute capability with each type: Ada and Ampere.
# https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html
FP8_CAPABILITY, BF16_CAPABILITY = (8, 9), (8, 0)

Progress = Callable[[str], None]


class NotBuiltError(EngineUnavailableError):
    """The engine can run once its plan is built."""


@dataclass(frozen=True)
class PlanOptions:
    precision: Literal["bf16", "fp16", "fp8"] = "bf16"
    max_batch: int = 64
    capabilities: tuple[Capability, ...] = ()  # empty: the GPU of this machine

    @staticmethod
    def of(plain: dict[str, Any]) -> PlanOptions:
        """From asdict(), after JSON turned its tuples into lists."""
        capabilities = tuple((major, minor) for major, minor in plain["capabilities"])
        return PlanOptions(**plain | {"capabilities": capabilities})


def gpu_artifact(bundle: Bundle, artifact: Artifact, options: EngineOptions, progress: Progress) -> Path | None:
    """The plan or cast graph that ``artifact`` runs from, built if it is missing. None if it runs from the bundle.

    A plan that is part of the bundle is never built here.

    Raises ImportError without the engine's library, NotBuiltError with ``defer_builds``, and EngineUnavailableError
    without a GPU or if the build fails.
    """
    if artifact.plan is not None:
        return None
    match ENGINES[artifact.engine].artifact:
        case "plan":
            return _plan(bundle, artifact, options, progress)
        case "cast_graph":
            return _cast_graph(bundle, artifact, options, progress)
        case _:
            return None


def _plan(bundle: Bundle, artifact: Artifact, options: EngineOptions, progress: Progress) -> Path:
    target, precision = local_target(), artifact.precision
    _check_target(target, precision)
    assert precision in ("bf16", "fp16", "fp8")
    plan_options = PlanOptions(precision, options.max_batch)
    path = plan_path(Path(options.plan_dir), bundle, artifact.path, plan_options, target)
    if report_beside(path) is None:
        if options.defer_builds:
            _reject_unbuilt(path)
        _build_plan_once(bundle, artifact.path, path, plan_options, progress)
    return path


def _check_target(target: Target, precision: Precision) -> None:
    """Raises EngineUnavailableError if there is no plan in the precision for the GPU."""
    first = {"fp8": FP8_CAPABILITY, "bf16": BF16_CAPABILITY}.get(precision, (0, 0))
    if target.compute_capability < first:
        raise EngineUnavailableError(
            f"{precision} needs {name_of(first)}; the {target.gpu} is {name_of(target.compute_capability)}"
        )
    if target.library == RTX.library and target.compute_capability not in RTX_CAPABILITIES:
        raise EngineUnavailableError(
            f"{TITLES[RTX.library]} does not support the {target.gpu}, which is {name_of(target.compute_capability)}: "
            f"pip install 'vitserve[{DATA_CENTER.extra}]'"
        )


def _reject_unbuilt(path: Path) -> None:
    """A failed build is not repeated in the background: it takes minutes on the GPU that serves requests."""
    failure = _failure_of(path)
    if failure.exists():
        raise EngineUnavailableError(f"{failure.read_text()}; remove {failure} to try again")
    raise NotBuiltError("its plan is not built yet")


def _build_plan_once(bundle: Bundle, graph: str, path: Path, options: PlanOptions, progress: Progress) -> None:
    failure = _failure_of(path)
    try:
        build_plan(bundle.path / graph, path, options, progress)
    except EngineUnavailableError as error:
        path.parent.mkdir(parents=True, exist_ok=True)
        failure.write_text(str(error))
        raise
    failure.unlink(missing_ok=True)


def _failure_of(plan: Path) -> Path:
    """The file that holds the reason of a failed build."""
    return plan.with_suffix(".failed")


def _cast_graph(bundle: Bundle, artifact: Artifact, options: EngineOptions, progress: Progress) -> Path:
    from vitserve.service.engines.cuda import runtime

    runtime.count_devices()  # raises EngineUnavailableError before anything is built
    path = cast_graph_path(Path(options.plan_dir), bundle, artifact.precision)
    if not path.exists():
        build_cast_graph(bundle, path, artifact.precision, progress)
    return path


def plan_path(directory: Path, bundle: Bundle, graph: str, options: PlanOptions, target: Target) -> Path:
    """``graph`` is the bundle's file that the plan is built from."""
    return directory / f"{_digest(bundle, graph)}-{options.precision}-b{options.max_batch}-{target.slug}.plan"


def report_beside(plan: Path) -> PlanReport | None:
    """The report of a plan that was built on this machine. None if the plan or a readable report is missing."""
    try:
        return PlanReport.from_json(plan.with_suffix(".json").read_text()) if plan.exists() else None
    except (OSError, ValueError):
        return None


def plans_of(directory: Path, bundle: Bundle) -> list[Path]:
    """The bundle's plans in ``directory``, for any GPU. Beside each plan lies its PlanReport, with the suffix .json."""
    plan_engines = {name for name, kind in ENGINES.items() if kind.artifact == "plan"}
    artifacts = [artifact for artifact in bundle.manifest.artifacts if artifact.plan is None]
    own_graphs = {artifact.path for artifact in artifacts if artifact.engine in plan_engines}
    return [
        path
        for graph in sorted({GRAPH, *own_graphs})
        for path in sorted(directory.glob(f"{_digest(bundle, graph)}-*.plan"))
    ]


def cast_graph_path(directory: Path, bundle: Bundle, precision: Precision) -> Path:
    return directory / f"{_digest(bundle, GRAPH)}-{precision}.onnx"


def _digest(bundle: Bundle, graph: str) -> str:
    files = bundle.manifest.files
    return hashlib.sha256(f"{files[graph]} {files[WEIGHTS]}".encode()).hexdigest()[:12]


def build_plan(graph: Path, path: Path, options: PlanOptions, progress: Progress) -> None:
    """Builds the plan of the graph at ``path``, with its report beside it. Raises EngineUnavailableError.

    Takes seconds with TensorRT for RTX, and minutes with TensorRT for data centers.
    """
    # A build for listed compute capabilities is independent of this machine's GPU.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.capabilities else {}

    def report(line: str) -> None:
        progress(f"building the TensorRT plan: {line}")

    arguments = [str(graph), str(path), json.dumps(asdict(options))]
    _run_builder(PLAN_BUILDER, arguments, report, "the TensorRT plan could not be built", hidden)


def build_cast_graph(bundle: Bundle, path: Path, precision: Precision, progress: Progress) -> None:
    """Takes seconds. Raises EngineUnavailableError."""
    progress(f"writing the {precision} graph")
    arguments = [str(bundle.path / GRAPH), str(path), precision]
    _run_builder(CAST_GRAPH_BUILDER, arguments, progress, f"the {precision} graph could not be written", {})


def _run_builder(
    module: str, arguments: Sequence[str], progress: Progress, failure: str, environment: Mapping[str, str]
) -> None:
    """Runs ``module`` in its own process, so that this one does not load its libraries.

    Each line of its output is a step, and the last line of a failed run is the reason.
    """
    last_line = ""
    command, variables = python_command(module, *arguments), {**python_environment(), **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last_line = line.strip()
            progress(last_line)
    if process.returncode != 0:
        stated = process.returncode == STATED_REASON and last_line  # otherwise it crashed, and the last line is a step
        reason = stated or f"the builder exited with status {process.returncode}"
        raise EngineUnavailableError(f"{failure}: {reason}")
