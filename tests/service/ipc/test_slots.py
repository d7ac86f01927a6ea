"""Slots, intake and scheduler together, whatever is done to them: no slot leaks, none is given twice, everybody is answered once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from vitserve.bench.simulation import SECONDS
from vitserve.service.engine_worker.pending import Answers, Intake
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.memory_layout import FREE, HELD, RUNNING, WAITING, Shape
from vitserve.service.ipc.shared_memory import Ring
from vitserve.service.ipc.slots import FATAL, Slots, Ticket
from vitserve.service.scheduler import Batch, Scheduler

FRONTS, ENGINES, SHARE = 2, 2, 6


@dataclass
class Engine:
    """What is lost when an engine dies."""

    intake: Intake
    running: dict[int, Batch] = field(default_factory=dict)
    outbox: Answers = field(default_factory=list)  # sent, and not received yet
    unaware: set[int] = field(default_factory=set)  # fronts that have died, which it has not noticed


@dataclass
class Front:
    slots: Slots
    asked: dict[int, Ticket] = field(default_factory=dict)  # whose caller waits, by sequence number
    inbox: list[tuple[int, wire_format.Submission]] = field(default_factory=list)  # with the engine, sent and not received yet


class Machine(RuleBasedStateMachine):
    """Two fronts and two engines on one ring, each of which may die at any time; messages arrive when they will, in their order."""

    tickets = Bundle("tickets")

    @initialize()
    def begin(self) -> None:
        memory = memory_layout.create(Shape(FRONTS, SHARE, ENGINES, 2, len(SECONDS), 1, 1, 1), b"")
        self.ring = Ring(memory)
        self.memory = memory
        self.now, self.epoch = 0.0, 0
        self.answered: set[int] = set()
        self.fronts = [self.new_front(index) for index in range(FRONTS)]
        self.engines = [self.new_engine(index) for index in range(ENGINES)]

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.settle_everything()
            os.close(self.memory)

    def new_front(self, index: int) -> Front:
        self.epoch += 1
        return Front(Slots(self.ring, index, self.epoch))

    def new_engine(self, index: int) -> Engine:
        return Engine(Intake(self.ring, index, Scheduler(SECONDS, 2, FRONTS * SHARE)))

    # -- what a front does

    @rule(target=tickets, front=st.integers(0, FRONTS - 1), timeout=st.floats(0.001, 0.2), priority=st.integers(0, 9))
    def take(self, front: int, timeout: float, priority: int) -> object:
        slots = self.fronts[front].slots
        full = len(slots) == SHARE
        ticket = slots.take(self.now + timeout, priority)
        assert (ticket is None) is full
        if ticket is None:
            return multiple()
        assert ticket.slot // SHARE == front
        assert self.ring.states[ticket.slot] == HELD
        self.fronts[front].asked[ticket.sequence] = ticket
        return (front, ticket)

    @rule(pair=consumes(tickets), engine=st.integers(0, ENGINES - 1))
    def submit(self, pair: tuple[int, Ticket], engine: int) -> None:
        front, ticket = pair
        if self.alive(front, ticket):
            self.send(front, ticket, engine, wire_format.ASK)

    @rule(pair=consumes(tickets))
    def give_up_before_submission(self, pair: tuple[int, Ticket]) -> None:
        front, ticket = pair
        if self.alive(front, ticket):
            self.fronts[front].slots.release(ticket)
            self.answer_once(front, ticket.sequence)
            with pytest.raises(ValueError, match=f"slot {ticket.slot} is not this front's to free"):
                self.fronts[front].slots.release(ticket)

    @rule(front=st.integers(0, FRONTS - 1), which=st.integers(0, 99))
    def withdraw(self, front: int, which: int) -> None:
        submitted = [each for each in self.fronts[front].asked.values() if each.engine is not None]
        if submitted:
            ticket = submitted[which % len(submitted)]
            assert ticket.engine is not None
            self.tell(front, ticket, ticket.engine, wire_format.WITHDRAW)

    # -- what arrives

    @rule(engine=st.integers(0, ENGINES - 1))
    def engine_reads(self, engine: int) -> None:
        for front in self.engines[engine].unaware:  # it hears of the new one before it hears from it
            self.engines[engine].intake.front_lost(front)
        self.engines[engine].unaware.clear()
        arrived = []
        for index, front in enumerate(self.fronts):
            arrived += [(index, each) for to, each in front.inbox if to == engine]
            front.inbox = [(to, each) for to, each in front.inbox if to != engine]
        self.engines[engine].outbox += self.engines[engine].intake.submit(arrived, self.now)

    @rule(engine=st.integers(0, ENGINES - 1))
    def fronts_read(self, engine: int) -> None:
        outbox, self.engines[engine].outbox = self.engines[engine].outbox, []
        for front, answer in outbox:
            ticket = self.fronts[front].slots.answered(answer.slot, answer.sequence)
            if answer.sequence >> 32 != self.fronts[front].slots.epoch:
                assert ticket is None, "an answer for an incarnation that is gone frees nothing"
                continue
            assert ticket is not None
            self.answer_once(front, ticket.sequence)
            assert self.fronts[front].slots.answered(answer.slot, answer.sequence) is None, "and an answer frees only once"

    # -- what an engine does

    @rule(engine=st.integers(0, ENGINES - 1), lane=st.integers(0, 1))
    def run_a_batch(self, engine: int, lane: int) -> None:
        mine = self.engines[engine]
        if lane in mine.running:
            return
        work = mine.intake.next_batch(lane, self.now)
        if work is not None:
            mine.running[lane], slots = work
            assert len(set(slots)) == len(slots)
            for slot, request in zip(slots, mine.running[lane].requests, strict=True):
                assert bool(self.ring.states[slot] == RUNNING) is bool(self.ring.sequences[slot] == request.id)

    @rule(engine=st.integers(0, ENGINES - 1), lane=st.integers(0, 1), failed=st.booleans())
    def end_a_batch(self, engine: int, lane: int, failed: bool) -> None:
        mine = self.engines[engine]
        batch = mine.running.pop(lane, None)
        if batch is not None:
            for row, image in mine.intake.wanted(batch):
                assert batch.requests[row] == image.request
                assert self.ring.sequences[image.slot] == image.request.id, "it would write into another image's slot"
            mine.outbox += mine.intake.close(batch, self.now, failed)
            (mine.intake.scheduler.abandon if failed else mine.intake.scheduler.done)(batch, self.now)

    @rule(engine=st.integers(0, ENGINES - 1), seconds=st.floats(0.001, 0.1))
    def time_passes(self, engine: int, seconds: float) -> None:
        self.now += seconds
        self.engines[engine].outbox += self.engines[engine].intake.expire(self.now)

    # -- deaths

    @rule(engine=st.integers(0, ENGINES - 1))
    def engine_dies(self, engine: int) -> None:
        """What it had sent still arrives: a socket is read to its end. What it had not read is gone."""
        running = {request.id for batch in self.engines[engine].running.values() for request in batch.requests}
        self.fronts_read(engine)
        self.engines[engine] = self.new_engine(engine)
        for index, front in enumerate(self.fronts):
            front.inbox = [(to, each) for to, each in front.inbox if to != engine]
            for ticket in front.slots.lost(engine):
                assert self.ring.states[ticket.slot] == HELD
                assert ticket.crashes <= FATAL
                assert not (ticket.sequence in running and ticket.crashes == 0), "it is known who was being run"
                if ticket.crashes == FATAL:
                    front.slots.release(ticket)
                    self.answer_once(index, ticket.sequence)
                else:
                    self.send(index, ticket, (engine + 1) % ENGINES, wire_format.ALONE if ticket.crashes else wire_format.AGAIN)

    @rule(front=st.integers(0, FRONTS - 1))
    def front_dies(self, front: int) -> None:
        """As the supervisor does it: clears the share, then starts another, of whom the engines learn when they come to it."""
        memory_layout.clear_share(self.memory, front)
        self.fronts[front] = self.new_front(front)
        for engine in self.engines:
            engine.unaware.add(front)

    # -- what holds always

    @invariant()
    def each_slot_is_where_it_should_be(self) -> None:
        if not hasattr(self, "ring"):
            return
        for index, front in enumerate(self.fronts):
            taken = {ticket.slot for ticket in front.asked.values()}
            assert len(taken) == len(front.asked) == len(front.slots), "one slot for each who waits, one who waits for each slot"
            for slot in range(index * SHARE, (index + 1) * SHARE):
                assert bool(self.ring.states[slot] == FREE) is (slot not in taken)
            for ticket in front.asked.values():
                assert self.ring.sequences[ticket.slot] == ticket.sequence
                assert bool(self.ring.states[ticket.slot] == HELD) is (ticket.engine is None)

    # -- helpers

    def alive(self, front: int, ticket: Ticket) -> bool:
        return self.fronts[front].asked.get(ticket.sequence) is ticket and ticket.engine is None

    def send(self, front: int, ticket: Ticket, engine: int, ask: int) -> None:
        self.fronts[front].slots.submit(ticket, engine)
        assert self.ring.states[ticket.slot] == WAITING
        self.tell(front, ticket, engine, ask)

    def tell(self, front: int, ticket: Ticket, engine: int, ask: int) -> None:
        self.fronts[front].inbox.append((engine, wire_format.Submission(ticket.slot, ask, ticket.priority, ticket.sequence, ticket.deadline)))

    def answer_once(self, front: int, sequence: int) -> None:
        assert sequence not in self.answered
        self.answered.add(sequence)
        del self.fronts[front].asked[sequence]

    def settle_everything(self) -> None:
        """When nothing more comes, everybody who was submitted is answered, and every slot is free."""
        for engine in range(ENGINES):
            self.engine_reads(engine)
            mine = self.engines[engine]
            while mine.running or mine.intake.scheduler.waiting:
                for lane in range(2):
                    self.end_a_batch(engine, lane, failed=False)
                    self.run_a_batch(engine, lane)
            self.fronts_read(engine)
            assert mine.intake.held == 0
        for index, front in enumerate(self.fronts):
            for ticket in list(front.asked.values()):
                assert ticket.engine is None, "an engine has lost an image"
                front.slots.release(ticket)
                self.answer_once(index, ticket.sequence)
        assert self.ring.count(FREE) == FRONTS * SHARE


TestSlots = Machine.TestCase
TestSlots.settings = settings(max_examples=200, stateful_step_count=60)


def test_an_answer_for_an_image_that_is_not_there_any_more_frees_nothing() -> None:
    memory = memory_layout.create(Shape(1, 2, 1, 1, 1, 1, 1, 1), b"")
    slots = Slots(Ring(memory), 0, 1)
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
    ring = Ring(memory)
    os.close(memory)
    intake = Intake(ring, 0, Scheduler({1: 0.1}))
    ticket = Slots(ring, 0, 1).take(9.0, 5)
    assert ticket is not None
    stale = wire_format.Submission(ticket.slot, wire_format.ASK, 5, ticket.sequence + 1, 9.0)
    outside = wire_format.Submission(2, wire_format.ASK, 5, ticket.sequence, 9.0)
    assert intake.submit([(0, stale), (0, outside)], 0.0) == []
    assert (intake.stale, intake.held) == (2, 0)


def test_a_batch_whose_front_has_died_writes_into_nobodys_slot() -> None:
    memory = memory_layout.create(Shape(1, 2, 1, 1, 1, 1, 1, 1), b"")
    ring = Ring(memory)
    intake, slots = Intake(ring, 0, Scheduler({1: 0.1})), Slots(ring, 0, 1)
    ticket = slots.take(9.0, 5)
    assert ticket is not None
    slots.submit(ticket, 0)
    intake.submit([(0, wire_format.Submission(ticket.slot, wire_format.ASK, 5, ticket.sequence, 9.0))], 0.0)
    work = intake.next_batch(0, 0.0)
    assert work is not None
    assert [image.slot for _, image in intake.wanted(work[0])] == [ticket.slot]
    memory_layout.clear_share(memory, 0)
    os.close(memory)
    successor = Slots(ring, 0, 2).take(9.0, 5)
    assert successor is not None
    assert successor.slot == ticket.slot
    assert intake.wanted(work[0]) == []
    assert intake.close(work[0], 0.1, failed=False) != [], "its answer is sent, and nobody reads it"
