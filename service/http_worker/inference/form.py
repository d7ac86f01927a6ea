"""Reads the parts of a multipart form (RFC 7578, RFC 2046) from a complete body.

The boundary is found with bytes.find(), which takes linear time for any body, and in pieces: each call holds the
interpreter lock, and the event loop waits for it. All other work is bounded by the number of parts.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from vitserve.service import errors
from vitserve.service.http_worker.inference import base64_image

_PIECE_BYTES = 1_048_576
_MAX_HEADER_BYTES, _MAX_HEADERS = 8192, 32  # of a part; further headers are ignored
_MAX_PARAMETERS = 16  # of a header; further ones are ignored
_MAX_PADDING_BYTES = 256  # white space after a boundary
_MAX_BOUNDARY_BYTES = 200  # RFC 2046 allows 70
# A parameter of a header.
_PARAMETER = re.compile(rb';[ \t]*([^\s=;"]+)=("(?:[^"\\]|\\.)*+"|[^;\s"]*)[ \t]*', re.DOTALL)


class Part(NamedTuple):
    name: str
    content: bytes
    has_file_name: bool
    media_type: str  # in lower case; empty without a Content-Type


def read_form(content_type: str, body: bytes | bytearray, max_parts: int) -> list[Part]:
    """Raises BadRequestError."""
    boundary = _boundary(content_type)
    delimiter = b"\r\n--" + boundary
    # Two bytes may be missing: the line break before the first boundary.
    position = 2 - len(delimiter) if body.startswith(delimiter[2:]) else _find(body, delimiter, 0)
    if position == -1:
        raise _error(f"the boundary {boundary.decode('latin-1')!r} of the content type is not in the body")
    position = len(delimiter) - 2 if position < 0 else position + len(delimiter)
    parts, view = list[Part](), memoryview(body)
    while not body.startswith(b"--", position):
        if len(parts) == max_parts:
            raise _error(f"it has more than {max_parts} parts")
        start = _end_of_boundary_line(body, position)
        end_of_headers = body.find(b"\r\n\r\n", start - 2, start + _MAX_HEADER_BYTES)
        if end_of_headers < 0:
            raise _error(f"a part has more than {_MAX_HEADER_BYTES:,} bytes of headers, or they do not end")
        position = _find(body, delimiter, end_of_headers + 4)
        if position < 0:
            raise _error("the closing boundary is missing, so the body may be truncated")
        parts.append(_part(bytes(view[start:end_of_headers]), bytes(view[end_of_headers + 4 : position])))
        position += len(delimiter)
    return parts


def _error(reason: str) -> errors.BadRequestError:
    return errors.BadRequestError(f"the form could not be read: {reason}")


def _boundary(content_type: str) -> bytes:
    header = content_type.encode("latin-1")
    boundary = _parameters(header).get(b"boundary", b"")
    if not boundary:
        raise _error("the content type has no boundary")
    if len(boundary) > _MAX_BOUNDARY_BYTES:
        raise _error(f"the boundary has {len(boundary)} bytes; the limit is {_MAX_BOUNDARY_BYTES}")
    return boundary


def _find(body: bytes | bytearray, delimiter: bytes, start: int) -> int:
    """As body.find(), in pieces that overlap by the length of the delimiter."""
    while start < len(body):
        match = body.find(delimiter, start, start + _PIECE_BYTES + len(delimiter))
        if match >= 0:
            return match
        start += _PIECE_BYTES
    return -1


def _end_of_boundary_line(body: bytes | bytearray, position: int) -> int:
    """Whatever begins like the boundary is the boundary (RFC 2046, 5.1.1), and only white space may follow it."""
    end = body.find(b"\r\n", position, position + _MAX_PADDING_BYTES)
    if end < 0 or body[position:end].strip(b" \t"):
        raise _error("a boundary is followed by other characters in its line")
    return end + 2


def _part(header_block: bytes, content: bytes) -> Part:
    headers: dict[bytes, bytes] = {}
    for line in header_block.split(b"\r\n", _MAX_HEADERS)[:_MAX_HEADERS]:
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    disposition = headers.get(b"content-disposition", b"")
    parameters = _parameters(disposition)
    if disposition.partition(b";")[0].strip().lower() != b"form-data" or b"name" not in parameters:
        raise _error("a part has no Content-Disposition: form-data with a name")
    field = parameters[b"name"].decode("utf-8", "replace")
    has_file_name = any(key.partition(b"*")[0] == b"filename" for key in parameters)
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
    transfer_encoding = headers.get(b"content-transfer-encoding", b"").lower().decode("latin-1")
    return Part(field, _content(field, content, transfer_encoding), has_file_name, media_type)


def _content(name: str, content: bytes, transfer_encoding: str) -> bytes:
    """RFC 7578 deprecates the header Content-Transfer-Encoding, but old libraries send it."""
    if transfer_encoding in ("", "7bit", "8bit", "binary"):
        return content
    if transfer_encoding != "base64":
        raise _error(f"the part {name[:100]!r} has the Content-Transfer-Encoding {transfer_encoding[:100]!r}")
    try:
        return base64_image.decode(content)
    except base64_image.Base64Error as error:
        raise _error(f"the part {name[:100]!r} {error}") from error


def _parameters(header: bytes) -> dict[bytes, bytes]:
    """Names in lower case. Reads from left to right and ends at the first text that is not a parameter."""
    parameters: dict[bytes, bytes] = {}
    position = max(0, header.find(b";"))
    for _ in range(_MAX_PARAMETERS):
        match = _PARAMETER.match(header, position)
        if match is None:
            break
        value = match[2]
        parameters[match[1].lower()] = value[1:-1] if value[:1] == b'"' else value
        position = match.end()
    return parameters
