"""The directory in which a bundle is made, and what its artifacts are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vitserve.export.attention_report import attention_kernels
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.export.quantize.coverage import quantization
from vitserve.export.verify import AccuracyLimit, Candidate
from vitserve.model.arrays import Activation, Precision
from vitserve.model.bundle.bundle import WEIGHTS, Golden
from vitserve.model.bundle.evaluation import Images, in_batches
from vitserve.model.bundle.parity import CALIBRATED
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions

ONNXRUNTIME_GRAPH = "model.onnxruntime.onnx"
FP8_GRAPH = "fp8.onnx"


@dataclass(frozen=True)
class Workspace:
    directory: Path  # holds the reference graph, its weights and ONNX Runtime's graph
    network: ReferenceNetwork
    golden: Golden
    calibration_images: Images | None
    limit: AccuracyLimit | None  # None while float32 is verified
    progress: Callable[[str], None]
    activation: Activation = "softmax"

    @property
    def batch_size(self) -> int:
        return len(self.golden.pixels)


@contextmanager
def opened(
    workspace: Workspace, engine: str, precision: Precision, path: str, weights: str | None = WEIGHTS
) -> Iterator[Candidate]:
    """A candidate that runs on an open engine, which is closed afterwards.

    Raises EngineUnavailableError if the engine cannot run here.
    """
    graph = workspace.directory / path
    runtime = construct_engine(engine, precision, graph, EngineOptions(max_batch=workspace.batch_size))
    try:
        run = in_batches(lambda pixels: runtime.run(0, pixels), workspace.batch_size)
        counted = quantization(runtime, graph) if precision in CALIBRATED else None
        yield Candidate(engine, precision, path, weights, run, attention_kernels(runtime, graph), quantization=counted)
    finally:
        runtime.close()
