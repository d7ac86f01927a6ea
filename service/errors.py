"""Everything that vitserve answers instead of a result, as application/problem+json (RFC 9457). Each class carries its status and a stable code.

ServiceError
├── BadRequest 400            malformed body, or an option out of its range
├── Forbidden 403             the admin key is wrong, or none was set
├── ReloadRefused 409         the new bundle cannot be served; the old one is
├── BodyTooLarge 413          more bytes than the limit
├── ImageTooLarge 413         more pixels than the limit, found from the header
├── UnsupportedMediaType 415
├── NotAnImage 422            no allowed format recognizes the bytes
├── DamagedImage 422          truncated or broken data
├── Overloaded 429            could not be answered in time; Retry-After says when it could
├── EngineFailed 500          the engine raised while it ran the batch, or two engines died of it
├── NotReady 503              starting, draining, or broken
└── DeadlineExceeded 504      admitted, and overtaken by its deadline
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from vitserve.model.bundle import preprocess


class ServiceError(Exception):
    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

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
    status, code, title = 400, "bad_request", "The request is malformed"


class ForbiddenError(ServiceError):
    status, code, title = 403, "forbidden", "This needs the admin key"


class ReloadRejectedError(ServiceError):
    status, code, title = 409, "reload_rejected", "The bundle cannot be served"


class BodyTooLargeError(ServiceError):
    status, code, title = 413, "body_too_large", "The body has too many bytes"


class ImageTooLargeError(ServiceError):
    status, code, title = 413, "image_too_large", "The image has too many pixels"


class UnsupportedMediaTypeError(ServiceError):
    status, code, title = 415, "unsupported_media_type", "The content type is not one that is accepted"


class NotAnImageError(ServiceError):
    status, code, title = 422, "not_an_image", "The bytes are not an image in an accepted format"


class DamagedImageError(ServiceError):
    status, code, title = 422, "damaged_image", "The image is truncated or damaged"


class OverloadedError(ServiceError):
    status, code, title = 429, "overloaded", "The request could not be answered in time"

    def __init__(self, detail: str, reason: str, retry_after_seconds: float) -> None:
        super().__init__(detail)
        self.reason, self.retry_after_seconds = reason, retry_after_seconds

    def problem(self) -> dict[str, Any]:
        return super().problem() | {"retry_after_seconds": round(self.retry_after_seconds, 3)}

    def headers(self) -> dict[str, str]:
        """RFC 9110 has whole seconds only; the body carries the exact figure."""
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_seconds)))}


class EngineFailedError(ServiceError):
    status, code, title = 500, "engine_failed", "The engine failed"


class NotReadyError(ServiceError):
    status, code, title = 503, "not_ready", "The service is not ready"


class DeadlineExceededError(ServiceError):
    status, code, title = 504, "deadline_exceeded", "The deadline passed before an answer was there"


def of_image(error: preprocess.ImageError) -> ServiceError:
    """The answer for an image that preprocessing rejected."""
    if isinstance(error, preprocess.TooManyPixelsError):
        return ImageTooLargeError(str(error))
    if isinstance(error, preprocess.NotAnImageError):
        return NotAnImageError(str(error))
    return DamagedImageError(str(error))
