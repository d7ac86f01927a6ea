"""OpenVINO on the CPU, in float32 or bf16. Imported by engines/open.py alone."""

from __future__ import annotations

from pathlib import Path

import openvino

from model.parity import Outputs, Precision
from model.preprocess import Pixels
from service.engines.engine import EngineUnavailable

_TYPES: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """One compiled model, one infer request and one stream a lane."""

    name = "openvino"

    def __init__(self, graph: Path, precision: Precision, lanes: int, threads: int, max_batch: int) -> None:
        self.precision, self.lanes, self.max_batch = precision, lanes, max_batch
        core = openvino.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineUnavailable("this CPU has no bf16 arithmetic")
        compiled = core.compile_model(
            core.read_model(graph),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _TYPES[precision],  # left alone, a CPU with AVX-512 BF16 would silently take bf16
                "NUM_STREAMS": lanes,
                "INFERENCE_NUM_THREADS": threads * lanes,
            },
        )
        self._requests = [compiled.create_infer_request() for _ in range(lanes)]

    def run(self, lane: int, pixels: Pixels) -> Outputs:
        results = self._requests[lane].infer({"pixels": pixels}, share_inputs=True)
        return Outputs(results["logits"].copy(), results["embedding"].copy())

    def close(self) -> None:
        self._requests.clear()
