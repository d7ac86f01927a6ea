"""The OpenAPI document: schemas come from models.py, error responses from the tree in errors.py.

It has the limits of this server and its model, so that generated requests and generated clients know them. A test
compares the responses of a real server with it. See https://spec.openapis.org/oas/v3.1.1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from vitserve import __version__
from vitserve.service import errors
from vitserve.service.errors import ServiceError
from vitserve.service.http_worker.explain.options import FORMATS, METHODS
from vitserve.service.http_worker.inference.request_parsing import DEFAULT_PRIORITY, PRIORITY_HEADER
from vitserve.service.http_worker.inference.response import ENCODINGS, TYPES
from vitserve.service.http_worker.openapi import examples, models

Json = dict[str, Any]

_DESCRIPTION = "Inference server for Vision Transformers. All errors are problem details (RFC 9457) with a stable code."
_TAGS = {
    "images": "Classify and embed images.",
    "model": "The model that is served.",
    "operations": "Probes and metrics.",
}
_HEADERS = {
    "X-Request-ID": "The id of the request in the log: the client's, or a new one.",
    "Server-Timing": "Milliseconds of the stages: read, decode, queue, inference (W3C Server Timing).",
    "Retry-After": "Seconds after which the request may be sent again.",
    "WWW-Authenticate": "How to authenticate.",
    "Accept-Encoding": "The content encodings that are accepted.",
}
_HEADERS_OF_STATUS = {401: "WWW-Authenticate", 429: "Retry-After"}  # every response with this status has it
_HEADERS_OF_SOME = {415: "Accept-Encoding", 503: "Retry-After"}  # some have it
_ADMIN_ERRORS = (errors.ForbiddenError, errors.ReloadRejectedError, errors.TooManyAttemptsError)
_ANY_ERRORS = (
    ServiceError,
    errors.BadRequestError,
    errors.RequestTimeoutError,
    errors.BodyTooLargeError,
    errors.UriTooLongError,
    errors.HeadersTooLargeError,
    errors.TooManyConnectionsError,
)
_NOT_OF_EXPLANATIONS = (
    *_ADMIN_ERRORS,
    errors.NotFoundError,
    errors.MethodNotAllowedError,
    errors.UnsupportedMediaTypeError,
    errors.UnsupportedCodingError,
)
_ELSEWHERE = (
    *_ADMIN_ERRORS,
    errors.NotFoundError,
    errors.MethodNotAllowedError,
    errors.NotExplainableError,
)  # errors of other paths and methods


@lru_cache(maxsize=2)
def document(root_path: str, max_images: int, classes: int | None) -> bytes:
    """The document in JSON. ``classes``: of the model, None if none is served."""
    described: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "vitserve",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": root_path or "/"}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": {path: {method: operation} for (method, path), operation in _operations(classes).items()},
        "components": {
            "schemas": models.schemas(max_images, classes),
            "headers": {name: _header(name, required=True) for name in _HEADERS if name != "Accept-Encoding"},
            "examples": {
                kind.code: {"summary": kind.title, "value": examples.problem(kind)} for kind in errors.error_types()
            },
            "securitySchemes": {
                "adminKey": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "http", "scheme": "bearer", "description": "If the service has `api_keys`."},
            },
        },
    }
    return json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()


def _operations(classes: int | None) -> dict[tuple[str, str], Json]:
    top_k = _parameter("top_k", "Predictions per image.", minimum=1, default=min(5, classes or 5))
    if classes:
        top_k["schema"]["maximum"] = classes
    embedding = _parameter(
        "embedding", "Whether results have embeddings too. The options of embeddings need it.", type="boolean"
    )
    head = _parameter("head", models.HEAD_DESCRIPTION, type="string", pattern=models.HEAD_PATTERN)
    ready = _success(models.Readiness, examples.READY)
    return {
        ("post", "/v1/classify"): _on_images(
            "classify",
            "Classify one or more images",
            "The response always has the same structure. In a request with several images, an image that cannot be "
            "classified has an `error` in its result, and the other images have predictions.",
            [top_k, embedding, head],
            (models.ClassifyJson, models.ClassifyForm),
            _success(models.ClassifyResponse, examples.CLASSIFY_RESPONSE, "Server-Timing"),
        ),
        ("post", "/v1/embed"): _on_images(
            "embed",
            "Embed one or more images",
            "The embedding is the input of the model's classifier. Images that cannot be embedded have an `error`.",
            [],
            (models.EmbedJson, models.EmbedForm),
            _success(models.EmbedResponse, examples.EMBED_RESPONSE, "Server-Timing"),
        ),
        ("post", "/v1/explain"): _explain(),
        ("get", "/v1/model"): _operation(
            "get_model",
            "model",
            "Served model, engine, precision and numerical parity",
            _success(models.ModelInfo, examples.MODEL_INFO)
            | _failures([*_ANY_ERRORS, errors.UnauthorizedError, errors.NotReadyError]),
        ),
        ("post", "/v1/admin/reload"): _operation(
            "reload_model",
            "model",
            "Reload the configured bundle",
            _success(models.ReloadedModel, examples.RELOADED)
            | _failures([*_ANY_ERRORS, errors.UnauthorizedError, *_ADMIN_ERRORS, errors.NotReadyError]),
        )
        | {
            "description": "Requires the admin key as a bearer token. The new bundle is served once it is verified. "
            "If it cannot be served, the response has the reason and the current model stays in service.",
            "security": [{"adminKey": []}],
        },
        ("get", "/livez"): _operation(
            "get_liveness",
            "operations",
            "Liveness probe",
            _success(models.Liveness, examples.LIVE) | _failures(_ANY_ERRORS),
        ),
        ("get", "/readyz"): _operation(
            "get_readiness", "operations", "Readiness probe", ready | _failures(_ANY_ERRORS) | _not_ready()
        ),
        ("get", "/metrics"): _operation(
            "get_metrics",
            "operations",
            "Metrics in the Prometheus text format",
            {"200": _response("Success", {"text/plain": _content({"type": "string"}, examples.METRICS)})}
            | _failures(_ANY_ERRORS),
        ),
    }


def _operation(name: str, tag: str, summary: str, responses: Json) -> Json:
    return {"operationId": name, "tags": [tag], "summary": summary, "responses": responses}


def _on_images(
    name: str,
    summary: str,
    description: str,
    parameters: Sequence[Json],
    bodies: tuple[type[BaseModel], type[BaseModel]],
    success: Json,
) -> Json:
    """``bodies``: in JSON, and as a form."""
    json_body, form = bodies
    failures = _failures(kind for kind in errors.error_types() if kind not in _ELSEWHERE)
    return _operation(name, "images", summary, success | failures) | {
        "description": f"{description}\n\nA raw image may have any type `image/*` too. Bodies may have a "
        "`Content-Encoding` of gzip or deflate. Set options in the query, the form or the JSON.",
        "parameters": [
            *parameters,
            _parameter("normalize", "Whether embeddings are scaled to a Euclidean norm of 1.", type="boolean"),
            _parameter("encoding", "Of embeddings.", type="string", enum=list(ENCODINGS)),
            _parameter("dtype", "Of embeddings. float16 needs base64.", type="string", enum=list(TYPES)),
            _parameter("timeout_ms", "Request deadline in milliseconds.", minimum=1, maximum=3_600_000),
            _parameter(
                PRIORITY_HEADER,
                "9 is the most urgent.",
                "header",
                "string",  # as tools validate it, because that is how headers are sent
                enum=[str(priority) for priority in range(10)],
                default=str(DEFAULT_PRIORITY),
            ),
            _parameter("X-Request-ID", "An id for the log. The response has it, or a new one.", "header", "string"),
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": _content(_schema(json_body)),
                "multipart/form-data": _content(_schema(form)),
                "application/octet-stream": _content({"type": "string", "format": "binary"}),
            },
        },
    }


def _explain() -> Json:
    body = {"type": "string", "format": "binary"}
    answer = _success(models.Explanation, examples.EXPLANATION)
    answer["200"]["content"]["image/png"] = _content(body)
    kinds = (kind for kind in errors.error_types() if kind not in _NOT_OF_EXPLANATIONS)
    return _operation("explain", "images", "Explain a prediction", answer | _failures(kinds)) | {
        "description": "A map of the image: which patches the network attends to, or which parts of the image change "
        "the probability. It is computed at the lowest priority. A raw image may have any type `image/*` too.",
        "parameters": [
            _parameter(
                "method", "auto: rollout, or occlusion if it has no meaning.", type="string", enum=list(METHODS)
            ),
            _parameter("format", "heatmap and overlay are PNG.", type="string", enum=list(FORMATS)),
            _parameter("layer", "Of rollout (up to it) and attention. Default: the last.", minimum=1),
            _parameter("head_index", "Of attention. Default: the mean of all heads.", minimum=1),
            _parameter("class", "Of occlusion: index. Default: the most probable class.", minimum=0),
        ],
        "requestBody": {"required": True, "content": {"application/octet-stream": _content(body)}},
    }


def _parameter(name: str, description: str, location: str = "query", type: str = "integer", **limits: Any) -> Json:
    return {"name": name, "in": location, "description": description, "schema": {"type": type} | limits}


def _schema(model: type[BaseModel]) -> Json:
    return {"$ref": models.REFERENCE.format(model=model.__name__)}


def _content(schema: Json, example: Any = None) -> Json:
    return {"schema": schema} if example is None else {"schema": schema, "example": example}


def _response(description: str, content: Mapping[str, Json], *headers: str) -> Json:
    named = {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-ID", *headers)}
    return {"description": description, "headers": named, "content": content}


def _header(name: str, required: bool) -> Json:
    return {"description": _HEADERS[name], "required": required, "schema": {"type": "string"}}


def _success(model: type[BaseModel], example: Json, *headers: str) -> Json:
    return {"200": _response("Success", {"application/json": _content(_schema(model), example)}, *headers)}


def _failures(kinds: Iterable[type[ServiceError]]) -> Json:
    """One response for each status, with an example of each error."""
    of_status: dict[int, list[type[ServiceError]]] = {}
    for kind in kinds:
        of_status.setdefault(kind.status, []).append(kind)
    return {str(status): _failure(status, of_status[status]) for status in sorted(of_status)}


def _failure(status: int, kinds: Sequence[type[ServiceError]]) -> Json:
    description = "\n".join(f"`{kind.code}`: {kind.title}." for kind in kinds)
    named = {kind.code: {"$ref": f"#/components/examples/{kind.code}"} for kind in kinds}
    content = _content(_schema(models.Problem)) | {"examples": named}
    headers = [_HEADERS_OF_STATUS[status]] if status in _HEADERS_OF_STATUS else []
    response = _response(description, {"application/problem+json": content}, *headers)
    if status in _HEADERS_OF_SOME:
        response["headers"][_HEADERS_OF_SOME[status]] = _header(_HEADERS_OF_SOME[status], required=False)
    return response


def _not_ready() -> Json:
    """The response of the readiness probe, or of a server with too many connections."""
    response = _failure(503, [errors.TooManyConnectionsError])
    response["description"] = f"Not ready, or {response['description']}"
    response["content"] = {
        "application/json": _content(_schema(models.Readiness), examples.NOT_READY),
        **response["content"],
    }
    return {"503": response}
