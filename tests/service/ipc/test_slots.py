"""Slots, intake and scheduler together, whatever is done to them: no slot leaks, none is given twice, everybody is answered once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from vitserve.bench.simulation import SECONDS
from vitserve.service.engine_worker.pending import Answers, PendingRequests
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.memory_layout import FREE, HELD, RUNNING, WAITING, Shape
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.ipc.slots import FATAL, Slots, Ticket
from vitserve.service.scheduler import Batch, Scheduler

FRONTS, ENGINES, SHARE = 2, 2, 6


@dataclass
class Engine:
    """What is lost when an engine dies."""

    pending: PendingRequests
    running: dict[int, Batch] = field(default_factory=dict)
    outbox: Answers = field(default_factory=list)  # sent, and not received yet
    unaware: set[int] = field(default_factory=set)  # HTTP workers that have died, which it has not noticed


@dataclass
class Front:
    slots: Slots
    asked: dict[int, Ticket] = field(default_factory=dict)  # whose client waits, by sequence number
    inbox: list[tuple[int, wire_format.Submission]] = field(
        default_factory=list
    )  # with the engine, sent and not received yet


class Machine(RuleBasedStateMachine):
    """Two HTTP workers and two engines on one slot table, each of which may die at any time; messages arrive when they will, in their order."""

    tickets = Bundle("tickets")

    @initialize()
    def begin(self) -> None:
        memory = memory_layout.create(Shape(FRONTS, SHARE, ENGINES, 2, len(SECONDS), 1, 1, 1), b"")
        self.slot_table = SlotTable(memory)
        self.memory = memory
        self.now, self.incarnation = 0.0, 0
        self.answered: set[int] = set()
        self.workers = [self.new_front(index) for index in range(FRONTS)]
        self.engines = [self.new_engine(index) for index in range(ENGINES)]

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.settle_everything()
            os.close(self.memory)

    def new_front(self, index: int) -> Front:
        self.incarnation += 1
        return Front(Slots(self.slot_table, index, self.incarnation))

    def new_engine(self, index: int) -> Engine:
        return Engine(PendingRequests(self.slot_table, index, Scheduler(SECONDS, 2, FRONTS * SHARE)))

    # -- what a HTTP worker does

    @rule(target=tickets, worker=st.integers(0, FRONTS - 1), timeout=st.floats(0.001, 0.2), priority=st.integers(0, 9))
    def take(self, worker: int, timeout: float, priority: int) -> object:
        slots = self.workers[worker].slots
        full = len(slots) == SHARE
        ticket = slots.take(self.now + timeout, priority)
        assert (ticket is None) is full
        if ticket is None:
            return multiple()
        assert ticket.slot // SHARE == worker
        assert self.slot_table.states[ticket.slot] == HELD
        self.workers[worker].asked[ticket.sequence] = ticket
        return (worker, ticket)

    @rule(pair=consumes(tickets), engine=st.integers(0, ENGINES - 1))
    def submit(self, pair: tuple[int, Ticket], engine: int) -> None:
        worker, ticket = pair
        if self.alive(worker, ticket):
            self.send(worker, ticket, engine, wire_format.ASK)

    @rule(pair=consumes(tickets))
    def give_up_before_submission(self, pair: tuple[int, Ticket]) -> None:
        worker, ticket = pair
        if self.alive(worker, ticket):
            self.workers[worker].slots.release(ticket)
            self.answer_once(worker, ticket.sequence)
            with pytest.raises(ValueError, match=f"slot {ticket.slot} is not this HTTP worker's to free"):
                self.workers[worker].slots.release(ticket)

    @rule(worker=st.integers(0, FRONTS - 1), which=st.integers(0, 99))
    def withdraw(self, worker: int, which: int) -> None:
        submitted = [each for each in self.workers[worker].asked.values() if each.engine is not None]
        if submitted:
            ticket = submitted[which % len(submitted)]
            assert ticket.engine is not None
            self.tell(worker, ticket, ticket.engine, wire_format.WITHDRAW)

    # -- what arrives

    @rule(engine=st.integers(0, ENGINES - 1))
    def engine_reads(self, engine: int) -> None:
        for worker in self.engines[engine].unaware:  # it hears of the new one before it hears from it
            self.engines[engine].pending.worker_lost(worker)
        self.engines[engine].unaware.clear()
        arrived = []
        for index, worker in enumerate(self.workers):
            arrived += [(index, each) for to, each in worker.inbox if to == engine]
            worker.inbox = [(to, each) for to, each in worker.inbox if to != engine]
        self.engines[engine].outbox += self.engines[engine].pending.submit(arrived, self.now)

    @rule(engine=st.integers(0, ENGINES - 1))
    def fronts_read(self, engine: int) -> None:
        outbox, self.engines[engine].outbox = self.engines[engine].outbox, []
        for worker, answer in outbox:
            ticket = self.workers[worker].slots.answered(answer.slot, answer.sequence)
            if answer.sequence >> 32 != self.workers[worker].slots.incarnation:
                assert ticket is None, "an answer for an incarnation that is gone frees nothing"
                continue
            assert ticket is not None
            self.answer_once(worker, ticket.sequence)
            assert self.workers[worker].slots.answered(answer.slot, answer.sequence) is None, (
                "and an answer frees only once"
            )

    # -- what an engine does

    @rule(engine=st.integers(0, ENGINES - 1), stream=st.integers(0, 1))
    def run_a_batch(self, engine: int, stream: int) -> None:
        mine = self.engines[engine]
        if stream in mine.running:
            return
        work = mine.pending.next_batch(stream, self.now)
        if work is not None:
            mine.running[stream], slots = work
            assert len(set(slots)) == len(slots)
            for slot, request in zip(slots, mine.running[stream].requests, strict=True):
                assert bool(self.slot_table.states[slot] == RUNNING) is bool(
                    self.slot_table.sequences[slot] == request.id
                )

    @rule(engine=st.integers(0, ENGINES - 1), stream=st.integers(0, 1), failed=st.booleans())
    def end_a_batch(self, engine: int, stream: int, failed: bool) -> None:
        mine = self.engines[engine]
        batch = mine.running.pop(stream, None)
        if batch is not None:
            for row, image in mine.pending.wanted(batch):
                assert batch.requests[row] == image.request
                assert self.slot_table.sequences[image.slot] == image.request.id, (
                    "it would write into another image's slot"
                )
            mine.outbox += mine.pending.close(batch, self.now, failed)
            (mine.pending.scheduler.abandon if failed else mine.pending.scheduler.done)(batch, self.now)

    @rule(engine=st.integers(0, ENGINES - 1), seconds=st.floats(0.001, 0.1))
    def time_passes(self, engine: int, seconds: float) -> None:
        self.now += seconds
        self.engines[engine].outbox += self.engines[engine].pending.expire(self.now)

    # -- deaths

    @rule(engine=st.integers(0, ENGINES - 1))
    def engine_dies(self, engine: int) -> None:
        """What it had sent still arrives: a socket is read to its end. What it had not read is gone."""
        running = {request.id for batch in self.engines[engine].running.values() for request in batch.requests}
        self.fronts_read(engine)
        self.engines[engine] = self.new_engine(engine)
        for index, worker in enumerate(self.workers):
            worker.inbox = [(to, each) for to, each in worker.inbox if to != engine]
            for ticket in worker.slots.lost(engine):
                assert self.slot_table.states[ticket.slot] == HELD
                assert ticket.crashes <= FATAL
                assert not (ticket.sequence in running and ticket.crashes == 0), "it is known who was being run"
                if ticket.crashes == FATAL:
                    worker.slots.release(ticket)
                    self.answer_once(index, ticket.sequence)
                else:
                    self.send(
                        index,
                        ticket,
                        (engine + 1) % ENGINES,
                        wire_format.ALONE if ticket.crashes else wire_format.AGAIN,
                    )

    @rule(worker=st.integers(0, FRONTS - 1))
    def front_dies(self, worker: int) -> None:
        """As the supervisor does it: clears the share, then starts another, of whom the engines learn when they come to it."""
        memory_layout.clear_worker_slots(self.memory, worker)
        self.workers[worker] = self.new_front(worker)
        for engine in self.engines:
            engine.unaware.add(worker)

    # -- what holds always

    @invariant()
    def each_slot_is_where_it_should_be(self) -> None:
        if not hasattr(self, "slot_table"):
            return
        for index, worker in enumerate(self.workers):
            taken = {ticket.slot for ticket in worker.asked.values()}
            assert len(taken) == len(worker.asked) == len(worker.slots), (
                "one slot for each who waits, one who waits for each slot"
            )
            for slot in range(index * SHARE, (index + 1) * SHARE):
                assert bool(self.slot_table.states[slot] == FREE) is (slot not in taken)
            for ticket in worker.asked.values():
                assert self.slot_table.sequences[ticket.slot] == ticket.sequence
                assert bool(self.slot_table.states[ticket.slot] == HELD) is (ticket.engine is None)

    # -- helpers

    def alive(self, worker: int, ticket: Ticket) -> bool:
        return self.workers[worker].asked.get(ticket.sequence) is ticket and ticket.engine is None

    def send(self, worker: int, ticket: Ticket, engine: int, ask: int) -> None:
        self.workers[worker].slots.submit(ticket, engine)
        assert self.slot_table.states[ticket.slot] == WAITING
        self.tell(worker, ticket, engine, ask)

    def tell(self, worker: int, ticket: Ticket, engine: int, ask: int) -> None:
        self.workers[worker].inbox.append(
            (engine, wire_format.Submission(ticket.slot, ask, ticket.priority, ticket.sequence, ticket.deadline))
        )

    def answer_once(self, worker: int, sequence: int) -> None:
        assert sequence not in self.answered
        self.answered.add(sequence)
        del self.workers[worker].asked[sequence]

    def settle_everything(self) -> None:
        """When nothing more comes, everybody who was submitted is answered, and every slot is free."""
        for engine in range(ENGINES):
            self.engine_reads(engine)
            mine = self.engines[engine]
            while mine.running or mine.pending.scheduler.waiting:
                for stream in range(2):
                    self.end_a_batch(engine, stream, failed=False)
                    self.run_a_batch(engine, stream)
            self.fronts_read(engine)
            assert mine.pending.held == 0
        for index, worker in enumerate(self.workers):
            for ticket in list(worker.asked.values()):
                assert ticket.engine is None, "an engine has lost an image"
                worker.slots.release(ticket)
                self.answer_once(index, ticket.sequence)
        assert self.slot_table.count(FREE) == FRONTS * SHARE


TestSlots = Machine.TestCase
TestSlots.settings = settings(max_examples=200, stateful_step_count=60)


def test_an_answer_for_an_image_that_is_not_there_any_more_frees_nothing() -> None:
    memory = memory_layout.create(Shape(1, 2, 1, 1, 1, 1, 1, 1), b"")
    slots = Slots(SlotTable(memory), 0, 1)
    os.close(memory)
    ticket = slots.take(9.0, 5)
    assert ticket is not None
    assert slots.answered(ticket.slot, ticket.sequence) is None, "no engine has it"
    slots.submit(ticket, 0)
    assert slots.answered(ticket.slot, ticket.sequence - 1) is None
    assert slots.answered(1 - ticket.slot, ticket.sequence) is None
    assert slots.answered(ticket.slot, ticket.sequence) is ticket
    assert slots.answered(ticket.slot, ticket.sequence) is None


def test_a_submission_for_a_slot_that_holds_another_image_is_dropped() -> None:
    memory = memory_layout.create(Shape(1, 2, 1, 1, 1, 1, 1, 1), b"")
    slot_table = SlotTable(memory)
    os.close(memory)
    pending = PendingRequests(slot_table, 0, Scheduler({1: 0.1}))
    ticket = Slots(slot_table, 0, 1).take(9.0, 5)
    assert ticket is not None
    stale = wire_format.Submission(ticket.slot, wire_format.ASK, 5, ticket.sequence + 1, 9.0)
    outside = wire_format.Submission(2, wire_format.ASK, 5, ticket.sequence, 9.0)
    assert pending.submit([(0, stale), (0, outside)], 0.0) == []
    assert (pending.stale, pending.held) == (2, 0)


def test_a_batch_whose_front_has_died_writes_into_nobodys_slot() -> None:
    memory = memory_layout.create(Shape(1, 2, 1, 1, 1, 1, 1, 1), b"")
    slot_table = SlotTable(memory)
    pending, slots = PendingRequests(slot_table, 0, Scheduler({1: 0.1})), Slots(slot_table, 0, 1)
    ticket = slots.take(9.0, 5)
    assert ticket is not None
    slots.submit(ticket, 0)
    pending.submit([(0, wire_format.Submission(ticket.slot, wire_format.ASK, 5, ticket.sequence, 9.0))], 0.0)
    work = pending.next_batch(0, 0.0)
    assert work is not None
    assert [image.slot for _, image in pending.wanted(work[0])] == [ticket.slot]
    memory_layout.clear_worker_slots(memory, 0)
    os.close(memory)
    successor = Slots(slot_table, 0, 2).take(9.0, 5)
    assert successor is not None
    assert successor.slot == ticket.slot
    assert pending.wanted(work[0]) == []
    assert pending.close(work[0], 0.1, failed=False) != [], "its answer is sent, and nobody reads it"
