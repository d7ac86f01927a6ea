"""Triton's Python backend with dynamic batching."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

sys.path.append(str(Path(__file__).parents[4]))  # Triton's interpreter ignores PYTHONPATH

from pipeline import preprocess, session


class TritonPythonModel:
    def initialize(self, arguments: dict[str, str]) -> None:
        self.session = session()

    def execute(self, requests: list[Any]) -> list[Any]:
        tensors = [triton.get_input_tensor_by_name(request, "image") for request in requests]
        images = [tensor.as_numpy().reshape(-1)[0] for tensor in tensors]
        logits = self.session(np.stack([preprocess(image) for image in images]))
        return [triton.InferenceResponse([triton.Tensor("logits", row[None])]) for row in logits]
