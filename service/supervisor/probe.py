"""Answers liveness probes on a port of its own, in the supervisor, which no request and no number of clients delays.

The supervisor itself monitors the other processes and replaces those that hang. So the service is live while the
supervisor runs, and a probe that fails means that nothing else would help.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

log = logging.getLogger("vitserve.supervisor")

_MAX_CONNECTIONS = 16
_MAX_HEAD_BYTES = 8_192
_SECONDS = 2.0  # for a client to send its request, and to read the response
_LIVE = b'{"status":"live"}'
# With status and body.
_RESPONSE = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"


class Probe:
    """Accepts GET /livez only, one request per connection."""

    def __init__(self) -> None:
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}  # the oldest first

    async def run(self, listener: socket.socket) -> None:
        """Until it is cancelled."""
        server = await asyncio.start_server(self._accept, sock=listener, limit=_MAX_HEAD_BYTES)
        async with server:
            await server.serve_forever()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= _MAX_CONNECTIONS:  # the oldest has waited longest
            oldest = next(iter(self._clients))
            self._clients.pop(oldest).transport.abort()
        task = asyncio.get_running_loop().create_task(_respond(reader, writer))
        self._clients[task] = writer
        task.add_done_callback(lambda done: self._clients.pop(done, None))


async def _respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        async with asyncio.timeout(_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            live = head.startswith((b"GET /livez ", b"HEAD /livez "))
            status, body = (b"200 OK", _LIVE) if live else (b"404 Not Found", b"{}")
            writer.write(_RESPONSE % (status, len(body), b"" if head.startswith(b"HEAD ") else body))
            await writer.drain()
    writer.close()
