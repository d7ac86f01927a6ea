"""Slots, pending requests and schedulers as a state machine: any worker may crash at any step.

No slot leaks, none is used twice, and every image is finished exactly once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from vitserve.bench.simulation import SECONDS
from vitserve.service.engine_worker.pending import Completions, PendingRequests
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.memory_layout import FREE, HELD, RUNNING, WAITING, Shape
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.ipc.slots import MAX_CRASHES, Slots, Ticket
from vitserve.service.scheduler import Batch, Scheduler

WORKERS, ENGINES, SLOTS_PER_WORKER = 2, 2, 6


@dataclass
class EngineWorker:
    """The state that is lost when an engine worker crashes."""

    pending: PendingRequests
    running: dict[int, Batch] = field(default_factory=dict)  # by stream
    outbox: Completions = field(default_factory=list)  # sent, and not received yet
    crashed_workers: set[int] = field(default_factory=set)  # HTTP workers whose crash it has not noticed yet


@dataclass
class HttpWorker:
    """The state that is lost when an HTTP worker crashes."""

    slots: Slots
    tickets: dict[int, Ticket] = field(default_factory=dict)  # of unfinished images, by sequence number
    outbox: list[tuple[int, wire_format.Submission]] = field(default_factory=list)  # by engine, not received yet


class Machine(RuleBasedStateMachine):
    """Two HTTP workers and two engine workers on one slot table. Messages may be delayed, but stay in order."""

    tickets = Bundle("tickets")

    @initialize()
    def begin(self) -> None:
        shape = Shape(WORKERS, SLOTS_PER_WORKER, ENGINES, 2, len(SECONDS), 1, 1)
        self.memory = memory_layout.create(shape, b"")
        self.slot_table = SlotTable(self.memory)
        self.now, self.incarnation = 0.0, 0
        self.finished: set[int] = set()
        self.workers = [self.new_worker(index) for index in range(WORKERS)]
        self.engines = [self.new_engine(index) for index in range(ENGINES)]

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.finish_everything()
            os.close(self.memory)

    def new_worker(self, index: int) -> HttpWorker:
        self.incarnation += 1
        return HttpWorker(Slots(self.slot_table, index, self.incarnation))

    def new_engine(self, index: int) -> EngineWorker:
        scheduler = Scheduler(SECONDS, 2, WORKERS * SLOTS_PER_WORKER)
        return EngineWorker(PendingRequests(self.slot_table, index, scheduler))

    # -- HTTP workers

    @rule(target=tickets, worker=st.integers(0, WORKERS - 1), timeout=st.floats(0.001, 0.2), priority=st.integers(0, 9))
    def take(self, worker: int, timeout: float, priority: int) -> object:
        slots = self.workers[worker].slots
        assert slots.free == SLOTS_PER_WORKER - len(slots)
        if not slots.free:
            with pytest.raises(IndexError):
                slots.take(self.now + timeout, priority)
            return multiple()
        ticket = slots.take(self.now + timeout, priority)
        assert ticket.slot // SLOTS_PER_WORKER == worker
        assert self.slot_table.states[ticket.slot] == HELD
        self.workers[worker].tickets[ticket.sequence] = ticket
        return (worker, ticket)

    @rule(pair=consumes(tickets), engine=st.integers(0, ENGINES - 1))
    def submit(self, pair: tuple[int, Ticket], engine: int) -> None:
        worker, ticket = pair
        if self.is_held(worker, ticket):
            self.submit_to(worker, ticket, engine, wire_format.SUBMIT)

    @rule(pair=consumes(tickets))
    def release_before_submission(self, pair: tuple[int, Ticket]) -> None:
        worker, ticket = pair
        if self.is_held(worker, ticket):
            self.workers[worker].slots.release(ticket)
            self.finish(worker, ticket.sequence)
            with pytest.raises(ValueError, match=f"slot {ticket.slot} is not held by this HTTP worker"):
                self.workers[worker].slots.release(ticket)

    @rule(worker=st.integers(0, WORKERS - 1), number=st.integers(0, 99))
    def withdraw(self, worker: int, number: int) -> None:
        submitted = [ticket for ticket in self.workers[worker].tickets.values() if ticket.engine is not None]
        if submitted:
            ticket = submitted[number % len(submitted)]
            assert ticket.engine is not None
            self.send(worker, ticket, ticket.engine, wire_format.WITHDRAW)

    # -- messages

    @rule(index=st.integers(0, ENGINES - 1))
    def engine_receives(self, index: int) -> None:
        engine = self.engines[index]
        for worker in engine.crashed_workers:  # noticed before the first message of the successor
            engine.pending.worker_lost(worker)
        engine.crashed_workers.clear()
        arrived = []
        for number, sender in enumerate(self.workers):
            arrived += [(number, submission) for receiver, submission in sender.outbox if receiver == index]
            sender.outbox = [message for message in sender.outbox if message[0] != index]
        engine.outbox += engine.pending.submit(arrived, self.now)

    @rule(index=st.integers(0, ENGINES - 1))
    def workers_receive(self, index: int) -> None:
        outbox, self.engines[index].outbox = self.engines[index].outbox, []
        for worker, completion in outbox:
            slots = self.workers[worker].slots
            ticket = slots.complete(completion.slot, completion.sequence)
            if completion.sequence >> 32 != slots.incarnation:
                assert ticket is None, "a completion for an earlier incarnation frees no slot"
                continue
            assert ticket is not None
            self.finish(worker, ticket.sequence)
            assert slots.complete(completion.slot, completion.sequence) is None, "a completion frees its slot once"

    # -- engine workers

    @rule(index=st.integers(0, ENGINES - 1), stream=st.integers(0, 1))
    def start_batch(self, index: int, stream: int) -> None:
        engine = self.engines[index]
        if stream in engine.running:
            return
        work = engine.pending.next_batch(stream, self.now)
        if work is not None:
            batch, slots = work
            engine.running[stream] = batch
            assert len(set(slots)) == len(slots)
            for slot, request in zip(slots, batch.requests, strict=True):
                is_running = bool(self.slot_table.states[slot] == RUNNING)
                assert is_running is bool(self.slot_table.sequences[slot] == request.id)

    @rule(index=st.integers(0, ENGINES - 1), stream=st.integers(0, 1), failed=st.booleans())
    def end_batch(self, index: int, stream: int, failed: bool) -> None:
        engine = self.engines[index]
        batch = engine.running.pop(stream, None)
        if batch is not None:
            for row, image in engine.pending.wanted(batch):
                assert batch.requests[row] == image.request
                assert self.slot_table.sequences[image.slot] == image.request.id, "the slot has another image"
            engine.outbox += engine.pending.complete(batch, self.now, failed)
            scheduler = engine.pending.scheduler
            (scheduler.abandon if failed else scheduler.done)(batch, self.now)

    @rule(index=st.integers(0, ENGINES - 1), seconds=st.floats(0.001, 0.1))
    def time_passes(self, index: int, seconds: float) -> None:
        self.now += seconds
        self.engines[index].outbox += self.engines[index].pending.expire(self.now)

    # -- crashes

    @rule(index=st.integers(0, ENGINES - 1))
    def engine_crashes(self, index: int) -> None:
        """What it has sent still arrives, because sockets are read to the end. What it has not received is lost."""
        running = {request.id for batch in self.engines[index].running.values() for request in batch.requests}
        self.workers_receive(index)
        self.engines[index] = self.new_engine(index)
        for number, worker in enumerate(self.workers):
            worker.outbox = [message for message in worker.outbox if message[0] != index]
            for ticket in worker.slots.reclaim(index):
                assert self.slot_table.states[ticket.slot] == HELD
                assert ticket.crashes <= MAX_CRASHES
                assert not (ticket.sequence in running and ticket.crashes == 0), "a running image counts the crash"
                if ticket.crashes == MAX_CRASHES:
                    worker.slots.release(ticket)
                    self.finish(number, ticket.sequence)
                else:
                    action = wire_format.RETRY_ALONE if ticket.crashes else wire_format.RETRY
                    self.submit_to(number, ticket, (index + 1) % ENGINES, action)

    @rule(index=st.integers(0, WORKERS - 1))
    def worker_crashes(self, index: int) -> None:
        """As in the supervisor: its slots are cleared, then its successor starts. The engines notice it later."""
        memory_layout.clear_worker_slots(self.memory, index)
        self.workers[index] = self.new_worker(index)
        for engine in self.engines:
            engine.crashed_workers.add(index)

    # -- invariants

    @invariant()
    def slots_and_unfinished_images_correspond(self) -> None:
        if not hasattr(self, "slot_table"):
            return
        for index, worker in enumerate(self.workers):
            taken = {ticket.slot for ticket in worker.tickets.values()}
            assert len(taken) == len(worker.tickets) == len(worker.slots)
            for slot in range(index * SLOTS_PER_WORKER, (index + 1) * SLOTS_PER_WORKER):
                assert bool(self.slot_table.states[slot] == FREE) is (slot not in taken)
            for ticket in worker.tickets.values():
                assert self.slot_table.sequences[ticket.slot] == ticket.sequence
                assert bool(self.slot_table.states[ticket.slot] == HELD) is (ticket.engine is None)

    # -- steps that several rules share

    def is_held(self, worker: int, ticket: Ticket) -> bool:
        """Whether the ticket belongs to this incarnation of the HTTP worker, and no engine worker has the image."""
        return self.workers[worker].tickets.get(ticket.sequence) is ticket and ticket.engine is None

    def submit_to(self, worker: int, ticket: Ticket, engine: int, action: int) -> None:
        self.workers[worker].slots.submit(ticket, engine)
        assert self.slot_table.states[ticket.slot] == WAITING
        self.send(worker, ticket, engine, action)

    def send(self, worker: int, ticket: Ticket, engine: int, action: int) -> None:
        submission = wire_format.Submission(ticket.slot, action, ticket.priority, ticket.sequence, ticket.deadline)
        self.workers[worker].outbox.append((engine, submission))

    def finish(self, worker: int, sequence: int) -> None:
        assert sequence not in self.finished
        self.finished.add(sequence)
        del self.workers[worker].tickets[sequence]

    def finish_everything(self) -> None:
        """Without further crashes, every submitted image is completed and every slot becomes free."""
        for index, engine in enumerate(self.engines):
            self.engine_receives(index)
            while engine.running or engine.pending.scheduler.waiting:
                for stream in range(2):
                    self.end_batch(index, stream, failed=False)
                    self.start_batch(index, stream)
            self.workers_receive(index)
            assert len(engine.pending) == 0
        for index, worker in enumerate(self.workers):
            for ticket in list(worker.tickets.values()):
                assert ticket.engine is None, "an engine worker has lost an image"
                worker.slots.release(ticket)
                self.finish(index, ticket.sequence)
        assert self.slot_table.count(FREE) == WORKERS * SLOTS_PER_WORKER


TestSlots = Machine.TestCase
TestSlots.settings = settings(max_examples=200, stateful_step_count=60)


def test_a_stale_completion_frees_no_slot() -> None:
    memory = memory_layout.create(Shape(1, 2, 1, 1, 1, 1, 1), b"")
    slots = Slots(SlotTable(memory), 0, 1)
    os.close(memory)
    ticket = slots.take(9.0, 5)
    assert slots.complete(ticket.slot, ticket.sequence) is None, "no engine worker has the image"
    slots.submit(ticket, 0)
    assert slots.complete(ticket.slot, ticket.sequence - 1) is None
    assert slots.complete(1 - ticket.slot, ticket.sequence) is None
    assert slots.complete(ticket.slot, ticket.sequence) is ticket
    assert slots.complete(ticket.slot, ticket.sequence) is None
