"""The common parts of HTTP workers and engine workers, the child processes of the supervisor."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from typing import NoReturn, TypeVar

from vitserve.service.ipc.control_channel import METRICS_DIR, Channel, LostDescriptorsError
from vitserve.service.ipc.control_messages import Heartbeat, Message, StartEngineWorker, StartHttpWorker
from vitserve.service.log_format import set_up_logging

log = logging.getLogger("vitserve.control")

BACKLOG = 2048  # connections that wait to be accepted; with fewer, clients would retry after a second
HEARTBEATS = 4  # sent per hang_seconds, so that one that is late does no harm

Start = TypeVar("Start", StartHttpWorker, StartEngineWorker)


def start_child(expected: type[Start]) -> tuple[Channel, Start, list[int]]:
    """Opens the channel named on the command line and waits for the start message.

    The second argument, if there is one, is the file descriptor of the log.

    Signals are ignored: a Ctrl-C in a terminal reaches every process, and the supervisor alone decides what to do.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    received = channel.receive()
    if received is None:
        sys.exit(1)
    start, descriptors = received
    assert isinstance(start, expected)
    log_descriptor = int(sys.argv[2]) if len(sys.argv) > 2 else None
    set_up_logging(start.process, start.settings.log_level, start.settings.log_format, log_descriptor)
    return channel, start, descriptors


def received_messages(channel: Channel) -> Iterator[tuple[Message, list[int]]]:
    """Yields the messages that have arrived, without waiting.

    Exits the process if the supervisor has exited. Also exits it if file descriptors of a message were lost: the
    supervisor sends them to the replacement, while this process could never be connected again.
    """
    while True:
        try:
            received = channel.receive()
        except BlockingIOError:
            return
        except LostDescriptorsError as error:
            log.critical("%s; exiting, to be replaced", error)
            os._exit(1)
        if received is None:
            exit_orphaned()
        yield received


def send_heartbeat(channel: Channel) -> None:
    """Exits the process if the supervisor has exited."""
    try:
        channel.send(Heartbeat())
    except BlockingIOError:
        pass  # a supervisor that does not read messages does not check heartbeats either
    except OSError:
        exit_orphaned()


def exit_orphaned() -> NoReturn:
    """Exits at once because the supervisor was killed. Removes the metrics directory, as the supervisor would."""
    shutil.rmtree(os.environ.get(METRICS_DIR, ""), ignore_errors=True)
    os._exit(1)
