"""A child process as the supervisor sees it."""

from __future__ import annotations

import asyncio

from tests.support.processes import has_exited
from tests.support.waiting import eventually
from vitserve.service.ipc.control_messages import Progress, StartHttpWorker
from vitserve.service.settings import Settings
from vitserve.service.supervisor.child_process import ChildProcess


def test_a_child_whose_fork_keeps_the_channel_open_has_exited() -> None:
    async def watch() -> tuple[int, object, str]:
        start = StartHttpWorker("forking", 1, Settings(), worker=0, decode_threads=1)
        child = ChildProcess("tests.support.forking_child", start, [], {})
        async with asyncio.timeout(60):
            first, last = await child.receive(), await child.receive()
        assert first is not None
        assert isinstance(first[0], Progress)
        return int(first[0].step), last, await child.reap()

    fork, last, status = asyncio.run(watch())
    assert last is None
    assert status == "exit status 3"
    eventually(lambda: has_exited(fork), "the fork was killed")
