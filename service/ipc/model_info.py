"""What an engine worker tells the HTTP workers of the model it serves; it travels at the end of the slot table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pydantic

from vitserve.model.bundle.preprocess import Preprocessing


@dataclass(frozen=True)
class ModelInfo:
    name: str
    version: str
    identity: str  # sha256 of the bundle's manifest, which holds those of all its files
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    engine: str
    precision: str
    details: dict[str, Any]  # for GET /v1/model: the bundle's summary, with "serving" about the engine

    def to_json(self) -> bytes:
        return _ADAPTER.dump_json(self)

    @staticmethod
    def from_json(text: bytes) -> ModelInfo:
        return _ADAPTER.validate_json(text)


_ADAPTER = pydantic.TypeAdapter(ModelInfo)
