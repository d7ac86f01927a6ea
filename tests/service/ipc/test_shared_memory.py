"""The slot table: its layout, its protection, and the completion estimates."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.paths import ROOT
from vitserve.bench.simulation import SECONDS
from vitserve.service.ipc import memory_layout
from vitserve.service.ipc.memory_layout import FREE, RUNNING, WAITING, Shape, SlotTableError
from vitserve.service.ipc.shared_memory import SlotTable, sort_key
from vitserve.service.ipc.slots import Slots, Ticket
from vitserve.service.scheduler import Rejection, Request, Scheduler

SHAPE = Shape(workers=2, slots_per_worker=4, engines=2, streams=2, max_batch=8, image_size=16, classes=7)


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = memory_layout.create(SHAPE, b"a description")
    yield descriptor
    os.close(descriptor)


def submit(slots: Slots, deadline: float, engine: int) -> Ticket:
    ticket = slots.take(deadline, 5)
    slots.submit(ticket, engine)
    return ticket


def test_processes_share_shape_description_and_arrays(memory: int) -> None:
    writer, reader = SlotTable(memory), SlotTable(os.dup(memory))
    assert (reader.shape, reader.description) == (SHAPE, b"a description")
    writer.pixels[7] = 200
    writer.logits[7] = np.arange(7)
    assert (reader.pixels[7] == 200).all()
    np.testing.assert_array_equal(reader.logits[7], np.arange(7))
    assert not reader.pixels[6].any()
    assert writer.count(FREE) == 8


def test_arrays_start_on_a_page_and_do_not_overlap() -> None:
    end = 0
    for region in memory_layout.regions(SHAPE).values():
        assert region.offset >= end
        assert region.offset % mmap.PAGESIZE == 0
        end = region.end


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="sealing requires Linux")
def test_the_memory_cannot_be_resized(memory: int) -> None:
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size)


def test_other_files_are_rejected_as_slot_tables(memory: int, tmp_path: Path) -> None:
    path, size = tmp_path / "file", os.fstat(memory).st_size
    expectations = {
        b"x" * 8: "has 8 bytes; a slot table's header has",
        b"x" * 100: "begins with b'xxxxxxxx'; a slot table begins with b'vitslots'",
        os.pread(memory, size - 1, 0): f"{size - 1} bytes; its header requires {size}",
    }
    for content, message in expectations.items():
        path.write_bytes(content)
        with path.open("r+b") as file, pytest.raises(SlotTableError, match=message):
            SlotTable(file.fileno())


def test_clearing_a_workers_slots_leaves_the_others(memory: int) -> None:
    slot_table = SlotTable(memory)
    for worker in range(2):
        slots = Slots(slot_table, worker, worker)
        for _ in range(4):
            submit(slots, 9.0, engine=1)
    memory_layout.clear_worker_slots(memory, 1)
    assert slot_table.states.tolist() == [WAITING] * 4 + [FREE] * 4
    assert np.isfinite(slot_table.sort_keys).tolist() == [True] * 4 + [False] * 4


# -- completion estimates


def estimate(slot_table: SlotTable, priority: int, deadline: float, engines: dict[int, float]) -> tuple[int, float]:
    completion = slot_table.estimate_completion(sort_key(priority, deadline), 0.0, engines)
    return completion.engine, completion.done_at


@pytest.fixture
def two_engines(memory: int) -> SlotTable:
    """Two engine workers of two streams: one is busy until 50 and 51, the other until 10 and 11. A batch takes 1 s."""
    slot_table = SlotTable(memory)
    for engine, free_at in ((0, 50.0), (1, 10.0)):
        scheduler = Scheduler({size: float(size) for size in range(1, 9)}, streams=2)
        scheduler.free_at = [free_at, free_at + 1]
        slot_table.publish(engine, scheduler)
    return slot_table


def test_the_estimate_counts_images_that_run_before(two_engines: SlotTable) -> None:
    both, slots = {0: 0.0, 1: 0.0}, Slots(two_engines, 0, 1)
    assert estimate(two_engines, 5, 99.0, both) == (1, 11.0)
    tickets = [slots.take(deadline, 5) for deadline in (20.0, 90.0, 40.0)]
    assert estimate(two_engines, 5, 30.0, both) == (1, 12.0), "an earlier deadline, not assigned yet"
    for ticket in tickets:
        slots.submit(ticket, 1)
    assert estimate(two_engines, 5, 30.0, both) == (1, 12.0)
    assert estimate(two_engines, 5, 95.0, both) == (1, 13.0)
    assert estimate(two_engines, 9, 95.0, both) == (1, 11.0), "more urgent than all others"


def test_the_estimate_considers_only_available_engines(two_engines: SlotTable) -> None:
    assert estimate(two_engines, 5, 95.0, {0: 0.0}) == (0, 51.0)
    assert estimate(two_engines, 5, 95.0, {0: 70.0}) == (0, 71.0), "available after its restart"


def test_the_estimate_agrees_with_the_scheduler(memory: int) -> None:
    """HTTP workers reject the same images as the engine worker would."""
    slot_table, scheduler = SlotTable(memory), Scheduler(SECONDS, streams=2, capacity=8)
    slots = Slots(slot_table, 0, 1)
    admitted = []
    for number, deadline in enumerate((0.02, 0.005, 0.0095, 0.02)):
        slot_table.publish(0, scheduler)
        _, done_at = estimate(slot_table, 5, deadline, {0: 0.0})
        admitted.append(done_at <= deadline)
        assert (scheduler.admit(Request(4, deadline, number), 0.0) is None) is admitted[-1]
        if admitted[-1]:
            submit(slots, deadline, engine=0)
    assert admitted == [True, False, True, True]


def test_retry_after_includes_the_whole_restart(memory: int) -> None:
    """The safety factor shortens the wait for the queue, but not the wait for a restarting engine worker."""
    slot_table = SlotTable(memory)
    scheduler = Scheduler(dict.fromkeys(SECONDS, 0.1), streams=2, safety_margin=0.5)
    slot_table.publish(0, scheduler)
    rejection = Slots(slot_table, 0, 0).check(1.0, 5, 0.0, {0: 8.0}, decoded_at=0.0)
    assert isinstance(rejection, Rejection)
    assert rejection.retry_after_seconds == pytest.approx(7.1, abs=0.1)


WRITER = """
import sys
from vitserve.service.ipc.shared_memory import SlotTable
slot_table = SlotTable(int(sys.argv[1]))
print("writing", flush=True)
while True:
    for state in range(4):
        slot_table.states[:] = bytes([state]) * len(slot_table.states)
"""


def test_slots_can_be_counted_while_another_process_writes(memory: int) -> None:
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
