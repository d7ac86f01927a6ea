"""Statuses and headers of HTTP as those of gRPC. https://grpc.io/docs/guides/status-codes/"""

from __future__ import annotations

from collections.abc import Iterable

from grpc import StatusCode

from vitserve.service.errors import CLIENT_CLOSED_REQUEST

_CODES = {
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    429: StatusCode.RESOURCE_EXHAUSTED,
    CLIENT_CLOSED_REQUEST: StatusCode.CANCELLED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
_TRAILERS = (b"grpc-retry-pushback-ms", b"retry-after", b"server-timing", b"www-authenticate", b"x-request-id")


def code_of(status: int) -> StatusCode:
    """Of an error."""
    return _CODES.get(status, StatusCode.INVALID_ARGUMENT if status < 500 else StatusCode.INTERNAL)


def trailers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[str, str], ...]:
    """The trailing metadata of a response. Without the headers that only browsers use."""
    return tuple((name.decode(), value.decode("latin-1")) for name, value in headers if name in _TRAILERS)
