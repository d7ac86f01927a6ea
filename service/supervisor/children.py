"""All child processes: start them, monitor their heartbeats, wait before a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

from vitserve.service.ipc.control_messages import Message, StartMessage
from vitserve.service.supervisor.child_process import ChildProcess

log = logging.getLogger("vitserve.supervisor")

START_SECONDS = 600.0  # for a child to import its modules, and to load and verify the bundle
ATTEMPTS = 5  # consecutive failed starts after which the supervisor gives up
FIRST_PAUSE_SECONDS = 0.25  # before the second attempt; doubled for each further one
LONGEST_PAUSE_SECONDS = 30.0

Handler = Callable[[ChildProcess, Message], None]


class SupervisorGaveUpError(RuntimeError):
    """A process that is needed fails to start again and again."""


class Children:
    def __init__(self, hang_seconds: float, stopping: asyncio.Event) -> None:
        self.stopping = stopping  # set when the service drains; ends every pause before a restart
        self._hang_seconds = hang_seconds
        self._running: set[ChildProcess] = set()
        self._incarnations = 0

    def next_incarnation(self) -> int:
        self._incarnations += 1
        return self._incarnations

    def start(
        self,
        module: str,
        start: StartMessage,
        descriptors: Sequence[int],
        environment: Mapping[str, str] | None = None,
    ) -> ChildProcess:
        child = ChildProcess(module, start, descriptors, environment or {})
        self._running.add(child)
        return child

    async def monitor(self, child: ChildProcess, handle: Handler) -> bool:
        """Passes the child's messages to ``handle`` until it exits, and kills it if it sends none for too long.

        Returns whether the child has ever sent a message. hang_seconds are measured in two halves: after the whole
        machine was suspended, the first half is over at once, and the child has the second one to send a heartbeat.
        """
        started, silent_halves = False, 0
        while True:
            try:
                async with asyncio.timeout(self._hang_seconds / 2 if started else START_SECONDS):
                    received = await child.receive()
            except TimeoutError:
                silent_halves += 1
                if silent_halves > 1 or not started:
                    silence = self._hang_seconds if started else START_SECONDS
                    log.error("%s has sent no heartbeat for %.1f s; killing it", child.name, silence)
                    child.hung = True
                    child.kill()
                continue
            if received is None:
                return started
            started, silent_halves = True, 0
            handle(child, received[0])

    async def reap(self, child: ChildProcess) -> str:
        """Returns the exit status in words."""
        status = await child.reap()
        self._running.discard(child)
        return status

    async def back_off(self, attempts: int, reason: str, needed: bool = True) -> None:
        """Waits after ``attempts`` failed starts, longer after each.

        Raises SupervisorGaveUpError after too many, unless the service runs without this child (``needed`` is False).
        """
        if attempts >= ATTEMPTS and needed:
            raise SupervisorGaveUpError(f"{reason} (attempt {attempts} of {ATTEMPTS})")
        if attempts:
            log.error("%s; retrying", reason)
            pause_seconds = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempts - 1))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), pause_seconds)

    def kill_all(self) -> None:
        for child in self._running:
            child.kill()

    async def reap_all(self) -> None:
        for child in list(self._running):
            child.kill()
            await child.reap()
