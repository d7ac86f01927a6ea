"""Reads one HTTP/1.1 answer after another out of bytes, no more than a load generator needs; no I/O."""

from __future__ import annotations

from typing import NamedTuple


class Answer(NamedTuple):
    status: int
    body: bytes
    keeps: bool  # the connection may be used again


class MalformedResponseError(ValueError):
    """What came is not an HTTP/1.1 answer."""


class _Head(NamedTuple):
    status: int
    length: int | None  # of the body; None where it ends with the connection, or is chunked
    chunked: bool
    keeps: bool


class AnswerReader:
    """Feed it what was received; it gives the answer when it is whole. Bodies are read to their end, and kept."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._head: _Head | None = None

    def feed(self, data: bytes) -> Answer | None:
        """Raises Malformed."""
        self._bytes += data
        while self._head is None:
            end = self._bytes.find(b"\r\n\r\n")
            if end < 0:
                return None
            head = _parsed(bytes(self._bytes[:end]))
            del self._bytes[: end + 4]
            if head.status >= 200:  # before it, "100 Continue" and its like are only announcements
                self._head = head
        if self._head.chunked:
            return self._chunked(self._head)
        if self._head.length is None or len(self._bytes) < self._head.length:
            return None
        return self._taken(bytes(self._bytes[: self._head.length]), self._head.length)

    def end(self) -> Answer | None:
        """The connection has ended: the answer whose body that ends, if there is one."""
        if self._head is None or self._head.length is not None or self._head.chunked:
            return None
        return self._taken(bytes(self._bytes), len(self._bytes))

    def _chunked(self, head: _Head) -> Answer | None:
        body, at = bytearray(), 0
        while (end := self._bytes.find(b"\r\n", at)) >= 0:
            try:
                size = int(self._bytes[at:end].split(b";")[0], 16)
            except ValueError as error:
                raise MalformedResponseError(f"a chunk's size is {bytes(self._bytes[at:end])!r}") from error
            if size == 0:
                trailer = self._bytes.find(b"\r\n\r\n", end)
                return None if trailer < 0 else self._taken(bytes(body), trailer + 4)
            if len(self._bytes) < end + 2 + size + 2:
                return None
            body += self._bytes[end + 2 : end + 2 + size]
            at = end + 2 + size + 2
        return None

    def _taken(self, body: bytes, length: int) -> Answer:
        assert self._head is not None
        answer = Answer(self._head.status, body, self._head.keeps)
        del self._bytes[:length]
        self._head = None
        return answer


def _parsed(head: bytes) -> _Head:
    first, *lines = head.split(b"\r\n")
    words = first.split(b" ", 2)
    if not words[0].startswith(b"HTTP/1.") or len(words) < 2 or not words[1].isdigit():
        raise MalformedResponseError(f"an answer begins with {first[:80]!r}")
    status, fields = int(words[1]), {}
    for line in lines:
        name, _, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip().lower()
    connection = fields.get(b"connection", b"")
    chunked = b"chunked" in fields.get(b"transfer-encoding", b"")
    length = int(fields[b"content-length"]) if fields.get(b"content-length", b"").isdigit() else None
    if status in (204, 304) or status < 200:
        length, chunked = 0, False
    ends = not chunked and length is None
    keeps = not ends and b"close" not in connection and (words[0] == b"HTTP/1.1" or b"keep-alive" in connection)
    return _Head(status, None if chunked else length, chunked, keeps)
