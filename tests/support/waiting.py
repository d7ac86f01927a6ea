"""Waiting for what announces itself nowhere, with a bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_POLL_SECONDS = 0.005  # long enough to leave the cores to the processes under test


def eventually(condition: Callable[[], object], what: str, timeout_seconds: float = 60.0) -> None:
    """Returns once ``condition`` holds. Raises AssertionError naming ``what`` after the timeout."""
    ends = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {timeout_seconds:.0f} s: {what}"
        time.sleep(_POLL_SECONDS)


async def eventually_async(condition: Callable[[], object], what: str, timeout_seconds: float = 60.0) -> None:
    """As ``eventually``, leaving the event loop to others meanwhile."""
    ends = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {timeout_seconds:.0f} s: {what}"
        await asyncio.sleep(_POLL_SECONDS)
