"""The slots of one HTTP worker: which are taken, by which image, and which engine worker has it.

No I/O and no lock: the dispatcher calls it with its own lock held. No other HTTP worker writes these slots, so taking
one needs no coordination between processes.

    FREE ──take──► HELD ──submit──► WAITING ──(engine)──► RUNNING
      ▲             │ ▲                │                     │
      ├───release───┘ └─────reclaim────┴─────────────────────┤
      └──────────────────────complete────────────────────────┘
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from vitserve.service.ipc.memory_layout import FREE, HELD, NO_ENGINE, RUNNING, WAITING
from vitserve.service.ipc.shared_memory import SlotTable, sort_key
from vitserve.service.scheduler import Rejection

MAX_CRASHES = 2  # an image that was running in so many crashes is suspected to be their cause and is not retried


@dataclass(slots=True, eq=False)
class Ticket:
    """An image's claim on a slot, from take() until it is released or completed."""

    slot: int
    sequence: int  # unique among all images of this service, so that stale messages are recognized
    deadline: float
    priority: int
    engine: int | None = None  # the engine worker that has the image; None while the HTTP worker has it
    crashes: int = 0  # engine workers that crashed while they ran it


@dataclass
class Slots:
    slot_table: SlotTable
    worker: int
    incarnation: int  # of the HTTP worker
    _tickets: dict[int, Ticket] = field(default_factory=dict, init=False)  # by slot

    def __post_init__(self) -> None:
        count = self.slot_table.shape.slots_per_worker
        self._free = list(range(self.worker * count, (self.worker + 1) * count))
        self._sequences = itertools.count((self.incarnation << 32) + 1)

    def __len__(self) -> int:
        """Number of slots that are taken."""
        return len(self._tickets)

    @property
    def free(self) -> int:
        """Number of slots that are free."""
        return len(self._free)

    def check(
        self, deadline: float, priority: int, now: float, engines: Mapping[int, float], decoded_at: float
    ) -> Rejection | None:
        """Why a new image is rejected. None if a slot is free and its deadline can be met: then take() succeeds.

        ``engines``: see SlotTable.estimate_completion(). ``decoded_at`` is the earliest time at which it can run.
        The scheduler reserves a share of time for more urgent images; the same share of the slots is kept free.
        """
        key = sort_key(priority, deadline)
        estimate = self.slot_table.estimate_completion(key, now, engines)
        reserved = self.slot_table.reserved(priority)
        if estimate.done_at > deadline:
            lateness = estimate.done_at - deadline
            # Waiting for a restart shortens the lateness by a second per second; waiting for the queue by less.
            restart = min(lateness, max(0.0, engines[estimate.engine] - now))
            retry_after = restart + (lateness - restart) * (1 - reserved) / estimate.safety_factor
            return Rejection("deadline", retry_after)
        if decoded_at > now:
            lateness = decoded_at + self.slot_table.batch_seconds() - deadline
            if lateness > 0:  # decoding is the bottleneck
                return Rejection("deadline", lateness)
        start = max(now, engines[estimate.engine])
        delay = self.slot_table.delay_of_others(key, estimate.engine, start, len(engines))
        if delay:
            return Rejection("deadline", delay / estimate.safety_factor)
        if len(self._free) <= int(reserved * self.slot_table.shape.slots_per_worker):
            return Rejection("full", self.slot_table.estimate_completion(-math.inf, now, engines).done_at - now)
        return None

    def take(self, deadline: float, priority: int) -> Ticket:
        """Takes a slot without admission control. Raises IndexError if every slot is taken."""
        ticket = Ticket(self._free.pop(), next(self._sequences), deadline, priority)
        self._tickets[ticket.slot] = ticket
        self.slot_table.sequences[ticket.slot] = ticket.sequence
        self._hold(ticket)
        return ticket

    def submit(self, ticket: Ticket, engine: int) -> None:
        """The engine worker has the image from now on, until it completes it or crashes."""
        ticket.engine = engine
        self.slot_table.engines[ticket.slot] = engine
        self.slot_table.states[ticket.slot] = WAITING

    def complete(self, slot: int, sequence: int) -> Ticket | None:
        """Frees the slot. None if the completion is stale because the slot has another image or none."""
        ticket = self._tickets.get(slot)
        if ticket is None or ticket.sequence != sequence or ticket.engine is None:
            return None
        self._free_slot(ticket)
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Frees a slot that no engine worker has."""
        if ticket.engine is not None or self._tickets.get(ticket.slot) is not ticket:
            raise ValueError(f"slot {ticket.slot} is not held by this HTTP worker")
        self._free_slot(ticket)

    def reclaim(self, engine: int) -> list[Ticket]:
        """Takes back the images of an engine worker that has exited, in the order in which their slots were taken.

        Counts a crash for each image that was running.
        """
        tickets = [ticket for ticket in self._tickets.values() if ticket.engine == engine]
        for ticket in tickets:
            ticket.crashes += int(self.slot_table.states[ticket.slot] == RUNNING)
            ticket.engine = None
            self._hold(ticket)
        return tickets

    def _hold(self, ticket: Ticket) -> None:
        self.slot_table.engines[ticket.slot] = NO_ENGINE
        self.slot_table.sort_keys[ticket.slot] = sort_key(ticket.priority, ticket.deadline)
        self.slot_table.states[ticket.slot] = HELD

    def _free_slot(self, ticket: Ticket) -> None:
        del self._tickets[ticket.slot]
        self.slot_table.sort_keys[ticket.slot] = math.inf
        self.slot_table.states[ticket.slot] = FREE
        self._free.append(ticket.slot)
