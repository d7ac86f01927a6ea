"""A HTTP worker's own slots: which are taken, by which image, and which engine has them. No I/O, no lock: one dispatcher calls it under its own.

No other HTTP worker writes these slots, so taking one needs nobody's leave.

    FREE ──take──► HELD ──submit──► WAITING ──(engine)──► RUNNING
      ▲             │ ▲                │                     │
      ├───release───┘ └──────lost──────┴─────────────────────┤
      └──────────────────────answered────────────────────────┘
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from vitserve.service.ipc.memory_layout import FREE, HELD, NOWHERE, RUNNING, WAITING
from vitserve.service.ipc.shared_memory import SlotTable, sort_key
from vitserve.service.scheduler import Rejection

FATAL = 2  # crashes of an engine that an image may be in the midst of; then it is suspected and not run again


@dataclass(slots=True, eq=False)
class Ticket:
    """An image's hold on a slot, from take() until it is released or answered."""

    slot: int
    sequence: int  # unique among all images that this service has ever seen: a stale answer names another
    deadline: float
    priority: int
    engine: int | None = None  # which has it; None while the HTTP worker does
    crashes: int = 0  # engines that died while they ran it


@dataclass
class Slots:
    slot_table: SlotTable
    worker: int
    incarnation: int  # of this incarnation of the HTTP worker
    _held: dict[int, Ticket] = field(default_factory=dict, init=False)  # by slot

    def __post_init__(self) -> None:
        share = self.slot_table.shape.share
        self._free = list(range(self.worker * share, (self.worker + 1) * share))
        self._sequences = itertools.count((self.incarnation << 32) + 1)

    def __len__(self) -> int:
        """Slots that are taken."""
        return len(self._held)

    def admit(self, deadline: float, priority: int, now: float, engines: Mapping[int, float]) -> Ticket | Rejection:
        """Takes a slot for a new image if it can be in time; ``engines`` as Ring.completion estimate() wants them.

        As the scheduler sets time aside for the urgent that are to come, a like share of the slots is kept free for them.
        """
        estimate_completion = self.slot_table.estimate_completion(sort_key(priority, deadline), now, engines)
        reserved = self.slot_table.reserved(priority)
        if estimate_completion.done_at > deadline:
            late = estimate_completion.done_at - deadline
            restart = min(
                late, max(0.0, engines[estimate_completion.engine] - now)
            )  # that passes as the clock does; the queue shrinks as batches run
            return Rejection(
                "deadline", restart + (late - restart) * (1 - reserved) / estimate_completion.safety_factor
            )
        ticket = (
            self.take(deadline, priority) if len(self._free) > int(reserved * self.slot_table.shape.share) else None
        )
        if ticket is None:
            return Rejection("full", self.slot_table.estimate_completion(-math.inf, now, engines).done_at - now)
        return ticket

    def take(self, deadline: float, priority: int) -> Ticket | None:
        """For an image that was admitted before. None where every slot is taken."""
        if not self._free:
            return None
        ticket = Ticket(self._free.pop(), next(self._sequences), deadline, priority)
        self._held[ticket.slot] = ticket
        self.slot_table.sequences[ticket.slot] = ticket.sequence
        self._hold(ticket)
        return ticket

    def submit(self, ticket: Ticket, engine: int) -> None:
        """The engine has it from now on, until it answers or is lost."""
        ticket.engine = engine
        self.slot_table.engines[ticket.slot] = engine
        self.slot_table.states[ticket.slot] = WAITING

    def answered(self, slot: int, sequence: int) -> Ticket | None:
        """Frees the slot; None where the answer is stale, being for an image that is not there any more."""
        ticket = self._held.get(slot)
        if ticket is None or ticket.sequence != sequence or ticket.engine is None:
            return None
        self._free_again(ticket)
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Frees a slot that no engine has."""
        if ticket.engine is not None or self._held.get(ticket.slot) is not ticket:
            raise ValueError(f"slot {ticket.slot} is not this HTTP worker's to free")
        self._free_again(ticket)

    def lost(self, engine: int) -> list[Ticket]:
        """The engine has died: its images are the HTTP worker's again, each counting whether it was being run. In the order they were taken."""
        orphans = [ticket for ticket in self._held.values() if ticket.engine == engine]
        for ticket in orphans:
            ticket.crashes += int(self.slot_table.states[ticket.slot] == RUNNING)
            ticket.engine = None
            self._hold(ticket)
        return orphans

    def _hold(self, ticket: Ticket) -> None:
        self.slot_table.engines[ticket.slot] = NOWHERE
        self.slot_table.sort_keys[ticket.slot] = sort_key(ticket.priority, ticket.deadline)
        self.slot_table.states[ticket.slot] = HELD

    def _free_again(self, ticket: Ticket) -> None:
        del self._held[ticket.slot]
        self.slot_table.sort_keys[ticket.slot] = math.inf
        self.slot_table.states[ticket.slot] = FREE
        self._free.append(ticket.slot)
