"""The memory and the messages that processes share: layout, wire, link."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.paths import ROOT
from vitserve.bench.simulation import SECONDS
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.connection import Connection
from vitserve.service.ipc.memory_layout import FREE, RUNNING, WAITING, Shape, SlotTableError
from vitserve.service.ipc.shared_memory import SlotTable, sort_key
from vitserve.service.ipc.slots import Slots
from vitserve.service.scheduler import Rejection, Request, Scheduler

SHAPE = Shape(workers=2, share=4, engines=2, streams=2, max_batch=8, image_size=16, classes=7, width=5)


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = memory_layout.create(SHAPE, b"a description")
    yield descriptor
    os.close(descriptor)


def test_who_opens_the_ring_sees_its_shape_and_what_others_write(memory: int) -> None:
    one, other = SlotTable(memory), SlotTable(os.dup(memory))
    assert (other.shape, other.description) == (SHAPE, b"a description")
    one.pixels[7] = 200
    one.logits[7] = np.arange(7)
    assert (other.pixels[7] == 200).all()
    np.testing.assert_array_equal(other.logits[7], np.arange(7))
    assert not other.pixels[6].any()
    assert one.count(FREE) == 8


def test_no_two_arrays_overlap() -> None:
    ends = 0
    for region in memory_layout.regions(SHAPE).values():
        assert region.offset >= ends
        assert region.offset % mmap.PAGESIZE == 0
        ends = region.end


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="sealing is Linux's")
def test_nobody_can_take_the_memory_away(memory: int) -> None:
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size)


def test_what_is_not_a_ring_is_refused_with_both_numbers(memory: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("slot_table") / "file"
    path.write_bytes(b"x" * 100)
    with (
        path.open("r+b") as short,
        pytest.raises(SlotTableError, match="begins with b'xxxxxxxx'; a slot table begins with b'vitring1'"),
    ):
        SlotTable(short.fileno())
    size = os.fstat(memory).st_size
    path.write_bytes(os.pread(memory, size - 1, 0))
    with path.open("r+b") as cut, pytest.raises(SlotTableError, match=f"{size - 1} bytes; its header asks for {size}"):
        SlotTable(cut.fileno())


def test_a_dead_fronts_share_is_cleared_and_no_others(memory: int) -> None:
    slot_table = SlotTable(memory)
    for worker in range(2):
        slots = Slots(slot_table, worker, worker)
        for _ in range(4):
            ticket = slots.take(9.0, 5)
            assert ticket is not None
            slots.submit(ticket, 1)
    memory_layout.clear_worker_slots(memory, 1)
    assert slot_table.states.tolist() == [WAITING] * 4 + [FREE] * 4
    assert np.isfinite(slot_table.sort_keys).tolist() == [True] * 4 + [False] * 4


def test_an_outlook_counts_what_is_before_the_image_and_takes_the_soonest_engine(memory: int) -> None:
    slot_table = SlotTable(memory)
    for engine, free_at in ((0, 50.0), (1, 10.0)):
        scheduler = Scheduler({size: float(size) for size in range(1, 9)}, streams=2)
        scheduler.free_at = [free_at, free_at + 1]
        slot_table.publish(engine, scheduler)
    assert slot_table.estimate_completion(sort_key(5, 99.0), 0.0, {0: 0.0, 1: 0.0})[:2] == (1, 11.0)
    slots = Slots(slot_table, 0, 1)
    tickets = [slots.take(deadline, 5) for deadline in (20.0, 90.0, 40.0)]
    assert None not in tickets
    assert slot_table.estimate_completion(sort_key(5, 30.0), 0.0, {0: 0.0, 1: 0.0})[:2] == (1, 12.0), (
        "one before it, that nobody has yet"
    )
    for ticket in tickets:
        assert ticket is not None
        slots.submit(ticket, 1)
    assert slot_table.estimate_completion(sort_key(5, 30.0), 0.0, {0: 0.0, 1: 0.0})[:2] == (1, 12.0)
    assert slot_table.estimate_completion(sort_key(5, 95.0), 0.0, {0: 0.0, 1: 0.0})[:2] == (1, 13.0)
    assert slot_table.estimate_completion(sort_key(9, 95.0), 0.0, {0: 0.0, 1: 0.0})[:2] == (1, 11.0), (
        "more urgent than all of them"
    )
    assert slot_table.estimate_completion(sort_key(5, 95.0), 0.0, {0: 0.0})[:2] == (0, 51.0)
    assert slot_table.estimate_completion(sort_key(5, 95.0), 0.0, {0: 70.0})[:2] == (0, 71.0), (
        "an engine that is being restarted runs from then on"
    )


def test_an_outlook_is_what_the_scheduler_itself_decides(memory: int) -> None:
    """The HTTP workers' arithmetic and the engine's agree on whom to reject."""
    slot_table, scheduler = SlotTable(memory), Scheduler(SECONDS, streams=2, capacity=8)
    slots = Slots(slot_table, 0, 1)
    for number, deadline in enumerate((0.02, 0.0095, 0.02)):
        request = Request(4, deadline, number)
        slot_table.publish(0, scheduler)
        foreseen = slot_table.estimate_completion(sort_key(5, deadline), 0.0, {0: 0.0}).done_at
        assert (scheduler.admit(request, 0.0) is None) is (foreseen <= deadline)
        ticket = slots.take(deadline, 5)
        assert ticket is not None
        slots.submit(ticket, 0)


submissions = st.builds(
    wire_format.Submission,
    st.integers(0, 2**32 - 1),
    st.integers(0, 3),
    st.integers(0, 9),
    st.integers(0, 2**64 - 1),
    st.floats(allow_nan=False),
)
seconds = st.floats(allow_nan=False)
answers = st.builds(
    wire_format.Answer,
    st.integers(0, 2**32 - 1),
    st.integers(0, 5),
    st.integers(0, 2**64 - 1),
    seconds,
    seconds,
    seconds,
)


@given(st.integers(0, 2**32 - 1), submissions)
def test_a_submission_arrives_as_it_was_sent(incarnation: int, submission: wire_format.Submission) -> None:
    assert wire_format.unpack_submissions(wire_format.pack_submission(incarnation, submission)) == (
        incarnation,
        [submission],
    )


@given(st.integers(0, 2**32 - 1), st.lists(answers, max_size=5), st.integers(1, 2000))
def test_answers_arrive_as_they_were_sent_in_messages_that_fit(
    incarnation: int, some: list[wire_format.Answer], repeated: int
) -> None:
    sent = some * repeated
    messages = list(wire_format.pack_answers(incarnation, sent))
    assert all(len(message) <= wire_format.MAX_BYTES for message in messages)
    received = [wire_format.unpack_answers(message) for message in messages]
    assert all(each == incarnation for each, _ in received)
    assert [answer for _, part in received for answer in part] == sent


@given(submissions, st.integers(0, 100))
def test_a_message_of_another_length_is_refused(submission: wire_format.Submission, cut: int) -> None:
    message = wire_format.pack_submission(1, submission)
    for torn in (message[: min(cut, len(message) - 1)], message + b"x" * (cut + 1)):
        with pytest.raises(wire_format.WireFormatError, match=f"a message has {len(torn)} bytes"):
            wire_format.unpack_submissions(torn)


def test_who_reads_nothing_stops_nobody_and_misses_nothing() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stuck: list[Connection] = []
    with theirs:
        connection, peer = Connection(ours, 1, 1, stuck.append), Connection(theirs, 0, 1, stuck.append)
        sent = [number.to_bytes(4) for number in range(10_000)]
        for message in sent:
            connection.send(message)
        assert stuck == [connection], "said once, when the first message had to wait"
        received = []
        while not connection.flush():
            received += list(iter(peer.receive, None))
        received += list(iter(peer.receive, None))
        assert received == sent
        connection.close()
        with pytest.raises(EOFError):
            list(iter(peer.receive, None))
        peer.send(b"to nobody")


WRITER = """
import sys
from vitserve.service.ipc.shared_memory import Ring
slot table = Ring(int(sys.argv[1]))
print("writing", flush=True)
while True:
    for state in range(4):
        slot table.states[:] = bytes([state]) * len(slot table.states)
"""


def test_slots_can_be_counted_while_another_process_writes_them(memory: int) -> None:
    slot_table = SlotTable(memory)
    command = [sys.executable, "-c", WRITER, str(memory)]
    with subprocess.Popen(command, pass_fds=[memory], cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        try:
            for _ in range(20_000):
                assert 0 <= slot_table.count(RUNNING) <= len(slot_table.states)
        finally:
            writer.kill()


def test_retry_after_counts_a_restart_as_the_clock_does(memory: int) -> None:
    """Only the queue is passed at the pace of batches; the time until an engine is there again is not shortened by caution."""
    slot_table = SlotTable(memory)
    scheduler = Scheduler(dict.fromkeys(SECONDS, 0.1), streams=2, safety_margin=0.5)
    slot_table.publish(0, scheduler)
    rejection = Slots(slot_table, 0, 0).admit(1.0, 5, 0.0, {0: 8.0})
    assert isinstance(rejection, Rejection)
    assert rejection.retry_after_seconds == pytest.approx(7.1, abs=0.1)
