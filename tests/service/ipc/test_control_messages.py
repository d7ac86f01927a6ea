"""The control protocol: every message survives the channel, and anything else is a clear error."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vitserve.service.ipc.child_runtime import received_messages, send_heartbeat
from vitserve.service.ipc.control_channel import Channel, LostDescriptorsError
from vitserve.service.ipc.control_messages import (
    ConnectEngine,
    ControlMessageError,
    Drain,
    Heartbeat,
    Message,
    Reload,
    Reloaded,
    Retire,
    StartEngineWorker,
    StartHttpWorker,
    decode,
    encode,
)
from vitserve.service.settings import Settings

st.register_type_strategy(
    Settings, st.builds(Settings, port=st.integers(0, 65535), bundle=st.text(), drain_seconds=st.floats(0.1, 1e9))
)
MESSAGES = st.one_of([st.from_type(message) for message in get_args(Message)])


@given(MESSAGES, st.integers(0, 4))
def test_every_message_survives_encoding(message: Message, descriptors: int) -> None:
    assert decode(encode(message, descriptors)) == (message, descriptors)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "not a JSON message, of 0 bytes"),
        (b"\xff\xfe", "not a JSON message"),
        (b"[]", "unknown kind of control message: None"),
        (b"{}", "unknown kind of control message: None"),
        (b'{"kind": "Restart"}', "unknown kind of control message: 'Restart'"),
        (b'{"kind": ["Drain"]}', "unknown kind of control message"),
        (b'{"kind": "Reload", "id": 1}', "Reload lacks the field descriptors"),
        (b'{"kind": "Reload", "descriptors": 0, "id": 1, "path": "/"}', "Reload has no field path"),
        (b'{"kind": "Reload", "descriptors": 0}', "Reload lacks the field id"),
    ],
)
def test_other_data_is_a_clear_error(data: bytes, error: str) -> None:
    with pytest.raises(ControlMessageError) as raised:
        decode(data)
    assert error in str(raised.value)


def test_settings_are_checked_like_a_message() -> None:
    settings = dataclasses.asdict(Settings())
    start = {"kind": "StartHttpWorker", "descriptors": 1, "process": "p", "incarnation": 1, "worker": 0}
    start |= {"decode_threads": 1}
    sent = json.dumps(start | {"settings": settings}).encode()
    assert decode(sent) == (StartHttpWorker("p", 1, Settings(), 0, 1), 1)
    with pytest.raises(ControlMessageError, match="Settings has no field presicion"):
        decode(json.dumps(start | {"settings": settings | {"presicion": "int8"}}).encode())


def test_the_channel_carries_messages_and_descriptors() -> None:
    near, far = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    near.setblocking(False)
    start = StartEngineWorker("engine-worker-0-a", 3, Settings(), 0, 1, 2, 1, ["openvino in bf16"])
    with pytest.raises(BlockingIOError):
        near.receive()
    reader, writer = os.pipe()
    far.send(start, [reader])
    far.send(Reload(5))
    received = near.receive()
    assert received is not None
    message, (descriptor,) = received
    assert message == start
    os.write(writer, b"x")
    assert os.read(descriptor, 1) == b"x"
    assert near.receive() == (Reload(5), [])
    for open_descriptor in (reader, writer, descriptor):
        os.close(open_descriptor)
    far.close()
    assert near.receive() is None
    near.close()


def test_a_child_reads_all_messages_that_have_arrived() -> None:
    child, supervisor = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    child.setblocking(False)
    sent: list[Message] = [Drain(), Reloaded(1, "ok", ""), Retire()]
    for message in sent:
        supervisor.send(message)
    assert [message for message, _ in received_messages(child)] == sent
    assert list(received_messages(child)) == []
    send_heartbeat(child)
    assert supervisor.receive() == (Heartbeat(), [])
    child.close()
    supervisor.close()


@pytest.mark.parametrize("action", [send_heartbeat, lambda channel: next(received_messages(channel))])
def test_a_child_exits_when_the_supervisor_has_exited(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[Channel], object]
) -> None:
    def exit_process(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", exit_process)
    child, supervisor = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    supervisor.close()
    with pytest.raises(SystemExit):
        action(child)
    child.close()


@contextmanager
def free_descriptors(count: int) -> Iterator[None]:
    """Lets this process open only ``count`` further files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = [os.dup(0) for _ in range(count + 1)]  # they have the lowest free numbers
    for descriptor in probe:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("free", [0, 1])
def test_a_message_without_all_its_descriptors_is_not_lost_silently(free: int) -> None:
    near, far = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    connect = ConnectEngine(generation=1, engine=0, incarnation=2)
    far.send(connect, [0, 0])
    far.send(Drain())
    with free_descriptors(free):
        with pytest.raises(LostDescriptorsError, match=f"ConnectEngine arrived with {free} of 2 file descriptors"):
            near.receive()
        assert near.receive() == (Drain(), [])
        for descriptor in [os.dup(0) for _ in range(free)]:  # those that arrived were closed
            os.close(descriptor)
    near.close()
    far.close()


def test_a_child_that_lost_descriptors_exits_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def exit_process(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", exit_process)
    child, supervisor = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    supervisor.send(ConnectEngine(generation=1, engine=0, incarnation=2), [0, 0])
    with free_descriptors(0), pytest.raises(SystemExit):
        next(received_messages(child))
    assert "ConnectEngine arrived with 0 of 2 file descriptors" in caplog.text
    child.close()
    supervisor.close()
