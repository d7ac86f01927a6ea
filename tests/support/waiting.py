"""Waiting, with a timeout, for conditions that have no event to wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_POLL_SECONDS = 0.005  # long enough to leave the cores to the processes under test


def eventually(condition: Callable[[], object], description: str, timeout_seconds: float = 60.0) -> None:
    """Returns once ``condition`` holds. Raises AssertionError with the description after the timeout."""
    ends = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {timeout_seconds:.0f} s: {description}"
        time.sleep(_POLL_SECONDS)


async def eventually_async(condition: Callable[[], object], description: str, timeout_seconds: float = 60.0) -> None:
    """As ``eventually``, without blocking the event loop."""
    ends = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {timeout_seconds:.0f} s: {description}"
        await asyncio.sleep(_POLL_SECONDS)
