"""The channel between the supervisor and one of its children, and what every child does first.

Messages are JSON objects with a "kind", rare and small; descriptors of sockets and memory travel with them. Slots travel on links (link.py).

to a HTTP worker    open{settings, HTTP worker, epoch, decode_threads}+[listening socket] · connect{generation, engine, epoch}+[slot table, link] · status{…} ·
              reloaded{id, …} · drain
from a HTTP worker  alive · reload{id}
to an engine  open{settings, engine, HTTP workers, skipped, epoch}+[slot table, if there is one] · connect{HTTP worker, epoch}+[link] · retire
from it       opened{name, version}+[slot table, if it made one] · rejected{result, reason} · progress{step, trying} · alive · built
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

MAX_BYTES = 1 << 17
BEATS = 4  # "alive" messages in the time after which a silent child is taken for dead
METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's name

Message = dict[str, Any]


class Channel:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        return self._connection.fileno()

    def setblocking(self, blocking: bool) -> None:
        self._connection.setblocking(blocking)

    def send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Raises BlockingIOError where the other side has long not read, OSError where it has gone."""
        socket.send_fds(self._connection, [json.dumps(message).encode()], descriptors)

    def receive(self) -> tuple[Message, list[int]] | None:
        """None when the other side has gone. Raises BlockingIOError where nothing is there."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._connection, MAX_BYTES, 4)
        except ConnectionResetError:
            return None
        return (json.loads(data), list(descriptors)) if data else None

    def close(self) -> None:
        self._connection.close()


def start_child() -> tuple[Channel, Message, list[int]]:
    """The channel named on the command line, and the first message: what to open. Signals are the supervisor's to answer, not a child's."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    first = channel.receive()
    if first is None:
        sys.exit(1)
    message, descriptors = first
    set_up_logging(message["process"], message["settings"]["log_level"])
    return channel, message, descriptors


def set_up_logging(process: str, level: str) -> None:
    logging.basicConfig(level=level.upper(), format=f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")


def orphaned() -> None:
    """The supervisor was killed: ends this process at once. Nobody is left to remove the metrics' directory, so every child tries."""
    shutil.rmtree(os.environ.get(METRICS_DIR, ""), ignore_errors=True)
    os._exit(1)
