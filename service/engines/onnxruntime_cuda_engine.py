"""ONNX Runtime on a GPU: runs a cast graph with CUDA graphs.

Options of the provider: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html. Options of the
session: onnxruntime_session_options_config_keys.h.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

from vitserve.model.arrays import Precision
from vitserve.service.engines.cuda import runtime
from vitserve.service.engines.cuda.batching import Buffers, GpuEngine, candidate_sizes
from vitserve.service.engines.engine import EngineUnavailableError
from vitserve.service.engines.graph_shapes import GraphShapes, shapes_of

PROVIDER = "CUDAExecutionProvider"
# Two runs allocate memory, the third captures the graph, the fourth replays it (microsoft/onnxruntime #15005, #17355).
_RUNS_UNTIL_REPLAY = 4


class OnnxRuntimeCudaEngine(GpuEngine):
    """One session per stream, on the CUDA stream and in the memory of that stream. Each session loads the weights."""

    name = "onnxruntime-cuda"

    def __init__(self, graph: Path, precision: Precision, streams: int, max_batch: int) -> None:
        """Raises EngineUnavailableError without a GPU or the provider, or if a node cannot run on the GPU."""
        if PROVIDER not in onnxruntime.get_available_providers():
            raise EngineUnavailableError(
                "this onnxruntime has no CUDA provider: uninstall onnxruntime and install onnxruntime-gpu"
            )
        runtime.count_devices()
        onnxruntime.preload_dlls()  # finds the CUDA libraries that were installed as Python packages
        shapes = shapes_of(graph)
        super().__init__(
            precision,
            streams,
            max_batch,
            candidate_sizes(max_batch),
            lambda: Buffers(shapes.image, shapes.classes, shapes.width, max_batch),
            lambda buffers: _Program(graph, shapes, buffers),
        )


class _Program:
    """Runs on its own thread: the provider captures graphs per thread, and any thread may run a stream."""

    def __init__(self, graph: Path, shapes: GraphShapes, buffers: Buffers) -> None:
        self._shapes, self._buffers = shapes, buffers
        self._session = _session(graph, buffers.stream)
        self._runs = dict[int, tuple[onnxruntime.IOBinding, onnxruntime.RunOptions]]()
        self._thread = ThreadPoolExecutor(1, "onnxruntime-cuda")

    def prepare(self, size: int) -> None:
        binding, options = self._session.io_binding(), onnxruntime.RunOptions()
        binding.bind_input("pixels", "cuda", 0, np.uint8, (size, *self._shapes.image), self._buffers.pixels.address)
        for name, length in (("logits", self._shapes.classes), ("embedding", self._shapes.width)):
            binding.bind_output(name, "cuda", 0, np.float32, (size, length), self._buffers.device[name].address)
        options.add_run_config_entry("gpu_graph_id", str(size))
        # The outputs are copied on the same stream, so the provider need not wait for it.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
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


def _session(graph: Path, stream: runtime.Stream) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # The session is not created if any node would run on the CPU.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider = {
        "device_id": "0",  # of the devices that this process sees
        "user_compute_stream": str(stream.handle),
        "enable_cuda_graph": "1",
        "arena_extend_strategy": "kSameAsRequested",  # the sizes are fixed, and the largest is prepared first
        "cudnn_conv_algo_search": "EXHAUSTIVE",  # once per batch size, at start-up
        "use_tf32": "0",
        "sdpa_kernel": "0",  # flash attention where the type and the head size allow it
    }
    try:
        return onnxruntime.InferenceSession(graph, options, providers=[(PROVIDER, provider)], enable_fallback=0)
    except Exception as error:  # of several types, none of them public
        reason = (
            "a node has no GPU kernel, or a CUDA library is missing "
            "(the log names it: pip install 'onnxruntime-gpu[cuda,cudnn]')"
        )
        raise EngineUnavailableError(f"ONNX Runtime cannot run {graph.name} on the GPU; {reason}: {error}") from error
