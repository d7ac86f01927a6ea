"""Checks the head of a request: its size, and the rules that the parser does not check."""

from __future__ import annotations

from collections.abc import Sequence

from vitserve.service import errors

MAX_TARGET_BYTES = 8_192  # RFC 9112, 3 recommends to support at least 8,000

Header = tuple[bytes, bytes]  # the name in lower case


def check_size(target: bytes, headers: Sequence[Header], most_headers: int) -> None:
    """Raises UriTooLongError and HeadersTooLargeError."""
    if len(target) > MAX_TARGET_BYTES:
        raise errors.UriTooLongError(f"the request target is longer than {MAX_TARGET_BYTES:,} bytes")
    if len(headers) > most_headers:
        raise errors.HeadersTooLargeError(f"the request has more than {most_headers} header fields")


def check_head(target: bytes, headers: Sequence[Header], version: str) -> None:
    """Raises BadRequestError for a head that RFC 9112 forbids. ``version``: "1.1"."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version != "1.0"):  # 3.2
        raise errors.BadRequestError(f"the request has {len(hosts)} Host header fields; it must have one")
    if version == "1.0" and any(name == b"transfer-encoding" for name, _ in headers):  # 6.1
        raise errors.BadRequestError("Transfer-Encoding is not allowed in HTTP/1.0")
    scheme, separator, rest = target.partition(b"://")
    if separator and b"/" not in scheme and hosts:  # an absolute URI, 3.2.2
        authority = rest.partition(b"/")[0].partition(b"?")[0]
        if authority.lower() != hosts[0].lower():
            raise errors.BadRequestError("the request target and the Host header field name different hosts")
