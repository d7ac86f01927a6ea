"""Cross-origin resource sharing: which web pages may use the API (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from __future__ import annotations

from collections.abc import Iterable

Headers = list[tuple[bytes, bytes]]

_EXPOSED = (b"access-control-expose-headers", b"Retry-After, Server-Timing, X-Request-ID")
_VARY = (b"vary", b"Origin")  # a cache must not give the response to another page
_ALLOWED = b"Authorization, Content-Encoding, Content-Type, Vitserve-Priority, X-Request-ID"
_PREFLIGHT: Headers = [
    (b"access-control-allow-methods", b"GET, HEAD, POST"),
    (b"access-control-allow-headers", _ALLOWED),
    (b"access-control-max-age", b"7200"),  # seconds; browsers use no more
]


class Cors:
    def __init__(self, origins: str) -> None:
        """``origins``: as in the setting cors_origins."""
        self._origins = frozenset(origin.strip().encode() for origin in origins.split(",") if origin.strip())

    def headers(self, request: Iterable[tuple[bytes, bytes]]) -> Headers:
        """Of the response to a request with these headers."""
        if not self._origins:
            return []
        if b"*" in self._origins:
            return [(b"access-control-allow-origin", b"*"), _EXPOSED]
        origin = next((value for name, value in request if name == b"origin"), b"")
        if origin not in self._origins:
            return [_VARY]
        return [(b"access-control-allow-origin", origin), _EXPOSED, _VARY]

    def preflight(self, method: str, request: Iterable[tuple[bytes, bytes]]) -> Headers | None:
        """The additional headers of the response to a preflight request. None if the request is not an allowed one."""
        if not self._origins or method != "OPTIONS":
            return None
        headers = dict(request)
        origin = headers.get(b"origin")
        allowed = origin is not None and (origin in self._origins or b"*" in self._origins)
        return _PREFLIGHT if allowed and b"access-control-request-method" in headers else None
