"""A child process as the supervisor sees it: its channel and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from vitserve.service.ipc.control_channel import Channel, Message
from vitserve.service.python_process import python_command, python_environment

log = logging.getLogger("vitserve.supervisor")


class Child:
    """Runs ``module`` in a process group of its own; ``opening`` is its first message.

    A child has ended when its channel has, or else (Linux) its process: a foreign library may fork, and the fork holds the channel open while it lives.
    """

    def __init__(
        self,
        module: str,
        name: str,
        incarnation: int,
        opening: Message,
        descriptors: Sequence[int],
        environment: Mapping[str, str],
    ) -> None:
        self.name, self.incarnation, self.hung = name, incarnation, False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                python_command(module, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                env=python_environment() | dict(environment),
                process_group=0,
            )
        ours.setblocking(False)
        self._channel = Channel(ours)
        self._readable, self._gone = asyncio.Event(), False
        asyncio.get_running_loop().add_reader(ours.fileno(), self._readable.set)
        self._end = (
            os.pidfd_open(self._process.pid) if sys.platform == "linux" else None
        )  # readable when the process is
        if self._end is not None:
            asyncio.get_running_loop().add_reader(self._end, self._has_gone)
        self.send(opening, descriptors)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        try:
            self._channel.send(message, descriptors)
        except BlockingIOError:
            log.error("%s does not read what it is told; it is killed", self.name)
            self.kill()
        except OSError:
            pass  # it has died; whoever listens to it learns of it

    async def receive(self) -> tuple[Message, list[int]] | None:
        """None at its end."""
        while True:
            try:
                return self._channel.receive()
            except BlockingIOError:
                if self._gone:  # and all that it said has been read
                    return None
                self._readable.clear()
                await self._readable.wait()

    def _has_gone(self) -> None:
        self._gone = True
        self._readable.set()
        self._forget_end()

    def _forget_end(self) -> None:
        if self._end is not None:
            asyncio.get_running_loop().remove_reader(self._end)
            os.close(self._end)
            self._end = None

    def kill(self) -> None:
        """Even one that is stopped, and what it forked. Nothing to do once it has been reaped, and its number may be another's."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def ended(self) -> str:
        """Reaps it. Returns what ended it, in words."""
        self._forget_end()
        if self._channel.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
        self.kill()  # should it live on without its channel
        code = await asyncio.to_thread(self._process.wait)
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
