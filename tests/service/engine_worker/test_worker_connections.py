"""An engine worker's connections to the HTTP workers, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from vitserve.service.engine_worker.worker_connections import WorkerConnections
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.ipc.control_messages import Retire

SUBMISSION = wire_format.Submission(slot=3, action=wire_format.SUBMIT, priority=5, sequence=17, deadline=1.5)
COMPLETION = wire_format.Completion(3, wire_format.DONE, 17, 1.0, 0.5, 0.0)


@dataclass
class Ends:
    """The engine worker's connections, and the sockets of its peers."""

    connections: WorkerConnections
    supervisor: Channel
    disconnected: list[int]
    peers: list[socket.socket] = field(default_factory=list)

    def connect(self, worker: int, incarnation: int) -> socket.socket:
        peer, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connections.connect(worker, incarnation, ours.detach())
        self.peers.append(peer)
        return peer


@pytest.fixture
def ends() -> Iterator[Ends]:
    supervisor, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    disconnected: list[int] = []
    connections = WorkerConnections(Channel(channel), 9, disconnected.append)
    ends = Ends(connections, Channel(supervisor), disconnected)
    yield ends
    for peer in ends.peers:
        peer.close()
    for _ in ends.peers:
        connections.receive(0.0)
    connections.close()
    supervisor.close()
    channel.close()


def test_submissions_come_with_their_http_worker(ends: Ends) -> None:
    peer = ends.connect(4, incarnation=2)
    peer.send(next(iter(wire_format.pack_submissions(2, [SUBMISSION]))))
    assert ends.connections.receive(1.0) == ([(4, SUBMISSION)], False)


def test_a_message_of_another_incarnation_is_dropped(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    peer = ends.connect(4, incarnation=2)
    peer.send(next(iter(wire_format.pack_submissions(1, [SUBMISSION]))))
    assert ends.connections.receive(1.0) == ([], False)
    assert "dropping a message of incarnation 1 from HTTP worker 4" in caplog.text


def test_a_disconnected_http_worker_is_reported_once(ends: Ends) -> None:
    ends.connect(4, incarnation=2).close()
    ends.connect(5, incarnation=3)
    assert ends.connections.receive(1.0) == ([], False)
    assert (ends.disconnected, len(ends.connections)) == ([4], 1)


def test_a_restarted_http_worker_replaces_its_connection(ends: Ends) -> None:
    """The supervisor's message may arrive before the engine worker notices that the old process has exited."""
    old, new = ends.connect(4, incarnation=2), ends.connect(4, incarnation=3)
    assert (ends.disconnected, len(ends.connections)) == ([4], 1)
    ends.connections.send([(4, COMPLETION)])
    assert wire_format.unpack_completions(new.recv(wire_format.MAX_BYTES)) == (9, [COMPLETION])
    assert old.recv(wire_format.MAX_BYTES) == b""


def test_an_answer_for_an_absent_http_worker_is_dropped(ends: Ends) -> None:
    peer = ends.connect(4, incarnation=2)
    ends.connections.send([(7, COMPLETION), (4, COMPLETION)])
    assert wire_format.unpack_completions(peer.recv(wire_format.MAX_BYTES)) == (9, [COMPLETION])


def test_a_message_of_the_supervisor_is_reported(ends: Ends) -> None:
    ends.supervisor.send(Retire())
    assert ends.connections.receive(1.0) == ([], True)


def test_answers_that_do_not_fit_are_sent_later(ends: Ends) -> None:
    """A slow HTTP worker does not block the engine worker, and loses no message."""
    peer = ends.connect(4, incarnation=2)
    count = 20_000
    for _ in range(count):
        ends.connections.send([(4, COMPLETION)])
    peer.setblocking(False)
    received = 0
    while received < count:
        try:
            received += len(wire_format.unpack_completions(peer.recv(wire_format.MAX_BYTES))[1])
        except BlockingIOError:
            ends.connections.receive(1.0)
    assert received == count
