"""The limits of the connections of an HTTP worker: bytes, header fields, time, and file descriptors."""

from __future__ import annotations

import resource

from vitserve.service.settings import Settings

RESERVED_DESCRIPTORS = 64  # for the service itself: listening sockets, slot tables, engine connections, metrics files
# Connections beyond the limit while all others wait for a response. They may do everything but classify, so that
# liveness probes are answered.
EXTRA_CONNECTIONS = 16
# Of all headers that have arrived in part. Those that arrive with one read, as nearly all do, do not count.
MAX_UNFINISHED_HEAD_BYTES = 33_554_432
LINGER_SECONDS = 1.0  # for a client to read a response and to close its connection
_SHORTEST_INTERVAL_SECONDS, _LONGEST_INTERVAL_SECONDS = 0.05, 1.0


class ConnectionLimits:
    """The limits, and the clock that measures times against them.

    The clock advances at each tick(), about once a second. When something happens to a connection, it notes the time of
    the next tick, which costs nothing: with the time of the last one, a client that was quick would seem up to a second
    slower. The clock stands still while the worker does not run, so that the
    time in which the machine was suspended or overloaded does not count against clients.
    """

    def __init__(self, settings: Settings, open_files: int) -> None:
        """``open_files``: the limit of open files of this process."""
        self.clock = 0.0  # seconds, at the last tick
        self.draining = False
        self.open_files = open_files
        self.unfinished_head_bytes = 0
        self.header_bytes, self.headers = settings.max_header_bytes, settings.max_headers
        room = open_files - RESERVED_DESCRIPTORS - EXTRA_CONNECTIONS
        if settings.grpc_port:
            room //= 2  # gRPC may have as many connections
        if settings.tls_certificate:
            room = room * 4 // 5  # a fifth for handshakes, see tls.py
        self.connections = max(1, min(settings.max_connections, room))
        self.first_request_seconds = settings.first_request_seconds
        self.header_seconds = settings.header_seconds
        self.body_gap_seconds, self.body_seconds = settings.body_gap_seconds, settings.body_seconds
        self.keep_alive_seconds = settings.keep_alive_seconds
        self.linger_seconds = LINGER_SECONDS
        self.unsent_seconds = settings.body_gap_seconds  # how long a client may pause while it reads a response
        shortest = min(
            self.first_request_seconds,
            self.header_seconds,
            self.body_gap_seconds,
            self.body_seconds,
            self.keep_alive_seconds,
        )
        # Between ticks
        self.interval = min(_LONGEST_INTERVAL_SECONDS, max(_SHORTEST_INTERVAL_SECONDS, shortest / 2))
        self.next_tick = self.interval

    def tick(self, elapsed: float) -> None:
        """``elapsed``: seconds since the last tick."""
        self.clock += min(elapsed, 2 * self.interval)
        self.next_tick = self.clock + self.interval

    def drain(self) -> None:
        """From now on, connections are closed unless their request is complete, or may be on its way.

        Ticks are frequent from now on. The time until the next one has passed before this is called.
        """
        self.clock, self.interval = self.next_tick, _SHORTEST_INTERVAL_SECONDS
        self.next_tick = self.clock + self.interval
        self.draining = True
        self.first_request_seconds = self.unsent_seconds = LINGER_SECONDS
        self.linger_seconds = LINGER_SECONDS / 2
        self.header_seconds = self.body_gap_seconds = self.body_seconds = self.keep_alive_seconds = 0.0


def open_files_limit() -> int:
    """The limit of open files of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
