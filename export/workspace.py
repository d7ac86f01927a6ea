"""The directory in which a bundle is made, and the inputs of its artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vitserve.export.quantize.coverage import quantization
from vitserve.export.report.attention_report import attention_kernels
from vitserve.export.source_model import SourceModel
from vitserve.export.verify import AccuracyLimit, Candidate
from vitserve.model.arrays import Activation, Precision
from vitserve.model.bundle.bundle import WEIGHTS, Golden
from vitserve.model.bundle.evaluation import Images, in_batches
from vitserve.model.bundle.parity import CALIBRATED
from vitserve.model.config import LibraryConfig
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError

ONNXRUNTIME_GRAPH = "model.onnxruntime.onnx"
FP8_GRAPH = "fp8.onnx"


@dataclass(frozen=True)
class Workspace:
    directory: Path  # holds the reference graph, its weights and ONNX Runtime's graph
    source: SourceModel
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

    Raises EngineUnavailableError if the engine cannot run here, or lacks an operator of another library's network.
    """
    graph = workspace.directory / path
    try:
        runtime = construct_engine(engine, precision, graph, EngineOptions(max_batch=workspace.batch_size))
    except EngineUnavailableError:
        raise
    except Exception as error:  # the runtimes' errors have no common base class
        if not isinstance(workspace.source.config, LibraryConfig):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise EngineUnavailableError(f"{engine} cannot run the graph: {lines[-1] if lines else error!r}") from error
    try:
        run = in_batches(lambda pixels: runtime.run(0, pixels), workspace.batch_size)
        counted = quantization(runtime, graph) if precision in CALIBRATED else None
        yield Candidate(engine, precision, path, weights, run, attention_kernels(runtime, graph), quantization=counted)
    finally:
        runtime.close()
