"""A child process as the supervisor sees it."""

from __future__ import annotations

import asyncio

from tests.support.processes import has_exited
from tests.support.waiting import eventually
from vitserve.service.ipc.control_messages import Message, Progress, StartHttpWorker
from vitserve.service.settings import Settings
from vitserve.service.supervisor.child_process import ChildProcess


async def finished(module: str) -> tuple[list[Message], str]:
    """The messages of a child, and its exit status once its channel is closed or its process has exited."""
    start = StartHttpWorker("child", 1, Settings(), worker=0, decode_threads=1)
    child, messages = ChildProcess(module, start, [], {}), []
    async with asyncio.timeout(60):
        while (received := await child.receive()) is not None:
            messages.append(received[0])
    return messages, await child.reap()


def test_the_exit_status_is_that_of_the_child_although_its_channel_closes_first() -> None:
    assert asyncio.run(finished("tests.support.closing_child")) == ([], "exit status 3")


def test_a_child_whose_fork_keeps_the_channel_open_has_exited() -> None:
    (first,), status = asyncio.run(finished("tests.support.forking_child"))
    assert isinstance(first, Progress)
    assert status == "exit status 3"
    eventually(lambda: has_exited(int(first.step)), "the fork was killed")
