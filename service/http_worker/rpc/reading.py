"""Reads the messages of requests, and bounds their memory while they arrive.

The library gives a message when all of it has arrived, and its size not before. Nearly all messages arrive at
once. Those that do not are counted, each as large as the limit.
"""

from __future__ import annotations

import asyncio
from typing import Any

from vitserve.service import errors

_AT_ONCE_SECONDS = 0.05
_LEAST_SECONDS = 1.0  # that a slow message has before another may take its place


class MessageReader:
    """All methods run on the event loop."""

    def __init__(self, memory_bytes: int, message_bytes: int, longest_seconds: float) -> None:
        """``memory_bytes``: for messages that arrive slowly. ``message_bytes``: the largest possible."""
        self._most = max(1, memory_bytes // message_bytes)
        self._longest_seconds = longest_seconds
        self._slow: dict[asyncio.Timeout, float] = {}  # and since when, the oldest first

    async def read(self, context: Any) -> bytes:
        """``context``: of an RPC whose message has not been read.

        Raises RequestTimeoutError if it takes longer than the limit, or if too many other messages are slow too.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._longest_seconds) as timeout:
                watch = loop.call_later(_AT_ONCE_SECONDS, self._is_slow, loop, timeout)
                try:
                    message = await context.read()
                finally:
                    watch.cancel()
                    self._slow.pop(timeout, None)
        except TimeoutError:
            raise errors.RequestTimeoutError("the message did not arrive in time") from None
        if not isinstance(message, bytes):  # the library's mark for the end of the stream
            raise errors.BadRequestError("the request has no message")
        return message

    def _is_slow(self, loop: asyncio.AbstractEventLoop, timeout: asyncio.Timeout) -> None:
        self._slow[timeout] = loop.time()
        if len(self._slow) > self._most:
            oldest = next(iter(self._slow))
            evicted = oldest if loop.time() - self._slow[oldest] >= _LEAST_SECONDS else timeout
            del self._slow[evicted]
            evicted.reschedule(loop.time())
