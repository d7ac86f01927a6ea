"""What /docs says of the routes that app.py serves without FastAPI's own machinery."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_IMAGE = {"type": "string", "format": "binary"}
_PROBLEM = {"description": "Problem (RFC 9457); `code` is stable.", "content": {"application/problem+json": {}}}
_PREDICTION = {
    "type": "object",
    "properties": {"label": {"type": "string"}, "index": {"type": "integer"}, "probability": {"type": "number"}},
}
_ANSWER = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "version": {"type": "string"},
        "results": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"predictions": {"type": "array", "items": _PREDICTION}, "error": {"type": "object"}},
            },
        },
    },
}


def _option(name: str, meaning: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": meaning, "schema": {"type": "integer", "minimum": 1}}


def _header(name: str, meaning: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "description": meaning,
        "schema": {"type": "integer", "minimum": 0, "maximum": 9},
    }


def _get(summary: str, *errors: str) -> dict[str, Any]:
    return {
        "get": {"summary": summary, "responses": {"200": {"description": summary}} | dict.fromkeys(errors, _PROBLEM)}
    }


_PATHS: dict[str, Any] = {
    "/v1/classify": {
        "post": {
            "summary": "Class probabilities of one or several images",
            "description": "Answers have one shape always. Of several images a bad one carries its own `error`, and the others are answered.",
            "parameters": [
                _option("top_k", "Predictions per image; 5 unless told."),
                _option("timeout_ms", "When the client stops caring, in milliseconds."),
                _header("Vitserve-Priority", "9 is answered first; 5 unless told."),
            ],
            "requestBody": {
                "required": True,
                "content": {
                    "multipart/form-data": {
                        "schema": {"type": "object", "properties": {"image": {"type": "array", "items": _IMAGE}}}
                    },
                    "image/jpeg": {"schema": _IMAGE},
                    "application/octet-stream": {"schema": _IMAGE},
                    "application/json": {
                        "schema": {
                            "type": "object",
                            "properties": {
                                "images": {"type": "array", "items": {"type": "string", "format": "base64"}}
                            },
                        }
                    },
                },
            },
            "responses": {
                "200": {
                    "description": "Predictions, most probable first",
                    "content": {"application/json": {"schema": _ANSWER}},
                }
            }
            | dict.fromkeys(("400", "413", "415", "422", "429", "500", "503", "504"), _PROBLEM),
        }
    },
    "/v1/model": _get("The bundle served, the engine and precision that serve it, and the parity shown", "503"),
    "/v1/admin/reload": {
        "post": {
            "summary": "Opens the configured bundle again and serves it once it is verified",
            "description": "Needs the admin key as a bearer token. A bundle that cannot be served is rejected with the reason, and the one before serves on.",
            "security": [{"adminKey": []}],
            "responses": {"200": {"description": "The model and version served from now on"}}
            | dict.fromkeys(("403", "409"), _PROBLEM),
        }
    },
    "/livez": _get("The event loop turns"),
    "/readyz": _get("Whether it can answer well now, and the reasons if not", "503"),
    "/metrics": _get("Metrics in Prometheus' text format"),
}


def describe(app: FastAPI) -> None:
    """Makes the app's OpenAPI document the one above."""
    document = get_openapi(title=app.title, version=app.version, routes=[]) | {
        "paths": _PATHS,
        "components": {"securitySchemes": {"adminKey": {"type": "http", "scheme": "bearer"}}},
    }
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's documented way to replace it
