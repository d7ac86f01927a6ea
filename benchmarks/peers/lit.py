"""LitServe with dynamic batching."""

from typing import Any

import litserve
import numpy as np
from fastapi import UploadFile
from pipeline import postprocess, preprocess, session


class Classify(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.session = session()

    def decode_request(self, request: UploadFile) -> np.ndarray:
        return preprocess(request.file.read())

    def batch(self, images: list[np.ndarray]) -> np.ndarray:
        return np.stack(images)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        return self.session(pixels)

    def unbatch(self, logits: np.ndarray) -> list[np.ndarray]:
        return list(logits)

    def encode_response(self, logits: np.ndarray) -> dict[str, Any]:
        return postprocess(logits)


if __name__ == "__main__":
    server = litserve.LitServer(Classify(max_batch_size=8, batch_timeout=0.005), accelerator="cpu")
    server.run(port=8101, log_level="error", generate_client_file=False)
