"""Stale messages and lost HTTP workers. test_slots.py runs slots, pending requests and schedulers together."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vitserve.service.engine_worker.pending import PendingRequests
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.memory_layout import Shape
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.ipc.slots import Slots, Ticket
from vitserve.service.scheduler import Scheduler


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = memory_layout.create(Shape(1, 2, 1, 1, 1, 1, 1), b"")
    yield descriptor
    os.close(descriptor)


def submitted(slots: Slots) -> tuple[Ticket, wire_format.Submission]:
    ticket = slots.take(9.0, 5)
    slots.submit(ticket, 0)
    return ticket, wire_format.Submission(ticket.slot, wire_format.SUBMIT, 5, ticket.sequence, 9.0)


def test_a_submission_for_another_image_is_dropped(memory: int) -> None:
    slot_table = SlotTable(memory)
    pending = PendingRequests(slot_table, 0, Scheduler({1: 0.1}))
    ticket, submission = submitted(Slots(slot_table, 0, 1))
    stale = submission._replace(sequence=ticket.sequence + 1)
    outside = submission._replace(slot=2)
    assert pending.submit([(0, stale), (0, outside)], 0.0) == []
    assert (pending.stale, len(pending)) == (2, 0)


def test_a_batch_of_a_lost_worker_does_not_write_into_reused_slots(memory: int) -> None:
    slot_table = SlotTable(memory)
    pending = PendingRequests(slot_table, 0, Scheduler({1: 0.1}))
    ticket, submission = submitted(Slots(slot_table, 0, 1))
    pending.submit([(0, submission)], 0.0)
    work = pending.next_batch(0, 0.0)
    assert work is not None
    batch, slots = work
    assert slots == [ticket.slot]
    assert [image.slot for _, image in pending.wanted(batch)] == [ticket.slot]
    memory_layout.clear_worker_slots(memory, 0)
    reused, _ = submitted(Slots(slot_table, 0, 2))
    assert reused.slot == ticket.slot
    assert pending.wanted(batch) == []
    assert len(pending.complete(batch, 0.1, failed=False)) == 1, "the completion is sent, although it is stale"
