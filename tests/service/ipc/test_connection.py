"""The socket between an HTTP worker and an engine worker."""

from __future__ import annotations

import socket

import pytest

from vitserve.service.ipc.connection import Connection


def test_a_slow_reader_neither_blocks_the_sender_nor_loses_messages() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    blocked: list[Connection] = []
    with theirs:
        connection, peer = Connection(ours, 1, 1, blocked.append), Connection(theirs, 0, 1, blocked.append)
        sent = [number.to_bytes(4) for number in range(10_000)]
        for message in sent:
            connection.send(message)
        assert blocked == [connection], "the callback runs once, for the first queued message"
        received: list[bytes] = []
        while not connection.flush():
            received += iter(peer.receive, None)
        received += iter(peer.receive, None)
        assert received == sent
        connection.close()
        with pytest.raises(EOFError):
            list(iter(peer.receive, None))
        peer.send(b"dropped, because the other end is closed")
