"""Exceptions mapped to RFC 9457 problem responses. Each class has an HTTP status and a stable ``code``.

ServiceError 500 internal                    an unexpected failure; the log has the details
├── BadRequestError 400                      malformed HTTP or body, unknown option, or an option out of range
├── UnauthorizedError 401                    no admin key, or a wrong one
├── ForbiddenError 403                       no admin key is configured
├── NotFoundError 404                        no such path
├── MethodNotAllowedError 405                the path exists, with the methods in the header Allow
├── UnauthorizedError 401                    no key, or one that is not known or no longer valid
├── RequestTimeoutError 408                  the client did not send the request in time
├── ReloadRejectedError 409                  the new bundle cannot be served; the current model stays in service
├── BodyTooLargeError 413                    more bytes than the limit
├── ImageTooLargeError 413                   more pixels or memory than the limit, according to the image header
├── UriTooLongError 414
├── UnsupportedMediaTypeError 415            neither an image nor a form nor JSON
├── UnsupportedCodingError 415               a Content-Encoding other than gzip and deflate
├── NotAnImageError 422                      the bytes match no accepted image format
├── UnsupportedImageError 422                an accepted format, but of a kind that is not read
├── DamagedImageError 422                    truncated or corrupt image data
├── ImageTooComplexError 422                 more scans, chunks, directories, frames or decode time than the limit
├── OverloadedError 429                      the deadline cannot be met; Retry-After says when to try again
├── TooManyAttemptsError 429                 too many wrong admin keys; Retry-After says when to try again
├── HeadersTooLargeError 431                 more header fields or bytes than the limit
├── EngineFailedError 500                    the engine raised an exception, or crashed twice with this image
├── NotExplainableError 501                  the network has no such explanation
├── NotReadyError 503                        starting, or no engine is running
├── TooManyConnectionsError 503              the HTTP worker has no connection left for this request
└── DeadlineExceededError 504                admitted, but not finished in time
"""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

from vitserve.model.bundle import preprocess

CLIENT_CLOSED_REQUEST = 499  # nginx's code for a client that disconnects; only metrics and the log see it


class ServiceError(Exception):
    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal server error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self._body: bytes | None = None

    def body(self) -> bytes:
        """problem() in JSON, encoded once: a rejection is sent to many clients.

        In ASCII, so that any text from the client can be part of the message.
        """
        if self._body is None:
            self._body = json.dumps(self.problem()).encode()
        return self._body

    def problem(self) -> dict[str, Any]:
        return {
            "type": f"urn:vitserve:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }

    def headers(self) -> dict[str, str]:
        return {}


class BadRequestError(ServiceError):
    status, code, title = 400, "bad_request", "Invalid request"


class UnauthorizedError(ServiceError):
    status, code, title = 401, "unauthorized", "A key is required"

    def __init__(self, detail: str, invalid: bool = False) -> None:
        """``invalid``: the request has a key, but a wrong one (RFC 6750, 3)."""
        super().__init__(detail)
        self._challenge = 'Bearer realm="vitserve"' + (', error="invalid_token"' if invalid else "")

    def headers(self) -> dict[str, str]:
        """RFC 9110, 15.5.2."""
        return {"WWW-Authenticate": self._challenge}


class ForbiddenError(ServiceError):
    status, code, title = 403, "forbidden", "The route is disabled"


class NotFoundError(ServiceError):
    status, code, title = 404, "not_found", "There is no such path"


class MethodNotAllowedError(ServiceError):
    status, code, title = 405, "method_not_allowed", "The path does not support this method"

    def __init__(self, detail: str, allowed: str = "") -> None:
        """``allowed``: the methods, separated by commas."""
        super().__init__(detail)
        self._allowed = allowed

    def headers(self) -> dict[str, str]:
        return {"Allow": self._allowed}


class RequestTimeoutError(ServiceError):
    status, code, title = 408, "request_timeout", "The request was not received in time"


class ReloadRejectedError(ServiceError):
    status, code, title = 409, "reload_rejected", "The bundle cannot be served"


class BodyTooLargeError(ServiceError):
    status, code, title = 413, "body_too_large", "The request body is too large"


class ImageTooLargeError(ServiceError):
    status, code, title = 413, "image_too_large", "The image is too large"


class UriTooLongError(ServiceError):
    status, code, title = 414, "uri_too_long", "The request target is too long"


class UnsupportedMediaTypeError(ServiceError):
    status, code, title = 415, "unsupported_media_type", "Unsupported content type"


class UnsupportedCodingError(ServiceError):
    status, code, title = 415, "unsupported_coding", "Unsupported content encoding"

    def headers(self) -> dict[str, str]:
        return {"Accept-Encoding": "gzip, deflate"}


class NotAnImageError(ServiceError):
    status, code, title = 422, "not_an_image", "Not an image in an accepted format"


class DamagedImageError(ServiceError):
    status, code, title = 422, "damaged_image", "The image is truncated or damaged"


class UnsupportedImageError(ServiceError):
    status, code, title = 422, "unsupported_image", "An image of a kind that is not read"


class ImageTooComplexError(ServiceError):
    status, code, title = 422, "image_too_complex", "The image is too complex"


class OverloadedError(ServiceError):
    status, code, title = 429, "overloaded", "Overloaded"

    def __init__(self, detail: str, reason: str, retry_after_seconds: float) -> None:
        super().__init__(detail)
        self.reason, self.retry_after_seconds = reason, retry_after_seconds

    def problem(self) -> dict[str, Any]:
        return super().problem() | {"retry_after_seconds": round(self.retry_after_seconds, 3)}

    def headers(self) -> dict[str, str]:
        """RFC 9110 allows whole seconds only. The body has the exact value."""
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_seconds)))}


class TooManyAttemptsError(ServiceError):
    status, code, title = 429, "too_many_attempts", "Too many wrong admin keys"

    def __init__(self, detail: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_seconds)))}


class HeadersTooLargeError(ServiceError):
    status, code, title = 431, "headers_too_large", "The request header is too large"


class EngineFailedError(ServiceError):
    status, code, title = 500, "engine_failed", "The engine failed"


class NotExplainableError(ServiceError):
    status, code, title = 501, "not_explainable", "This model has no such explanation"


class NotReadyError(ServiceError):
    status, code, title = 503, "not_ready", "The service is not ready"


class TooManyConnectionsError(ServiceError):
    status, code, title = 503, "too_many_connections", "Too many connections"

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class DeadlineExceededError(ServiceError):
    status, code, title = 504, "deadline_exceeded", "The deadline passed"


def internal(request_id: str) -> ServiceError:
    """For an unexpected exception, whose details are in the log under this id."""
    return ServiceError(f"internal server error (request id {request_id})")


def error_types(root: type[ServiceError] = ServiceError) -> list[type[ServiceError]]:
    """The whole tree, ``root`` first."""
    return [root, *(error for child in root.__subclasses__() for error in error_types(child))]


_OF_IMAGES: dict[type[preprocess.ImageError], type[ServiceError]] = {
    preprocess.TooManyPixelsError: ImageTooLargeError,
    preprocess.TooComplexError: ImageTooComplexError,
    preprocess.UnsupportedImageError: UnsupportedImageError,
    preprocess.NotAnImageError: NotAnImageError,
}


def from_image_error(error: preprocess.ImageError) -> ServiceError:
    return _OF_IMAGES.get(type(error), DamagedImageError)(str(error))
