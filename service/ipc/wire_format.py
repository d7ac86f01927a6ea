"""What a HTTP worker and an engine tell each other: fixed structs in little-endian order. Pixels never travel here.

A message is a header (the sender's epoch, which names its incarnation, and how many records follow) and its records. The socket keeps
messages whole, so a length that does not fit is a fault of the sender, not a torn read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

# What a HTTP worker asks for an image.
ASK, AGAIN, ALONE, WITHDRAW = range(
    4
)  # admit it · it was admitted before · likewise, in a batch of its own · its client has left
# What became of it.
DONE, REJECTED_DEADLINE, REJECTED_FULL, FAILED, EXPIRED, WITHDRAWN = range(6)

MAX_BYTES = 1 << 16
_HEADER = struct.Struct("<II")
_SUBMISSION = struct.Struct("<IBBxxQd")
_ANSWER = struct.Struct("<IB3xQddd")
_AT_ONCE = (MAX_BYTES - _HEADER.size) // _ANSWER.size


class WireFormatError(ValueError):
    """The message's length is not what its header says."""


class Submission(NamedTuple):
    slot: int
    ask: int
    priority: int
    sequence: int
    deadline: float  # monotonic seconds, which all processes of a machine share


class Answer(NamedTuple):
    slot: int
    outcome: int
    sequence: int
    started: float = 0.0  # when its batch began, monotonic seconds
    seconds: float = 0.0  # what its batch took
    retry_after_seconds: float = 0.0


def pack_submission(incarnation: int, submission: Submission) -> bytes:
    return _HEADER.pack(incarnation, 1) + _SUBMISSION.pack(*submission)


def pack_answers(incarnation: int, answers: list[Answer]) -> Iterable[bytes]:
    """As few messages as hold them."""
    for start in range(0, len(answers), _AT_ONCE):
        part = answers[start : start + _AT_ONCE]
        yield b"".join([_HEADER.pack(incarnation, len(part)), *[_ANSWER.pack(*each) for each in part]])


def unpack_submissions(message: bytes) -> tuple[int, list[Submission]]:
    """The sender's epoch, and what it asks. Raises WireError."""
    incarnation, records = _open(message, _SUBMISSION)
    return incarnation, list(map(Submission._make, _SUBMISSION.iter_unpack(records)))


def unpack_answers(message: bytes) -> tuple[int, list[Answer]]:
    """The sender's epoch, and its answers. Raises WireError."""
    incarnation, records = _open(message, _ANSWER)
    return incarnation, list(map(Answer._make, _ANSWER.iter_unpack(records)))


def _open(message: bytes, record: struct.Struct) -> tuple[int, bytes]:
    if len(message) < _HEADER.size:
        raise WireFormatError(f"a message has {len(message)} bytes; its header alone has {_HEADER.size}")
    incarnation, count = _HEADER.unpack_from(message)
    if len(message) != _HEADER.size + count * record.size:
        raise WireFormatError(
            f"a message has {len(message)} bytes; its {count} records take {_HEADER.size + count * record.size}"
        )
    return incarnation, message[_HEADER.size :]
