"""ONNX Runtime on a GPU, from a typed graph (plans.py), by CUDA graphs.

Provider and session options: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, and onnxruntime_session_options_config_keys.h.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

from vitserve.model.arrays import Precision
from vitserve.service.engines.cuda import runtime
from vitserve.service.engines.cuda.batch_sizes import candidates
from vitserve.service.engines.cuda.batching import Buffers, GpuEngine
from vitserve.service.engines.cuda.graph_shapes import GraphShapes, shapes_of
from vitserve.service.engines.engine import EngineUnavailableError

PROVIDER = "CUDAExecutionProvider"
_RUNS_UNTIL_REPLAY = (
    4  # two that allocate, one that captures, and one to see it replayed (microsoft/onnxruntime #15005, #17355)
)


class OnnxRuntimeCudaEngine(GpuEngine):
    """A session for each stream, on the stream's stream and memory; each holds the weights."""

    name = "onnxruntime-cuda"

    def __init__(self, graph: Path, precision: Precision, streams: int, max_batch: int) -> None:
        """Raises EngineUnavailable without a device or the provider, or where it cannot run every node of the graph."""
        if PROVIDER not in onnxruntime.get_available_providers():
            raise EngineUnavailableError(
                "this onnxruntime has no CUDA provider: pip install onnxruntime-gpu in the place of onnxruntime"
            )
        runtime.count_devices()
        onnxruntime.preload_dlls()  # CUDA's libraries, where they were installed as packages
        shapes = shapes_of(graph)
        super().__init__(
            precision,
            streams,
            max_batch,
            candidates(max_batch),
            lambda: Buffers(shapes.image, shapes.classes, shapes.width, max_batch),
            lambda buffers: _Program(graph, shapes, buffers),
        )


class _Program:
    """Runs on a thread of its own, because the provider captures graphs for each thread again, and a stream is run by whichever thread is free."""

    def __init__(self, graph: Path, shapes: GraphShapes, buffers: Buffers) -> None:
        self._shapes, self._buffers = shapes, buffers
        options = onnxruntime.SessionOptions()
        # The proof of placement: a session of which a single node would run on the CPU is not made.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        provider = {
            "device_id": "0",  # of those that this process sees
            "user_compute_stream": str(buffers.stream.handle),
            "enable_cuda_graph": "1",
            "arena_extend_strategy": "kSameAsRequested",  # the sizes are known, and the largest comes first
            "cudnn_conv_algo_search": "EXHAUSTIVE",  # once for each size, before anything is served
            "use_tf32": "0",
            "sdpa_kernel": "0",  # flash where the type and the head allow it, else what is next best
        }
        try:
            self._session = onnxruntime.InferenceSession(
                graph, options, providers=[(PROVIDER, provider)], enable_fallback=0
            )
        except Exception as error:  # of several kinds, none of them public
            missing = "a node has no kernel there, or a library of CUDA's is missing (its log says which: pip install 'onnxruntime-gpu[cuda,cudnn]')"
            raise EngineUnavailableError(
                f"ONNX Runtime cannot run {graph.name} on the GPU alone; {missing}: {error}"
            ) from error
        self._runs = dict[int, tuple[onnxruntime.IOBinding, onnxruntime.RunOptions]]()
        self._thread = ThreadPoolExecutor(1, "onnxruntime-cuda")

    def prepare(self, size: int) -> None:
        binding, options = self._session.io_binding(), onnxruntime.RunOptions()
        binding.bind_input("pixels", "cuda", 0, np.uint8, (size, *self._shapes.image), self._buffers.pixels.address)
        for name, length in (("logits", self._shapes.classes), ("embedding", self._shapes.width)):
            binding.bind_output(name, "cuda", 0, np.float32, (size, length), self._buffers.device[name].address)
        options.add_run_config_entry("gpu_graph_id", str(size))
        options.add_run_config_entry(
            "disable_synchronize_execution_providers", "1"
        )  # the outputs' copies follow on the same stream
        self._runs[size] = binding, options
        for _ in range(_RUNS_UNTIL_REPLAY):
            self.enqueue(size)
            self._buffers.stream.synchronize()

    def enqueue(self, size: int) -> None:
        binding, options = self._runs[size]
        self._thread.submit(self._session.run_with_iobinding, binding, options).result()
        self._buffers.read(size)

    def forget(self, size: int) -> None:
        del self._runs[size]

    def close(self) -> None:
        self._thread.shutdown()
        self._runs.clear()
        del self._session
