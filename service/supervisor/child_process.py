"""One child process as the supervisor sees it: its control channel and its exit."""

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

from vitserve.service.ipc.control_channel import Channel, LostDescriptorsError
from vitserve.service.ipc.control_messages import Message, StartMessage
from vitserve.service.python_process import python_command, python_environment
from vitserve.service.supervisor.child_stderr import stderr_of

log = logging.getLogger("vitserve.supervisor")

EXIT_SECONDS = 5.0  # for a child to exit after it has closed its channel


class ChildProcess:
    """Runs ``module`` in a process group of its own and sends it ``start`` as the first message.

    The child has exited when its channel is closed or, on Linux, when its process has exited. The channel alone is not
    enough: a library in the child may fork, and the fork keeps the channel open.
    """

    def __init__(
        self, module: str, start: StartMessage, descriptors: Sequence[int], environment: Mapping[str, str]
    ) -> None:
        self.name, self.incarnation = start.process, start.incarnation
        self.hung = False  # whether it was killed because it sent no heartbeat
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stderr = stderr_of(self.name, start.settings.log_format)
        inherited = [theirs.fileno(), *self._stderr.log_descriptors]
        with theirs:
            self._process = subprocess.Popen(
                python_command(module, *map(str, inherited)),
                pass_fds=inherited,
                env=python_environment() | dict(environment),
                process_group=0,
                stderr=self._stderr.descriptor,
            )
        self._stderr.start()
        ours.setblocking(False)
        self._channel = Channel(ours)
        self._readable, self._exited = asyncio.Event(), False
        asyncio.get_running_loop().add_reader(ours.fileno(), self._readable.set)
        # A pidfd becomes readable when the process exits.
        self._pidfd = os.pidfd_open(self._process.pid) if sys.platform == "linux" else None
        if self._pidfd is not None:
            asyncio.get_running_loop().add_reader(self._pidfd, self._handle_exit)
        self.send(start, descriptors)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        try:
            self._channel.send(message, descriptors)
        except BlockingIOError:
            log.error("%s does not read its control messages; killing it", self.name)
            self.kill()
        except OSError:
            pass  # it has exited, which receive() reports

    async def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors. None once the child has exited and all its messages have been read."""
        while True:
            try:
                return self._channel.receive()
            except LostDescriptorsError as error:
                log.error("%s: %s; killing it", self.name, error)
                self.kill()
            except BlockingIOError:
                if self._exited:
                    return None
                self._readable.clear()
                await self._readable.wait()

    def kill(self) -> None:
        """Kills the child, even a stopped one, and every process that it forked. Does nothing after reap()."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def reap(self) -> str:
        """Kills the rest of the child's process group. Returns the exit status in words, for log lines.

        A child that has closed its channel gets a moment to exit by itself: SIGKILL would hide its own exit status.
        """
        if self._channel.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
        if self._pidfd is not None:
            self._readable.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_SECONDS):
                    await self._readable.wait()
            self._close_pidfd()
        self.kill()
        code = await asyncio.to_thread(self._process.wait)
        self._stderr.close()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def _handle_exit(self) -> None:
        self._exited = True
        self._readable.set()
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
