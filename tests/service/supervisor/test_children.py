"""Restarts: how long the supervisor waits, and when it gives up."""

from __future__ import annotations

import asyncio

import pytest

from vitserve.service.supervisor.children import ATTEMPTS, Children, SupervisorGaveUpError


def test_too_many_failed_starts_of_a_needed_child_end_the_service() -> None:
    async def back_off() -> None:
        stopping = asyncio.Event()
        stopping.set()  # no pause
        children = Children(hang_seconds=1.0, stopping=stopping)
        for attempt in range(ATTEMPTS):
            await children.back_off(attempt, "it exited")
        await children.back_off(ATTEMPTS, "it exited", needed=False)
        await children.back_off(ATTEMPTS, "it exited")

    with pytest.raises(SupervisorGaveUpError, match=r"it exited \(attempt 5 of 5\)"):
        asyncio.run(back_off())


def test_no_two_children_have_the_same_incarnation() -> None:
    children = Children(hang_seconds=1.0, stopping=asyncio.Event())
    incarnations = [children.next_incarnation() for _ in range(10)]
    assert len(set(incarnations)) == len(incarnations)
