"""OpenVINO on the CPU, in float32, bf16 or int8. Imported by engines/open.py alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import openvino

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.service.engines.engine import EngineUnavailable, gathered


class OpenVinoEngine:
    """One compiled model, one infer request and one stream a lane."""

    name = "openvino"

    def __init__(self, graph: Path, precision: Precision, lanes: int, threads: int, max_batch: int, compiled_folder: str = "") -> None:
        self.precision, self.lanes, self.max_batch = precision, lanes, max_batch
        core = openvino.Core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not has_bf16:
            raise EngineUnavailable("this CPU has no bf16 arithmetic")
        if compiled_folder:
            core.set_property({"CACHE_DIR": compiled_folder})
        rest_in_bf16 = precision == "bf16" or (precision == "int8" and has_bf16)  # of an int8 graph, what was not quantised
        self.compiled = core.compile_model(  # from the path: so it is looked up in the folder before it is read
            graph,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "bf16" if rest_in_bf16 else "f32",  # left alone, a CPU with AVX-512 BF16 would silently take bf16
                "NUM_STREAMS": lanes,
                "INFERENCE_NUM_THREADS": threads * lanes,
            },
        )
        self._requests = [self.compiled.create_infer_request() for _ in range(lanes)]

    def share(self, pixels: Pixels) -> None:
        """Nothing to arrange: the CPU reads it as it is."""

    def run(self, lane: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        results = self._requests[lane].infer({"pixels": gathered(pixels, rows)}, share_inputs=True)
        return Outputs(results["logits"].copy(), results["embedding"].copy())

    def close(self) -> None:
        self._requests.clear()
        del self.compiled
