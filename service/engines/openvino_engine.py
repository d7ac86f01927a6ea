"""OpenVINO on the CPU, in float32, bf16 or int8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import openvino

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.service.engines.engine import EngineUnavailableError, gathered


class OpenVinoEngine:
    """One compiled model, one infer request and one stream a stream."""

    name = "openvino"

    def __init__(
        self, graph: Path, precision: Precision, streams: int, threads: int, max_batch: int, engine_cache_dir: str = ""
    ) -> None:
        self.precision, self.streams, self.max_batch = precision, streams, max_batch
        core = openvino.Core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not has_bf16:
            raise EngineUnavailableError("this CPU has no bf16 arithmetic")
        if engine_cache_dir:
            core.set_property({"CACHE_DIR": engine_cache_dir})
        rest_in_bf16 = precision == "bf16" or (
            precision == "int8" and has_bf16
        )  # of an int8 graph, what was not quantized
        self.compiled = core.compile_model(  # from the path: so it is looked up in the directory before it is read
            graph,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "bf16"
                if rest_in_bf16
                else "f32",  # left alone, a CPU with AVX-512 BF16 would silently take bf16
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": threads * streams,
            },
        )
        self._requests = [self.compiled.create_infer_request() for _ in range(streams)]

    def share(self, pixels: Pixels) -> None:
        """Nothing to arrange: the CPU reads it as it is."""

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        results = self._requests[stream].infer({"pixels": gathered(pixels, rows)}, share_inputs=True)
        return Outputs(results["logits"].copy(), results["embedding"].copy())

    def close(self) -> None:
        self._requests.clear()
        del self.compiled
