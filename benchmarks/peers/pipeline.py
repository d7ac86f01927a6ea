"""The steps that all servers here have in common: decode and resize, run the network, return the best five classes."""

import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

MODEL, SIZE, THREADS = os.environ["MODEL"], int(os.environ["SIZE"]), int(os.environ.get("THREADS", "2"))


def session() -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from normalized pixels [n, 3, SIZE, SIZE] to logits [n, classes]."""
    return _openvino_session() if os.environ.get("ENGINE") == "openvino" else _onnxruntime_session()


def _openvino_session() -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": THREADS}
    request = openvino.Core().compile_model(MODEL, "CPU", config).create_infer_request()
    return lambda pixels: request.infer({0: pixels})[0].copy()


def _onnxruntime_session() -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]


def preprocess(image: bytes) -> np.ndarray:
    """Returns normalized pixels [3, SIZE, SIZE] in float32."""
    rgb = Image.open(io.BytesIO(image)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return ((np.asarray(rgb, dtype="f4") / 255 - 0.5) / 0.5).astype("f4").transpose(2, 0, 1)


def postprocess(logits: np.ndarray) -> dict[str, Any]:
    exponentials = np.exp(logits - logits.max())
    probabilities = exponentials / exponentials.sum()
    best = np.argsort(-probabilities)[:5]
    return {"predictions": [{"label": str(int(k)), "probability": float(probabilities[k])} for k in best]}
