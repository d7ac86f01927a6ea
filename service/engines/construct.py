"""Constructs an engine by its name. Each engine's library is imported only here, when it is needed."""

from __future__ import annotations

from pathlib import Path

from vitserve.model.arrays import Precision
from vitserve.service import machine
from vitserve.service.engines.catalog import ENGINES
from vitserve.service.engines.engine import Engine, EngineOptions, EngineUnavailableError


def construct_engine(name: str, precision: Precision, graph: Path, options: EngineOptions) -> Engine:
    """``graph`` is the file that the engine runs: an ONNX or OpenVINO graph, a TensorRT plan or a cast graph.

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

                return TensorRtEngine(graph, precision, streams, max_batch)
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
