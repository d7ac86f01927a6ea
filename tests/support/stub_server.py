"""HTTP servers without a model, for tests of the load generator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress

RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class StubServer:
    """Sends the same response to every request, while ``open`` is set. Calls ``at[n]`` when it receives request n."""

    def __init__(self, response: bytes = RESPONSE, at: Mapping[int, Callable[[], None]] | None = None) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.response = response
        self.at = at or {}
        self.requests = 0
        self.connections: set[asyncio.Task[None]] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
                self.requests += 1
                self.at.get(self.requests, lambda: None)()
                await self.open.wait()
                writer.write(self.response)
                if b"Connection: close" in self.response:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def listening(server: StubServer) -> AsyncIterator[int]:
    """Yields the port. Waits for the connections to close at the end."""
    started = await asyncio.start_server(server, "127.0.0.1", 0)
    try:
        async with started:
            yield started.sockets[0].getsockname()[1]
    finally:
        server.open.set()
        await asyncio.gather(*server.connections)
