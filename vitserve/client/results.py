"""The results of the client."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Prediction:
    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True)
class Embedding:
    """The model's features of an image. ``numpy.asarray(embedding)`` makes float32 [width] of it."""

    data: bytes = field(repr=False)  # little-endian float32
    model: str
    version: str  # embeddings of different versions are not comparable

    def __len__(self) -> int:
        return len(self.data) // 4

    def tolist(self) -> list[float]:
        values = array.array("f", self.data)
        if sys.byteorder == "big":
            values.byteswap()
        return values.tolist()

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """numpy's protocol: numpy is imported only here."""
        import numpy as np

        values: np.ndarray[Any, np.dtype[np.float32]] = np.frombuffer(self.data, "<f4")
        return np.array(values, dtype=dtype or np.float32, copy=True if copy is None else copy)


@dataclass(frozen=True, slots=True)
class Classification:
    predictions: tuple[Prediction, ...]  # most probable class first
    embedding: Embedding | None  # only if it was requested
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    version: str
    labels: tuple[str, ...]
    engine: str
    precision: str
    max_images: int  # of one request
    max_body_bytes: int
    details: Mapping[str, Any] = field(repr=False)  # all that /v1/model returns


def classification(result: Mapping[str, Any], model: str, version: str) -> Classification:
    predictions = tuple(Prediction(item["label"], item["index"], item["probability"]) for item in result["predictions"])
    features = embedding(result, model, version) if "embedding" in result else None
    return Classification(predictions, features, model, version)


def embedding(result: Mapping[str, Any], model: str, version: str) -> Embedding:
    return Embedding(base64.b64decode(result["embedding"]), model, version)


def model_of(body: Mapping[str, Any]) -> Model:
    serving, limits = body["serving"], body["limits"]
    return Model(
        body["name"],
        body["version"],
        tuple(body["labels"]),
        serving["engine"],
        serving["precision"],
        limits["max_images"],
        limits["max_body_bytes"],
        body,
    )
