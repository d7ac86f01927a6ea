"""Reads the parts of a multipart form (RFC 7578) from a complete body, with the parser of python-multipart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vitserve.service import errors

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks


class Part(NamedTuple):
    name: str
    content: bytes
    is_file: bool  # it has a file name


def read_form(content_type: str, body: bytes, max_parts: int) -> list[Part]:
    """Raises BadRequestError."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise errors.BadRequestError("the form could not be read: the content type has no boundary")
    reader = _Reader(max_parts)
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise errors.BadRequestError(f"the form could not be read: {error}") from error
    if not reader.ended:
        raise errors.BadRequestError("the form could not be read: the closing boundary is missing")
    return reader.parts


@dataclass
class _Reader:
    """Receives the events of the parser. The parser passes a buffer and the range in it that belongs to the event."""

    max_parts: int
    parts: list[Part] = field(default_factory=list)
    ended: bool = False
    _headers: dict[bytes, bytes] = field(default_factory=dict)  # of the current part, names in lower case
    _header_name: bytes = b""
    _header_value: bytes = b""
    _content: list[bytes] = field(default_factory=list)

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_content,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        if len(self.parts) == self.max_parts:
            raise ValueError(f"it has more than {self.max_parts} parts")
        self._headers, self._content = {}, []

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        self._content.append(data[start:end])

    def _end_part(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        if disposition != b"form-data" or b"name" not in options:
            raise ValueError("a part has no Content-Disposition: form-data with a name")
        name = options[b"name"].decode("utf-8", "replace")
        self.parts.append(Part(name, b"".join(self._content), b"filename" in options))

    def _end(self) -> None:
        self.ended = True
