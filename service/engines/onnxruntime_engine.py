"""ONNX Runtime on the CPU, in fp32 or int8. It has no bf16 on x86."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.service.engines.engine import select_rows


class OnnxRuntimeEngine:
    """All streams use one session, so the weights are loaded once. Its run() is thread-safe."""

    name = "onnxruntime"

    def __init__(self, graph: Path, precision: Precision, streams: int, threads: int, max_batch: int) -> None:
        self.precision, self.streams, self.max_batch = precision, streams, max_batch
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads would occupy cores that decode images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def share(self, pixels: Pixels) -> None:
        """Does nothing: the CPU reads the slot table directly."""

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        logits, embedding = self._session.run(["logits", "embedding"], {"pixels": select_rows(pixels, rows)})
        return Outputs(logits, embedding)

    def close(self) -> None:
        del self._session
