"""Description of the served model, written by an engine worker at the end of the slot table for the HTTP workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pydantic

from vitserve.model.arrays import Activation
from vitserve.model.bundle.preprocess import Preprocessing


@dataclass(frozen=True)
class ModelInfo:
    name: str
    version: str
    identity: str  # sha256 of the bundle's manifest, which contains the sha256 of every other file
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    engine: str
    precision: str
    details: dict[str, Any]  # for GET /v1/model: the bundle's summary, with the engine under "serving"
    activation: Activation = "softmax"  # of the logits; model.arrays.to_probabilities applies it
    temperature: float = 1.0  # divides the logits first

    def to_json(self) -> bytes:
        return _ADAPTER.dump_json(self)

    @staticmethod
    def from_json(text: bytes) -> ModelInfo:
        return _ADAPTER.validate_json(text)


_ADAPTER = pydantic.TypeAdapter(ModelInfo)
