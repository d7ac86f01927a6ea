"""ONNX Runtime on the CPU, in float32 or int8 (it has no bf16 on x86)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.service.engines.engine import gathered


class OnnxRuntimeEngine:
    """One session shared by the streams: its run() may be called from several threads, and the weights exist once."""

    name = "onnxruntime"

    def __init__(self, graph: Path, precision: Precision, streams: int, threads: int, max_batch: int) -> None:
        self.precision, self.streams, self.max_batch = precision, streams, max_batch
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # spinning threads burn a core that decodes images
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def share(self, pixels: Pixels) -> None:
        """Nothing to arrange: the CPU reads it as it is."""

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        logits, embedding = self._session.run(["logits", "embedding"], {"pixels": gathered(pixels, rows)})
        return Outputs(logits, embedding)

    def close(self) -> None:
        del self._session
