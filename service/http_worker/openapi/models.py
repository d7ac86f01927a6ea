"""The bodies of requests and responses, as components of the OpenAPI document.

The routes do not use these models at run time: responses are written by hand, which is faster. A test compares them.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from vitserve.model.arrays import Activation
from vitserve.model.bundle.calibration import ProbabilityCalibration
from vitserve.model.bundle.parity import Parity
from vitserve.service.http_worker.inference.response import Encoding, Type

REFERENCE = "#/components/schemas/{model}"
_BINARY: Any = {"items": {"type": "string", "format": "binary"}}


def _optional(**details: Any) -> Any:
    """A field that may be missing, and is never null."""
    return Field(None, **details)


class Problem(BaseModel):
    """Problem details (RFC 9457). ``code`` is stable and meant for programs."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    retry_after_seconds: float = _optional(description="Only with the code overloaded: when to send the request again.")


class Prediction(BaseModel):
    label: str
    index: int
    probability: float = Field(
        ge=0, le=1, description="Softmax. Sigmoid for a model with independent labels: then they do not add up to 1."
    )


_EMBEDDING = "The model's features of the image: a list, or base64 of little-endian numbers."


class Predictions(BaseModel):
    predictions: list[Prediction] = Field(description="Most probable class first.")
    embedding: list[float] | str = _optional(description=f"Only with embedding=true. {_EMBEDDING}")


class Embedding(BaseModel):
    embedding: list[float] | str = Field(description=_EMBEDDING)


class ImageError(BaseModel):
    error: Problem


class ClassifyResponse(BaseModel):
    model: str
    version: str
    results: list[Predictions | ImageError] = Field(description="One result per image, in the order of the request.")


class EmbedResponse(BaseModel):
    model: str
    version: str
    results: list[Embedding | ImageError] = Field(description="One result per image, in the order of the request.")


class Explanation(BaseModel):
    model: str
    version: str
    method: str
    layer: int = _optional(description="Of rollout and attention.")
    layers: int = _optional(description="Of the network.")
    heads: int = _optional(description="Of the layer.")
    class_: int = _optional(alias="class", description="Of occlusion: index.")
    label: str = _optional(description="Of occlusion.")
    grid: list[list[float]] = Field(description="Rows of the map, from 0 to 1.")


class _Options(BaseModel):
    """As in the query."""

    model_config = ConfigDict(extra="forbid")

    normalize: bool = _optional(description="Whether embeddings are scaled to a Euclidean norm of 1.")
    encoding: Encoding = _optional(description="Of embeddings. base64: of little-endian numbers.")
    dtype: Type = _optional(description="Of embeddings. float16 needs base64.")
    timeout_ms: int = _optional(ge=1, le=3_600_000, description="Deadline of the request in milliseconds.")


HEAD_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
HEAD_DESCRIPTION = "A further classifier of the model, see `heads` of /v1/model. none: the embedding only."


class _ClassifyOptions(_Options):
    top_k: int = _optional(ge=1, description="Predictions per image.")
    embedding: bool = _optional(description="Whether results have embeddings too. Other options of them need it.")
    head: str = _optional(pattern=HEAD_PATTERN, description=HEAD_DESCRIPTION)


class _JsonImages(BaseModel):
    images: list[str] = Field(
        min_length=1,
        json_schema_extra={"items": {"type": "string", "format": "byte"}},
        description="Image files in base64. Also as data: URLs, in lines, with the URL-safe alphabet, without padding.",
    )


class _FormImages(BaseModel):
    image: list[str] = Field(
        min_length=1, json_schema_extra=_BINARY, description="Image files: parts with a file name or an image type."
    )


class ClassifyJson(_JsonImages, _ClassifyOptions):
    """A request in JSON."""


class ClassifyForm(_FormImages, _ClassifyOptions):
    """A request as a form."""


class EmbedJson(_JsonImages, _Options):
    """A request in JSON."""


class EmbedForm(_FormImages, _Options):
    """A request as a form."""


class RejectedEngine(BaseModel):
    engine: str
    precision: str
    cause: str = Field(description="unavailable, not_built, damaged, crashed, golden_check")
    reason: str


class Serving(BaseModel):
    """The engine that serves the model."""

    engine: str
    precision: str
    parity: Parity
    rejected: list[RejectedEngine] = Field(description="Faster engines that are not used.")
    streams: int
    threads: int = Field(description="Per stream. 0: the engine's choice.")
    preferred_batch_size: int = Field(description="Smallest batch size near the best throughput.")
    seconds_per_batch_size: dict[str, float] = Field(description="Measured duration of a batch of each size.")


class Limits(BaseModel):
    """Of one request."""

    max_images: int
    max_body_bytes: int


class Head(BaseModel):
    name: str
    version: str
    labels: list[str]
    activation: Activation
    accuracy: float | None = Field(description="On held-out images, if `vitserve head fit` made it.")


class ModelInfo(BaseModel):
    """The bundle's manifest without its training record, with the labels and the engine that serves it."""

    model_config = ConfigDict(extra="allow")

    name: str
    version: str
    labels: list[str]
    heads: list[Head] = Field(description="Further classifiers, for the option `head`.")
    serving: Serving
    limits: Limits
    probability_calibration: ProbabilityCalibration | None = Field(
        description="How the probabilities were calibrated at export. null: they are as the network has them."
    )


class ReloadedModel(BaseModel):
    model: str
    version: str


class Liveness(BaseModel):
    status: str


class Readiness(BaseModel):
    status: str = Field(description="ready, or not ready")
    reasons: list[str] = Field(description="Why the service is not ready.")
    rejected: list[RejectedEngine] = Field(description="Faster engines that are not used.")


_REQUESTS: tuple[type[BaseModel], ...] = (ClassifyJson, ClassifyForm, EmbedJson, EmbedForm)
_RESPONSES: tuple[type[BaseModel], ...] = (
    Problem,
    ClassifyResponse,
    EmbedResponse,
    Explanation,
    ModelInfo,
    ReloadedModel,
    Liveness,
    Readiness,
)


class _Schemas(GenerateJsonSchema):
    """Without titles of fields, and without the default null, which is no valid value here."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        generated = super().default_schema(schema)
        if generated.get("default", ...) is None:
            del generated["default"]
        return generated


def schemas(max_images: int, classes: int | None) -> dict[str, Any]:
    """The components, with the limits of this server. ``classes``: of its model, if it serves one."""
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        *((model, "validation") for model in _REQUESTS),
        *((model, "serialization") for model in _RESPONSES),
    ]
    generated: dict[str, Any] = models_json_schema(modes, ref_template=REFERENCE, schema_generator=_Schemas)[1]["$defs"]
    for model in _REQUESTS:
        properties = generated[model.__name__]["properties"]
        properties["images" if "images" in properties else "image"]["maxItems"] = max_images
        if classes is not None and "top_k" in properties:
            properties["top_k"]["maximum"] = classes
    return generated
