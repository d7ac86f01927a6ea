"""What a bundle's graph is made into for a GPU, TensorRT plans and typed graphs: their names, where they lie, and having one built by a process of its own.

Needs neither TensorRT nor onnx.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vitserve.model.arrays import Precision
from vitserve.model.bundle.bundle import GRAPH, WEIGHTS, Bundle
from vitserve.model.config import ViTConfig
from vitserve.service.engines.engine import EngineUnavailableError
from vitserve.service.python_process import python_command, python_environment

# Run, and never imported: a service without a GPU needs none of it.
PLAN_BUILDER = "vitserve.export.build_plan"
CAST_GRAPH_BUILDER = "vitserve.export.graph.cast_precision"


@dataclass(frozen=True)
class PlanOptions:
    precision: Literal["bf16", "fp16", "fp8"] = "bf16"
    max_batch: int = 64
    optimization_level: int = 3  # 0 … 5: more tactics are tried at each
    workspace_bytes: int = 4 << 30  # at most, while building and for scratch memory of the plan
    allow_unfused: bool = False


@dataclass(frozen=True)
class Target:
    """What a plan is good for, and for nothing else."""

    gpu: str
    compute_capability: tuple[int, int]
    tensorrt: str

    @property
    def slug(self) -> str:
        major, minor = self.compute_capability
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', self.gpu).strip('-').lower()}-sm{major}{minor}-trt{self.tensorrt}"


def plan_path(directory: Path, bundle: Bundle, graph: str, options: PlanOptions, target: Target) -> Path:
    """Of the bundle's file ``graph``."""
    return directory / f"{_digest(bundle, graph)}-{options.precision}-b{options.max_batch}-{target.slug}.plan"


def plans_of(directory: Path, bundle: Bundle) -> list[Path]:
    """Those of the bundle that lie there, whatever GPU they are for; a report of the same name, .json, lies beside each."""
    graphs = sorted({GRAPH, *(each.path for each in bundle.manifest.artifacts if each.engine == "tensorrt")})
    return [path for graph in graphs for path in sorted(directory.glob(f"{_digest(bundle, graph)}-*.plan"))]


def cast_graph_path(directory: Path, bundle: Bundle, precision: Precision) -> Path:
    return directory / f"{_digest(bundle, GRAPH)}-{precision}.onnx"


def _digest(bundle: Bundle, graph: str) -> str:
    files = bundle.manifest.files
    return hashlib.sha256(f"{files[graph]} {files[WEIGHTS]}".encode()).hexdigest()[:12]


def attention_layers(bundle: Bundle) -> int:
    config = bundle.manifest.config
    return config.depth if isinstance(config, ViTConfig) else 0


def build_plan(bundle: Bundle, graph: str, path: Path, options: PlanOptions, progress: Callable[[str], None]) -> None:
    """Minutes. Raises EngineUnavailable."""
    arguments = [str(bundle.path / graph), str(path), str(attention_layers(bundle)), json.dumps(asdict(options))]
    _elsewhere(
        PLAN_BUILDER,
        arguments,
        lambda line: progress(f"building the TensorRT plan: {line}"),
        "no TensorRT plan could be built",
    )


def build_cast_graph(bundle: Bundle, path: Path, precision: Precision, progress: Callable[[str], None]) -> None:
    """Seconds. Raises EngineUnavailable."""
    progress(f"writing the graph in {precision}")
    _elsewhere(
        CAST_GRAPH_BUILDER,
        [str(bundle.path / GRAPH), str(path), precision],
        progress,
        f"no graph in {precision} could be made",
    )


def _elsewhere(module: str, arguments: Sequence[str], progress: Callable[[str], None], failed: str) -> None:
    """In a process that ends with this one, which stays as small as it is."""
    last = ""
    with subprocess.Popen(
        python_command(module, *arguments), stdout=subprocess.PIPE, text=True, env=python_environment()
    ) as building:
        assert building.stdout is not None
        for line in building.stdout:
            last = line.strip()
            progress(last)
    if building.returncode != 0:
        raise EngineUnavailableError(f"{failed}: {last or f'the builder ended with status {building.returncode}'}")
