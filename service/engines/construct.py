"""Constructs an engine by its name. Each engine's library is imported only here, when it is needed."""

from __future__ import annotations

from pathlib import Path

from vitserve.model.arrays import Precision
from vitserve.model.bundle.plan import PlanReport
from vitserve.service import machine
from vitserve.service.engines.catalog import ENGINES
from vitserve.service.engines.engine import Engine, EngineOptions, EngineUnavailableError
from vitserve.service.engines.gpu_artifacts import report_beside


def construct_engine(
    name: str, precision: Precision, graph: Path, options: EngineOptions, plan: PlanReport | None = None
) -> Engine:
    """``graph`` is the file that the engine runs: an ONNX or OpenVINO graph, a TensorRT plan or a cast graph.

    ``plan`` describes a TensorRT plan of a bundle. The report of a plan that was built here lies beside it.

    Raises EngineUnavailableError if the library is missing or the hardware does not support it, and the library's own
    errors.
    """
    streams, max_batch = options.streams, options.max_batch
    threads = options.threads or max(1, machine.cores() // streams)
    try:
        match name:
            case "openvino":
                from vitserve.service.engines.openvino_engine import OpenVinoEngine

                return OpenVinoEngine(graph, precision, streams, threads, max_batch, options.engine_cache_dir)
            case "onnxruntime":
                from vitserve.service.engines.onnxruntime_engine import OnnxRuntimeEngine

                return OnnxRuntimeEngine(graph, precision, streams, threads, max_batch)
            case "tensorrt":
                from vitserve.service.engines.tensorrt.engine import TensorRtEngine

                report = plan or report_beside(graph)
                if report is None:
                    raise EngineUnavailableError(f"{graph} is not a TensorRT plan with a report")
                return TensorRtEngine(graph, report, precision, streams, max_batch, options.plan_dir)
            case "onnxruntime-cuda":
                from vitserve.service.engines.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine

                return OnnxRuntimeCudaEngine(graph, precision, streams, max_batch)
            case "torch":
                from vitserve.service.engines.torch.engine import open_torch

                return open_torch(graph, precision, streams, threads, max_batch, compiled=options.compile)
            case _:
                raise EngineUnavailableError(f"unknown engine: {name}")
    except ImportError as error:
        raise not_installed(name, error) from error


def not_installed(name: str, error: ImportError) -> EngineUnavailableError:
    return EngineUnavailableError(f"{name} is not installed ({error}): {ENGINES[name].install_command}")
