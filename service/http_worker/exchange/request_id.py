"""The id of a request: that of the client's header X-Request-ID, or a new one. Every response has it."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Iterable

HEADER = b"x-request-id"
# Characters that are safe in a log line and in a header. Any other id is replaced.
_ACCEPTED = re.compile(rb"[\w.~:/+=@-]{1,128}")
_PREFIX = secrets.token_hex(8).encode()  # of this process. A random id for each request would take longer
_NUMBERS = itertools.count(1)


def new() -> bytes:
    return b"%b-%x" % (_PREFIX, next(_NUMBERS))


def of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """``headers``: names in lower case."""
    for name, value in headers:
        if name == HEADER:
            return value if _ACCEPTED.fullmatch(value) else new()
    return new()
