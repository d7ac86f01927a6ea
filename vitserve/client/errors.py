"""Errors of the client.

VitserveError
├── ConnectionFailedError        no response: the connection failed, also when retried
├── InvalidResponseError         a response that is not vitserve's
└── ProblemError                 a problem response (RFC 9457), or any other response with an error status
    ├── RequestError 4xx         the request is invalid, whatever the image
    ├── ImageError 413, 422      the image cannot be used
    ├── OverloadedError 429      the deadline could not be met, also when retried
    ├── UnavailableError 502, 503  the service was not ready, also when retried
    ├── DeadlineExceededError 504  not finished in time
    └── ServerError 5xx          an unexpected failure; the log of the server has the details under the request id
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

_IMAGE_STATUSES = (413, 422)


class VitserveError(Exception):
    pass


class ConnectionFailedError(VitserveError):
    pass


class InvalidResponseError(VitserveError):
    pass


class ProblemError(VitserveError):
    """``code`` is stable and meant for programs. ``retry_after_seconds``: None if the server did not give a time."""

    def __init__(
        self,
        status: int,
        code: str,
        title: str,
        detail: str,
        request_id: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(f"{title}: {detail}" if detail else title)
        self.status, self.code, self.title, self.detail = status, code, title, detail
        self.request_id, self.retry_after_seconds = request_id, retry_after_seconds


class RequestError(ProblemError):
    pass


class ImageError(ProblemError):
    pass


class OverloadedError(ProblemError):
    pass


class UnavailableError(ProblemError):
    pass


class DeadlineExceededError(ProblemError):
    pass


class ServerError(ProblemError):
    pass


_OF_STATUS: dict[int, type[ProblemError]] = {
    429: OverloadedError,
    502: UnavailableError,
    503: UnavailableError,
    504: DeadlineExceededError,
}


def deadline_exceeded() -> DeadlineExceededError:
    """For a deadline that passes while no response has arrived."""
    return DeadlineExceededError(504, "deadline_exceeded", "The deadline passed", "the server did not respond in time")


def from_response(status: int, headers: Mapping[str, str], body: bytes) -> ProblemError:
    """``headers``: names in lower case."""
    request_id, retry_after = headers.get("x-request-id", ""), _seconds(headers.get("retry-after", ""))
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    if not isinstance(problem, dict):  # of a proxy
        problem = {"title": f"status {status}", "detail": body[:200].decode("utf-8", "replace")}
    return from_problem(problem | {"status": status}, request_id, retry_after)


def from_problem(problem: Mapping[str, Any], request_id: str, retry_after: float | None = None) -> ProblemError:
    """``retry_after``: seconds of the header, which are whole ones. The problem has the exact time."""
    status, code = int(problem.get("status", 500)), str(problem.get("code", ""))
    kind: type[ProblemError] = ServerError if status >= 500 else RequestError
    kind = ImageError if status in _IMAGE_STATUSES else _OF_STATUS.get(status, kind)
    seconds = problem.get("retry_after_seconds", retry_after)
    texts = str(problem.get("title", "")), str(problem.get("detail", ""))
    return kind(status, code, *texts, request_id, None if seconds is None else float(seconds))


def _seconds(retry_after: str) -> float | None:
    """Of the header Retry-After: seconds or a date (RFC 9110, 10.2.3). None if it is neither."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
