"""Builds the TensorRT plan of a graph, for the GPU of this machine or for listed compute capabilities. Needs no torch.

    python -m vitserve.export.build_plan GRAPH PLAN OPTIONS

prints one line per step. The last line is the PlanReport, or the reason why there is no plan. Both the service, when a
plan is missing, and `vitserve export --plan` run this module (service/engines/gpu_artifacts.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from vitserve.export.graph.tensorrt_attention import UnsupportedAttentionError, attention_nodes, tensorrt_graph
from vitserve.export.tensorrt.builder import PlanError, Progress, build
from vitserve.model.bundle.plan import PlanReport
from vitserve.service.engines.gpu_artifacts import STATED_REASON, PlanOptions, report_beside


def plan_for(source: Path, path: Path, options: PlanOptions, progress: Progress = lambda step: True) -> PlanReport:
    """Builds the plan at ``path``, unless it exists. Of two concurrent calls one builds and the other waits.

    ``source`` is the reference graph, or the quantized graph for fp8.
    Raises PlanError; then there is no file at ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        existing = report_beside(path)
        if existing is not None:
            return existing
        try:
            model = tensorrt_graph(source, options.precision)
        except UnsupportedAttentionError as error:
            raise PlanError(str(error)) from error
        attention, graph = len(attention_nodes(model)), ir.to_proto(model).SerializeToString()
        del model
        plan, report = build(graph, attention, options, path.parent, progress)
        _write(path.with_suffix(".json"), report.to_json().encode())
        _write(path, plan)  # after its report, because a plan is complete once it exists
        return report


def _write(path: Path, content: bytes) -> None:
    """Atomic."""
    temporary = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """The kernel releases the lock when the process ends, however it ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    graph, path, options = sys.argv[1:]

    def progress(step: str) -> bool:
        try:
            print(step, flush=True)  # noqa: T201  # the output is this program's interface
        except BrokenPipeError:  # the parent process has exited
            return False
        return True

    try:
        progress(str(plan_for(Path(graph), Path(path), PlanOptions.of(json.loads(options)), progress)))
    except PlanError as error:
        progress(str(error))
        return STATED_REASON
    return 0


if __name__ == "__main__":
    sys.exit(main())
