"""The scheduler in virtual time: what it promises it keeps, to everybody, whatever comes."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduler import Batch, Request, Scheduler

# A device whose throughput grows until batches of four.
SECONDS = {1: 0.004, 2: 0.005, 3: 0.006, 4: 0.0065, 5: 0.0081, 6: 0.0097, 7: 0.0113, 8: 0.0129}
TIMEOUTS = (0.01, 0.02, 0.05, 0.2, 1.0)


def arrivals(count: int, rate: float, seed: int) -> Iterator[tuple[float, Request]]:
    """Poisson arrivals of varying deadlines, with a burst of simultaneous ones now and then."""
    chance, now = random.Random(seed), 0.0
    made = 0
    while made < count:
        now += chance.expovariate(rate)
        for _ in range(chance.randint(10, 60) if chance.random() < 0.002 else 1):
            if made < count:
                yield now, Request(now + chance.choice(TIMEOUTS), made)
                made += 1


class Device:
    """Runs what the scheduler decides, in exactly the measured seconds, and keeps account of every request."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.admitted: set[int] = set()
        self.shed: set[int] = set()
        self.runs: Counter[int] = Counter()
        self.late = 0.0
        self.expired = 0
        self._running: list[tuple[float, int, Batch]] = []

    def arrive(self, request: Request, now: float) -> None:
        self.advance(now)
        if self.scheduler.admit(request, now) is None:
            self.admitted.add(request.id)
        else:
            self.shed.add(request.id)
        self._fill(now)

    def advance(self, now: float) -> None:
        while self._running and self._running[0][0] <= now:
            finished, _, batch = heapq.heappop(self._running)
            self.scheduler.done(batch, finished)
            for request in batch.requests:
                self.runs[request.id] += 1
                self.late = max(self.late, finished - request.deadline)
            self._fill(finished)

    def _fill(self, now: float) -> None:
        self.expired += len(self.scheduler.expire(now))
        busy = {lane for _, lane, _ in self._running}
        for lane in range(self.scheduler.lanes):
            if lane not in busy and (batch := self.scheduler.next_batch(lane, now)) is not None:
                heapq.heappush(self._running, (now + SECONDS[len(batch.requests)], lane, batch))


def simulate(count: int, lanes: int, rate: float, seed: int) -> Device:
    device = Device(Scheduler(SECONDS, lanes=lanes, capacity=256))
    for now, request in arrivals(count, rate, seed):
        device.arrive(request, now)
    device.advance(float("inf"))
    return device


def assert_promises_kept(device: Device, count: int) -> None:
    assert len(device.admitted) + len(device.shed) == count
    assert not device.admitted & device.shed
    assert device.runs.keys() == device.admitted, "every admitted request is answered, and no shed one"
    assert set(device.runs.values()) == {1}, "once each"
    assert device.expired == 0
    assert device.late <= 1e-9, f"an admitted request was {device.late} s late"


def test_a_million_requests_are_answered_once_and_in_time() -> None:
    """At one and a half times what two lanes can do."""
    count = 1_000_000
    device = simulate(count, lanes=2, rate=1.5 * 2 * 4 / SECONDS[4], seed=1)
    assert_promises_kept(device, count)
    assert 0.55 * count < len(device.admitted) < 0.75 * count, "it sheds what is too much, and no more"


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("load", [0.3, 0.9, 3.0])
def test_promises_are_kept_at_every_load(lanes: int, load: float) -> None:
    device = simulate(20_000, lanes, rate=load * lanes * 4 / SECONDS[4], seed=lanes)
    assert_promises_kept(device, 20_000)
    if load < 0.5:
        assert len(device.shed) < 0.1 * 20_000  # bursts, and deadlines tighter than one batch


def test_the_knee_is_the_smallest_batch_near_the_best_throughput() -> None:
    assert Scheduler(SECONDS).knee == 4
    assert Scheduler({size: 0.1 * size for size in range(1, 9)}).knee == 1
    assert Scheduler(dict.fromkeys(range(1, 9), 0.1)).knee == 8


def test_the_most_urgent_run_first() -> None:
    scheduler = Scheduler({1: 0.001})
    for deadline, identity in ((3.0, 0), (1.0, 1), (2.0, 2), (1.0, 3)):
        assert scheduler.admit(Request(deadline, identity), 0.0) is None
    order = []
    while (batch := scheduler.next_batch(0, 0.0)) is not None:
        order += [request.id for request in batch.requests]
        scheduler.done(batch, 0.001)
    assert order == [1, 3, 2, 0]


def test_one_that_would_make_an_admitted_one_late_is_shed() -> None:
    scheduler = Scheduler({1: 1.0})
    assert scheduler.admit(Request(1.5, 0), 0.0) is None
    shed = scheduler.admit(Request(1.2, 1), 0.0)
    assert shed is not None
    assert shed.reason == "deadline"
    assert scheduler.admit(Request(2.5, 2), 0.0) is None


def test_retry_after_is_the_truth() -> None:
    """Asked again after that many seconds, with nobody else come, the same request is admitted; a little sooner it is not."""
    timeout = 5.5
    for wait, admitted in ((-0.01, False), (0.0, True)):
        scheduler = Scheduler({1: 1.0})
        for identity in range(5):
            assert scheduler.admit(Request(timeout, identity), 0.0) is None
        running = scheduler.next_batch(0, 0.0)
        shed = scheduler.admit(Request(timeout, 9), 0.0)
        assert running is not None
        assert shed is not None
        later = shed.retry_after_seconds + wait
        for end in range(1, int(later) + 1):
            scheduler.done(running, float(end))
            running = scheduler.next_batch(0, float(end))
            assert running is not None
        assert (scheduler.admit(Request(later + timeout, 10), later) is None) is admitted


def test_a_full_queue_sheds_and_says_when_a_place_is_free() -> None:
    scheduler = Scheduler({1: 0.5}, capacity=2)
    assert [scheduler.admit(Request(99.0, identity), 0.0) for identity in range(2)] == [None, None]
    shed = scheduler.admit(Request(99.0, 2), 0.0)
    assert shed is not None
    assert (shed.reason, shed.retry_after_seconds) == ("full", 0.5)


def test_measured_seconds_follow_what_batches_take() -> None:
    scheduler = Scheduler({1: 0.1, 2: 0.2})
    for step in range(100):
        scheduler.admit(Request(1e9, step), 0.0)
        batch = scheduler.next_batch(0, 10.0 * step)
        assert batch is not None
        scheduler.done(batch, 10.0 * step + 0.3)
    assert scheduler.measured()[1] == pytest.approx(0.3, rel=1e-3)


def test_a_failed_batch_frees_its_lane_and_teaches_nothing() -> None:
    scheduler = Scheduler({1: 0.1})
    scheduler.admit(Request(9.0, 0), 0.0)
    batch = scheduler.next_batch(0, 0.0)
    assert batch is not None
    with pytest.raises(ValueError, match="lane 0 is still running"):
        scheduler.next_batch(0, 0.0)
    scheduler.abandon(batch, 5.0)
    assert scheduler.measured() == {1: 0.1}
    assert scheduler.next_batch(0, 5.0) is None


def test_a_gap_in_the_measurements_is_refused() -> None:
    with pytest.raises(ValueError, match=r"given are \[1, 3\]"):
        Scheduler({1: 0.1, 3: 0.2})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["admit", "run", "done", "withdraw", "expire"]), st.integers(0, 20)), max_size=60), st.integers(1, 3))
def test_whatever_happens_every_request_is_accounted_for_once(actions: list[tuple[str, int]], lanes: int) -> None:
    scheduler, now, identity = Scheduler(SECONDS, lanes=lanes, capacity=6), 0.0, 0
    waiting: set[Request] = set()
    running: dict[int, Batch] = {}
    for action, number in actions:
        now += 0.002
        if action == "admit":
            request = Request(now + 0.01 * number, identity)
            identity += 1
            if scheduler.admit(request, now) is None:
                waiting.add(request)
        elif action == "run" and number % lanes not in running:
            batch = scheduler.next_batch(number % lanes, now)
            assert (batch is None) is (not waiting)
            if batch is not None:
                running[number % lanes] = batch
                assert set(batch.requests) <= waiting
                assert max(batch.requests) <= min(waiting - set(batch.requests), default=max(batch.requests))
                waiting -= set(batch.requests)
        elif action == "done" and number % lanes in running:
            scheduler.done(running.pop(number % lanes), now)
        elif action == "withdraw":
            request = min(waiting, default=Request(0.0, -1))
            assert scheduler.withdraw(request) is (request in waiting)
            waiting.discard(request)
        elif action == "expire":
            expired = scheduler.expire(now)
            assert set(expired) == {request for request in waiting if request.deadline < now}
            waiting -= set(expired)
        assert scheduler.waiting == len(waiting) <= 6
    assert set(scheduler.empty()) == waiting
