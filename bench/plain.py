"""What most people write: FastAPI, ONNX Runtime, a thread. The yardstick of bench/door.py; BUNDLE names the bundle whose graph it serves."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from fastapi import FastAPI, Request
from PIL import Image

from model.bundle import open_bundle


def create_app() -> FastAPI:
    bundle = open_bundle(Path(os.environ["BUNDLE"]))
    side = bundle.manifest.preprocessing.image_size
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    app = FastAPI()

    def classify(image: bytes) -> dict[str, Any]:
        rgb = Image.open(io.BytesIO(image)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        (logits,) = session.run(["logits"], {"pixels": np.asarray(rgb)[None]})
        exponentials = np.exp(logits[0] - logits[0].max())
        probabilities = exponentials / exponentials.sum()
        order = np.argsort(-probabilities)[:5]
        return {"predictions": [{"label": bundle.labels[index], "probability": float(probabilities[index])} for index in order]}

    @app.post("/v1/classify")
    async def _(request: Request) -> dict[str, Any]:
        image = await request.body()
        return await asyncio.to_thread(classify, image)

    return app
