"""The OpenAPI document for /docs. Schemas come from the models below, error responses from the tree in errors.py.

The routes do not use these models at run time: app.py writes responses by hand, which is faster. A test compares the
responses with this document.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from vitserve.model.bundle.parity import Parity
from vitserve.service import errors
from vitserve.service.errors import ServiceError
from vitserve.service.http_worker.inference.request_parsing import DEFAULT_PRIORITY, PRIORITY_HEADER
from vitserve.service.http_worker.inference.response import ENCODINGS, TYPES, Encoding, Type


class Problem(BaseModel):
    """Problem details (RFC 9457). ``code`` is stable and meant for programs."""

    type: str = Field(examples=["urn:vitserve:problem:not_an_image"])
    title: str
    status: int
    code: str
    detail: str
    retry_after_seconds: float | None = Field(
        None, description="Only with the code overloaded: when to send the request again."
    )


class Prediction(BaseModel):
    label: str
    index: int
    probability: float = Field(
        ge=0, le=1, description="Softmax. Sigmoid for a model with independent labels: then they do not add up to 1."
    )


_EMBEDDING = "The model's features of the image: a list, or base64 of little-endian numbers."


class Predictions(BaseModel):
    predictions: list[Prediction] = Field(description="Most probable class first.")
    embedding: list[float] | str | None = Field(None, description=f"Only with embedding=true. {_EMBEDDING}")


class Embedding(BaseModel):
    embedding: list[float] | str = Field(description=_EMBEDDING)


class ImageError(BaseModel):
    error: Problem


class Classification(BaseModel):
    model: str
    version: str
    results: list[Predictions | ImageError] = Field(description="One result per image, in the order of the request.")


class Embeddings(BaseModel):
    model: str
    version: str
    results: list[Embedding | ImageError] = Field(description="One result per image, in the order of the request.")


class EmbeddingOptions(BaseModel):
    normalize: bool | None = Field(None, description="To a Euclidean norm of 1 (default: false).")
    encoding: Encoding | None = Field(None, description="base64: of little-endian numbers (default: list).")
    dtype: Type | None = Field(None, description="float16 needs base64 (default: float32).")


class ClassifyJson(EmbeddingOptions):
    images: list[str] = Field(
        description="Image files in base64. Also as data: URLs, in lines, with the URL-safe alphabet, without padding."
    )
    top_k: int | None = None
    timeout_ms: int | None = None
    embedding: bool | None = None


class ClassifyForm(EmbeddingOptions):
    image: list[str] = Field(json_schema_extra={"items": {"type": "string", "format": "binary"}})
    top_k: int | None = None
    timeout_ms: int | None = None
    embedding: bool | None = None


class EmbedJson(EmbeddingOptions):
    images: list[str] = Field(description="As for /v1/classify.")
    timeout_ms: int | None = None


class EmbedForm(EmbeddingOptions):
    image: list[str] = Field(json_schema_extra={"items": {"type": "string", "format": "binary"}})
    timeout_ms: int | None = None


class RejectedEngine(BaseModel):
    engine: str
    precision: str
    cause: str = Field(examples=["unavailable", "not_built", "damaged", "crashed", "golden_check"])
    reason: str


class Serving(BaseModel):
    engine: str
    precision: str
    parity: Parity
    rejected: list[RejectedEngine] = Field(description="Faster engines that are not used.")
    streams: int
    threads: int = Field(description="Per stream. 0: the engine's choice.")
    preferred_batch_size: int = Field(description="Smallest batch size near the best throughput.")
    seconds_per_batch_size: dict[int, float] = Field(description="Measured duration of a batch of each size.")


class ModelDescription(BaseModel):
    """The bundle's manifest without its training record, with the labels and the engine that serves it."""

    model_config = ConfigDict(extra="allow")

    name: str
    version: str
    labels: list[str]
    serving: Serving


class ReloadedModel(BaseModel):
    model: str
    version: str


class Liveness(BaseModel):
    status: str


class Readiness(BaseModel):
    status: str = Field(examples=["ready", "not ready"])
    reasons: list[str] = Field(description="Why the service is not ready.")
    rejected: list[RejectedEngine] = Field(description="Faster engines that are not used.")


_MODELS: tuple[type[BaseModel], ...] = (
    Problem,
    Classification,
    ClassifyJson,
    ClassifyForm,
    Embeddings,
    EmbedJson,
    EmbedForm,
    ModelDescription,
    ReloadedModel,
    Liveness,
    Readiness,
)
_REFERENCE = "#/components/schemas/{model}"
_ADMIN_ERRORS = (errors.ForbiddenError, errors.ReloadRejectedError, errors.TooManyAttemptsError)
_ERRORS = (ServiceError, errors.UnauthorizedError, errors.NotReadyError)  # of requests without images
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def describe(app: FastAPI) -> None:
    """Makes the document below the app's OpenAPI document."""
    document = get_openapi(title=app.title, version=app.version, routes=[])
    document |= {
        "paths": _paths(),
        "components": {
            "schemas": models_json_schema([(model, "serialization") for model in _MODELS], ref_template=_REFERENCE)[1][
                "$defs"
            ],
            "securitySchemes": {
                "adminKey": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "http", "scheme": "bearer", "description": "If the service has `api_keys`."},
            },
        },
    }
    app.openapi = lambda: document  # type: ignore[method-assign]  # the way that FastAPI documents


def _paths() -> dict[str, Any]:
    return {
        "/v1/classify": {
            "post": _on_images(
                "Classify one or more images",
                "The response always has the same structure. In a request with several images, an image that cannot "
                "be classified has an `error` in its result, and the other images have predictions.",
                [
                    _parameter("top_k", "query", "Predictions per image (default: 5).", minimum=1),
                    _parameter("embedding", "query", "Whether results have embeddings too.", type="boolean"),
                ],
                (ClassifyJson, ClassifyForm, Classification),
            )
        },
        "/v1/embed": {
            "post": _on_images(
                "Embed one or more images",
                "The embedding is the input of the model's classifier. Images that cannot be embedded have an `error`.",
                [],
                (EmbedJson, EmbedForm, Embeddings),
            )
        },
        "/v1/model": {
            "get": {
                "summary": "Served model, engine, precision and numerical parity",
                "responses": _responses(ModelDescription, _ERRORS),
            }
        },
        "/v1/admin/reload": {
            "post": {
                "summary": "Reload the configured bundle",
                "description": "Requires the admin key as a bearer token. The new bundle is served once it is "
                "verified. If it cannot be served, the response has the reason and the current model stays in service.",
                "security": [{"adminKey": []}],
                "responses": _responses(ReloadedModel, [errors.BadRequestError, *_ADMIN_ERRORS, *_ERRORS]),
            }
        },
        "/livez": {"get": {"summary": "Liveness probe", "responses": _responses(Liveness)}},
        "/readyz": {
            "get": {
                "summary": "Readiness probe",
                "responses": _responses(Readiness) | {"503": _response("Not ready", _schema(Readiness))},
            }
        },
        "/metrics": {
            "get": {
                "summary": "Metrics in the Prometheus text format",
                "responses": {"200": _response("Success", {"type": "string"}, "text/plain")},
            }
        },
    }


def _on_images(
    summary: str,
    description: str,
    parameters: Sequence[dict[str, Any]],
    models: tuple[type[BaseModel], type[BaseModel], type[BaseModel]],
) -> dict[str, Any]:
    """``models``: of a JSON body, of a form, and of the response."""
    json_body, form, result = models
    return {
        "summary": summary,
        "description": description,
        "parameters": [
            *parameters,
            _parameter("normalize", "query", "Embeddings have a Euclidean norm of 1.", type="boolean"),
            _parameter("encoding", "query", "Of embeddings.", type="string", enum=list(ENCODINGS)),
            _parameter("dtype", "query", "Of embeddings in base64.", type="string", enum=list(TYPES)),
            _parameter("timeout_ms", "query", "Request deadline in milliseconds.", minimum=1),
            _parameter(
                PRIORITY_HEADER, "header", f"9 is the most urgent (default: {DEFAULT_PRIORITY}).", minimum=0, maximum=9
            ),
            _text_header("Content-Encoding", "gzip or deflate. The limit of the body's size applies to both."),
            _text_header("X-Request-ID", "An id for the log. The response has it, or a new one."),
        ],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": _schema(form)},
                "image/*": _BINARY,
                "application/octet-stream": _BINARY,
                "application/json": {"schema": _schema(json_body)},
            },
        },
        "responses": _responses(result, [error for error in errors.error_types() if error not in _ADMIN_ERRORS]),
    }


def _parameter(name: str, location: str, description: str, type: str = "integer", **limits: Any) -> dict[str, Any]:
    return {"name": name, "in": location, "description": description, "schema": {"type": type} | limits}


def _text_header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def _response(description: str, schema: Mapping[str, Any], media_type: str = "application/json") -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _responses(model: type[BaseModel], failures: Iterable[type[ServiceError]] = ()) -> dict[str, Any]:
    """The response of a successful request, and one for each status of the failures."""
    titles: dict[int, list[str]] = {}
    for error in failures:
        titles.setdefault(error.status, []).append(f"`{error.code}`: {error.title}.")
    return {"200": _response("Success", _schema(model))} | {
        str(status): _response("\n".join(lines), _schema(Problem), "application/problem+json")
        for status, lines in sorted(titles.items())
    }
