"""The OpenAPI document for /docs. Schemas come from the models below, error responses from the tree in errors.py.

The routes do not use these models at run time: app.py writes responses by hand, which is faster. A test compares the
responses with this document.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from vitserve.model.bundle.parity import Parity
from vitserve.service import errors
from vitserve.service.errors import ServiceError
from vitserve.service.http_worker.classify.request_parsing import DEFAULT_PRIORITY, PRIORITY_HEADER


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


class Predictions(BaseModel):
    predictions: list[Prediction] = Field(description="Most probable class first.")


class ImageError(BaseModel):
    error: Problem


class Classification(BaseModel):
    model: str
    version: str
    results: list[Predictions | ImageError] = Field(description="One result per image, in the order of the request.")


class ClassifyJson(BaseModel):
    images: list[str] = Field(
        description="Image files in base64. Also as data: URLs, in lines, with the URL-safe alphabet, without padding."
    )
    top_k: int | None = None
    timeout_ms: int | None = None


class ClassifyForm(BaseModel):
    image: list[str] = Field(json_schema_extra={"items": {"type": "string", "format": "binary"}})
    top_k: int | None = None
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


_MODELS = (Problem, Classification, ClassifyJson, ClassifyForm, ModelDescription, ReloadedModel, Liveness, Readiness)
_REFERENCE = "#/components/schemas/{model}"
_ADMIN_ERRORS = (errors.ForbiddenError, errors.ReloadRejectedError, errors.TooManyAttemptsError)
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
            "securitySchemes": {"adminKey": {"type": "http", "scheme": "bearer"}},
        },
    }
    app.openapi = lambda: document  # type: ignore[method-assign]  # the way that FastAPI documents


def _paths() -> dict[str, Any]:
    classify_errors = [error for error in errors.error_types() if error not in _ADMIN_ERRORS]
    return {
        "/v1/classify": {
            "post": {
                "summary": "Classify one or more images",
                "description": "The response always has the same structure. In a request with several images, an image "
                "that cannot be classified has an `error` in its result, and the other images have predictions.",
                "parameters": [
                    _parameter("top_k", "query", "Predictions per image (default: 5).", minimum=1),
                    _parameter("timeout_ms", "query", "Request deadline in milliseconds.", minimum=1),
                    _parameter(
                        PRIORITY_HEADER,
                        "header",
                        f"9 is the most urgent (default: {DEFAULT_PRIORITY}).",
                        minimum=0,
                        maximum=9,
                    ),
                    _text_header("Content-Encoding", "gzip or deflate. The limit of the body's size applies to both."),
                    _text_header("X-Request-ID", "An id for the log. The response has it, or a new one."),
                ],
                "requestBody": {
                    "required": True,
                    "content": {
                        "multipart/form-data": {"schema": _schema(ClassifyForm)},
                        "image/*": _BINARY,
                        "application/octet-stream": _BINARY,
                        "application/json": {"schema": _schema(ClassifyJson)},
                    },
                },
                "responses": _responses(Classification, classify_errors),
            }
        },
        "/v1/model": {
            "get": {
                "summary": "Served model, engine, precision and numerical parity",
                "responses": _responses(ModelDescription, [ServiceError, errors.NotReadyError]),
            }
        },
        "/v1/admin/reload": {
            "post": {
                "summary": "Reload the configured bundle",
                "description": "Requires the admin key as a bearer token. The new bundle is served once it is "
                "verified. If it cannot be served, the response has the reason and the current model stays in service.",
                "security": [{"adminKey": []}],
                "responses": _responses(
                    ReloadedModel, [ServiceError, errors.BadRequestError, *_ADMIN_ERRORS, errors.NotReadyError]
                ),
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


def _parameter(name: str, location: str, description: str, **limits: int) -> dict[str, Any]:
    return {"name": name, "in": location, "description": description, "schema": {"type": "integer"} | limits}


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
