"""FastAPI and ONNX Runtime, with each request in a thread. Often the first version of an inference service."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from pipeline import postprocess, preprocess, session

app, run = FastAPI(), session()


@app.post("/predict")
async def predict(request: Request) -> dict[str, Any]:
    image = await request.body()
    return await asyncio.to_thread(lambda: postprocess(run(preprocess(image)[None])[0]))
