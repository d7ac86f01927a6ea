"""TensorRT plans: what they are called, where they lie, and having one built by a process of its own. Needs no TensorRT.

Imported by open.py, tensorrt_engine.py and export/to_tensorrt.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from model.bundle import GRAPH, WEIGHTS, Bundle
from model.config import ViTConfig
from service.engines.engine import EngineUnavailable

BUILDER = "export.to_tensorrt"  # run, and never imported: a service without a GPU needs none of it


@dataclass(frozen=True)
class PlanOptions:
    precision: Literal["bf16", "fp16"] = "bf16"
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


def plan_path(folder: Path, bundle: Bundle, options: PlanOptions, target: Target) -> Path:
    files = bundle.manifest.files
    digest = hashlib.sha256(f"{files[GRAPH]} {files[WEIGHTS]}".encode()).hexdigest()
    return folder / f"{digest[:12]}-{options.precision}-b{options.max_batch}-{target.slug}.plan"


def attention_layers(bundle: Bundle) -> int:
    config = bundle.manifest.config
    return config.depth if isinstance(config, ViTConfig) else 0


def build_elsewhere(bundle: Bundle, path: Path, options: PlanOptions, progress: Callable[[str], None]) -> None:
    """Minutes, in which this process stays as small as it is. Ends with this one. Raises EngineUnavailable."""
    command = [sys.executable, "-m", BUILDER, str(bundle.path / GRAPH), str(path), str(attention_layers(bundle)), json.dumps(asdict(options))]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as building:
        assert building.stdout is not None
        for line in building.stdout:
            last = line.strip()
            progress(f"building the TensorRT plan: {last}")
    if building.returncode != 0:
        raise EngineUnavailable(f"no TensorRT plan could be built: {last or f'the builder ended with status {building.returncode}'}")
