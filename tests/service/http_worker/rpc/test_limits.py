"""Hostile and slow clients of gRPC: each bound in SECURITY.md's table."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from tests.support.effort import effort_of
from tests.support.rpc import INFER, MAX_BODY_BYTES, NAME, RpcService, method, rejection
from vitserve.service import errors
from vitserve.service.http_worker.rpc.infer import DEADLINE_HEADER
from vitserve.service.http_worker.rpc.infer import INFER as OPERATION
from vitserve.service.http_worker.rpc.reading import MessageReader
from vitserve.service.http_worker.rpc.wire import MOST_BYTES, check_size
from vitserve.service.settings import Settings

LIVE = "/inference.GRPCInferenceService/ServerLive"


def request(**fields: object) -> bytes:
    message: bytes = service_pb2.ModelInferRequest(model_name=NAME, **fields).SerializeToString()
    return message


def tensor(**contents: object) -> dict[str, object]:
    return {"name": "image", "datatype": "BYTES", "shape": [1], "contents": contents}


@pytest.mark.parametrize("path", [INFER, LIVE])
def test_a_message_above_the_limit_is_rejected(channel: grpc.Channel, path: str) -> None:
    assert rejection(channel, path, bytes(MAX_BODY_BYTES + 1)).code == "RESOURCE_EXHAUSTED"


def test_a_compressed_message_is_limited_by_its_size_without_compression(rpc: RpcService) -> None:
    with grpc.insecure_channel(rpc.address, compression=grpc.Compression.Gzip) as channel:
        assert rejection(channel, INFER, bytes(MAX_BODY_BYTES + 1)).code == "RESOURCE_EXHAUSTED"


def test_large_metadata_is_rejected(channel: grpc.Channel) -> None:
    failure = rejection(channel, LIVE, b"", metadata=[("x", "y" * 200_000)])
    assert failure.code == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize(
    "message",
    [
        request(inputs=[tensor(uint_contents=[200] * 700_000)]),
        request(inputs=[tensor(fp32_contents=[0.5] * 400_000)]),
        request(inputs=[tensor(bytes_contents=[b""] * 100_000)]),
        request(inputs=[{"name": "x" * 10}] * 80_000),
        request(raw_input_contents=[b""] * 100_000),
        request(parameters={str(number): {"bool_param": True} for number in range(60_000)}),
        b"\xf8\x06\x01" * 500_000,  # an unknown field
    ],
)
def test_messages_that_take_long_to_parse_are_rejected_before(channel: grpc.Channel, message: bytes) -> None:
    def check() -> None:
        with pytest.raises(errors.BadRequestError):
            check_size(message)

    effort = effort_of(check)
    assert effort.lines < 500_000
    assert effort.peak_bytes < 100_000
    failure = rejection(channel, INFER, message)
    assert failure.code == "INVALID_ARGUMENT"
    assert f"more than {MOST_BYTES:,} bytes beside its images; send tensors in raw_input_contents" in failure.details


def test_images_of_any_size_are_parsed() -> None:
    for message in (
        request(inputs=[tensor(bytes_contents=[bytes(5_000_000)] * 2)]),
        request(inputs=[tensor()], raw_input_contents=[bytes(10_000_000)]),
    ):
        effort = effort_of(partial(check_size, message))
        assert effort.lines < 1000
        assert effort.peak_bytes < 10_000


@pytest.mark.parametrize(
    "message", [b"\x3a", b"\x3a\x05abcd", b"\x2a\x80", b"\xff" * 20, b"\x0b\x0c", b"\x2a\x02\x2a\x05"]
)
def test_truncated_and_malformed_messages(message: bytes) -> None:
    with pytest.raises(errors.BadRequestError, match="not a ModelInferRequest"):
        check_size(message)


class Context:
    """An RPC whose message arrives when the test says so."""

    def __init__(self) -> None:
        self.message: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def read(self) -> bytes:
        return await self.message


async def read_slowly(reader: MessageReader, count: int) -> list[asyncio.Task[bytes]]:
    """Messages of which none arrives. Returns once all of them are counted as slow, or rejected."""
    contexts = [Context() for _ in range(count)]
    tasks = [asyncio.ensure_future(reader.read(context)) for context in contexts]
    while len(reader._slow) + sum(task.done() for task in tasks) < count:
        await asyncio.sleep(0)
    return tasks


def test_slow_messages_are_bounded_and_do_not_hold_up_others() -> None:
    async def check() -> None:
        reader = MessageReader(memory_bytes=30, message_bytes=10, longest_seconds=60)
        slow = await read_slowly(reader, 4)
        done, pending = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        assert len(pending) == 3  # the fourth is rejected
        with pytest.raises(errors.RequestTimeoutError):
            done.pop().result()
        at_once = Context()
        at_once.message.set_result(b"a")
        assert await reader.read(at_once) == b"a"
        for entry in reader._slow:
            reader._slow[entry] -= 1  # it is slow for another second
        newcomer = await read_slowly(reader, 1)
        await asyncio.wait([*pending], return_when=asyncio.FIRST_COMPLETED)
        assert slow[0].done()  # the oldest has given its place
        assert not newcomer[0].done()
        for task in [*pending, *newcomer]:
            task.cancel()
        await asyncio.gather(*pending, *newcomer, return_exceptions=True)
        assert not reader._slow

    asyncio.run(check())


def test_a_message_that_does_not_arrive_ends_the_request() -> None:
    async def check() -> None:
        reader = MessageReader(memory_bytes=30, message_bytes=10, longest_seconds=0.001)
        with pytest.raises(errors.RequestTimeoutError):
            await reader.read(Context())

    asyncio.run(check())


def test_connections_without_requests_do_not_hold_up_others(rpc: RpcService, channel: grpc.Channel) -> None:
    host, _, port = rpc.address.partition(":")
    with ExitStack() as stack:
        for _ in range(50):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert method(channel, LIVE)(b"", timeout=60) == b"\x08\x01"


def test_every_http_worker_answers(rpc: RpcService) -> None:
    """Request ids begin with the process. The kernel spreads the connections."""
    processes = set()
    for number in range(40):
        options = [("grpc.use_local_subchannel_pool", 1), ("number", number)]  # a connection of its own
        with grpc.insecure_channel(rpc.address, options=options) as channel:
            live: Any = channel.unary_unary(LIVE)
            _, call = live.with_call(b"", timeout=60)
            processes.add(dict(call.trailing_metadata())["x-request-id"].partition("-")[0])
    assert len(processes) == 2


@pytest.mark.parametrize(
    ("headers", "timeout_us", "milliseconds"),
    [
        ([], None, 10_000),
        ([(DEADLINE_HEADER, b"250")], None, 250),
        ([(DEADLINE_HEADER, b"60000")], None, 60_000),
        ([(DEADLINE_HEADER, b"0")], None, 1),
        ([], 70_000_000, 70_000),
        ([(DEADLINE_HEADER, b"250")], 100_000, 100),
        ([(DEADLINE_HEADER, b"250")], 300_000, 250),
    ],
)
def test_the_smaller_of_deadline_and_timeout_applies(
    headers: list[tuple[bytes, bytes]], timeout_us: int | None, milliseconds: int, model: object
) -> None:
    parameters = {} if timeout_us is None else {"timeout": {"int64_param": timeout_us}}
    head = OPERATION.parse_head(b"", headers, Settings())
    assert timeout_us is not None or head.timeout_ms == milliseconds
    body, encoder = request(inputs=[tensor(bytes_contents=[b"image"])], parameters=parameters), SimpleNamespace()
    encoder.model_info = model
    assert OPERATION.parse_body(head, [body], Settings(), encoder).timeout_ms == milliseconds  # type: ignore[arg-type]
