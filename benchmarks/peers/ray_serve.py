"""Ray Serve with one replica and dynamic batching."""

import time
from typing import Any

import numpy as np
from pipeline import postprocess, preprocess, session
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=1, max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Classify:
    def __init__(self) -> None:
        self.session = session()

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def run(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
        return list(self.session(np.stack(pixels)))

    async def __call__(self, request: Request) -> dict[str, Any]:
        return postprocess(await self.run(preprocess(await request.body())))


if __name__ == "__main__":
    serve.start(http_options={"port": 8103})
    serve.run(Classify.bind(), route_prefix="/predict")
    while True:
        time.sleep(3600)
