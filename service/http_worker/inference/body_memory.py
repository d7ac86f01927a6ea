"""The memory of the request bodies that an HTTP worker holds, bounded.

Bodies count from their first byte until the response, by the bytes that have arrived: a client that announces a large
body and does not send it reserves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitserve.service import errors

# Bytes that a request takes for each byte of its body, with the copies that parsing makes.
_COPIES = {"application/json": 2, "multipart/form-data": 2, "application/grpc": 3}
# A part of the memory is for small bodies, so that a few clients with large ones do not keep others out.
SMALL_BYTES = 2**20
_SHARE_OF_LARGE = 0.75


def memory_of(media_type: str, body_bytes: int) -> int:
    return _COPIES.get(media_type, 1) * body_bytes


@dataclass
class BodyMemory:
    capacity: int  # bytes
    used: int = 0

    def fits(self, held: int, more: int) -> bool:
        """Whether ``more`` bytes are free for a request that holds ``held`` bytes already.

        Raises BodyTooLargeError if they never are.
        """
        limit = self.capacity if held + more <= SMALL_BYTES else self.capacity * _SHARE_OF_LARGE
        if self.used + more > limit and held + more > self.largest():
            raise errors.BodyTooLargeError(
                f"the body takes {held + more:,} bytes of memory or more; the limit is {self.largest():,}"
            )
        return self.used + more <= limit

    def largest(self) -> int:
        """Bytes of a request that fits if no other is there."""
        return min(self.capacity, max(SMALL_BYTES, int(self.capacity * _SHARE_OF_LARGE)))
