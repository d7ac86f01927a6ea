"""Messages between HTTP workers and engine workers: fixed little-endian structs without pixels or logits.

A message is a header (the sender's incarnation and the number of records) followed by the records.
The sockets preserve message boundaries, so a wrong length is a bug in the sender and never a partial read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Actions of a submission: run an image after admission · run an image that was admitted before · the same, in a batch
# of its own · cancel an image whose client has disconnected.
SUBMIT, RETRY, RETRY_ALONE, WITHDRAW = range(4)
# Outcomes of a completion.
DONE, REJECTED_DEADLINE, REJECTED_FULL, FAILED, EXPIRED, WITHDRAWN = range(6)

MAX_BYTES = 1 << 16
_HEADER = struct.Struct("<II")
_SUBMISSION = struct.Struct("<IBBxxQd?")
_COMPLETION = struct.Struct("<IB3xQddd")


class WireFormatError(ValueError):
    """The length of a message does not match its header."""


class Submission(NamedTuple):
    """From an HTTP worker to an engine worker."""

    slot: int
    action: int
    priority: int
    sequence: int
    deadline: float  # monotonic seconds; all processes of a machine share this clock
    embedding: bool = False  # whether the slot also gets the embedding


class Completion(NamedTuple):
    """From an engine worker to an HTTP worker: the image is finished and its slot can be released."""

    slot: int
    outcome: int
    sequence: int
    started: float = 0.0  # start of the batch, monotonic seconds
    seconds: float = 0.0  # duration of the batch
    retry_after_seconds: float = 0.0


def pack_submissions(incarnation: int, submissions: Sequence[Submission]) -> Iterable[bytes]:
    """As few messages as possible, each at most ``MAX_BYTES`` long."""
    return _pack(incarnation, submissions, _SUBMISSION)


def pack_completions(incarnation: int, completions: Sequence[Completion]) -> Iterable[bytes]:
    """As few messages as possible, each at most ``MAX_BYTES`` long."""
    return _pack(incarnation, completions, _COMPLETION)


def _pack(
    incarnation: int, records: Sequence[Submission] | Sequence[Completion], kind: struct.Struct
) -> Iterable[bytes]:
    most = (MAX_BYTES - _HEADER.size) // kind.size
    for start in range(0, len(records), most):
        part = records[start : start + most]
        yield b"".join([_HEADER.pack(incarnation, len(part)), *[kind.pack(*record) for record in part]])


def unpack_submissions(message: bytes) -> tuple[int, list[Submission]]:
    """The sender's incarnation and its submissions. Raises WireFormatError."""
    incarnation, records = _split(message, _SUBMISSION)
    return incarnation, list(map(Submission._make, _SUBMISSION.iter_unpack(records)))


def unpack_completions(message: bytes) -> tuple[int, list[Completion]]:
    """The sender's incarnation and its completions. Raises WireFormatError."""
    incarnation, records = _split(message, _COMPLETION)
    return incarnation, list(map(Completion._make, _COMPLETION.iter_unpack(records)))


def _split(message: bytes, record: struct.Struct) -> tuple[int, bytes]:
    """The incarnation and the bytes of the records."""
    if len(message) < _HEADER.size:
        raise WireFormatError(f"a message has {len(message)} bytes; the header alone has {_HEADER.size}")
    incarnation, count = _HEADER.unpack_from(message)
    expected = _HEADER.size + count * record.size
    if len(message) != expected:
        raise WireFormatError(f"a message has {len(message)} bytes; a message of {count} records has {expected}")
    return incarnation, message[_HEADER.size :]
