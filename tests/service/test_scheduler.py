"""The rules of the scheduler. test_simulation.py checks the guarantees that follow from them."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitserve.bench.simulation import SECONDS
from vitserve.service.scheduler import Batch, Request, Scheduler


def request(deadline: float, identity: int, priority_level: int = 4, alone: bool = False) -> Request:
    return Request(priority_level, deadline, identity, alone)


def test_the_preferred_batch_size_is_the_smallest_near_the_best_rate() -> None:
    assert Scheduler(SECONDS).preferred_batch_size == 4
    assert Scheduler({size: 0.1 * size for size in range(1, 9)}).preferred_batch_size == 1
    assert Scheduler(dict.fromkeys(range(1, 9), 0.1)).preferred_batch_size == 8


def test_the_earliest_deadlines_run_first() -> None:
    scheduler = Scheduler({1: 0.001})
    for deadline, identity in ((3.0, 0), (1.0, 1), (2.0, 2), (1.0, 3)):
        assert scheduler.admit(request(deadline, identity), 0.0) is None
    order = []
    while (batch := scheduler.next_batch(0, 0.0)) is not None:
        order += [request.id for request in batch.requests]
        scheduler.done(batch, 0.001)
    assert order == [1, 3, 2, 0]


def test_a_request_that_would_delay_an_admitted_one_is_rejected() -> None:
    scheduler = Scheduler({1: 1.0})
    assert scheduler.admit(request(1.5, 0), 0.0) is None
    rejection = scheduler.admit(request(1.2, 1), 0.0)
    assert rejection is not None
    assert rejection.reason == "deadline"
    assert scheduler.admit(request(2.5, 2), 0.0) is None


def test_retry_after_is_exact() -> None:
    """If no other request arrives, the same request is admitted after that time, and rejected 10 ms earlier."""
    timeout = 5.5
    for wait, admitted in ((-0.01, False), (0.0, True)):
        scheduler = Scheduler({1: 1.0})
        for identity in range(5):
            assert scheduler.admit(request(timeout, identity), 0.0) is None
        running = scheduler.next_batch(0, 0.0)
        rejection = scheduler.admit(request(timeout, 9), 0.0)
        assert running is not None
        assert rejection is not None
        later = rejection.retry_after_seconds + wait
        for end in range(1, int(later) + 1):
            scheduler.done(running, float(end))
            running = scheduler.next_batch(0, float(end))
            assert running is not None
        assert (scheduler.admit(request(later + timeout, 10), later) is None) is admitted


def test_a_full_queue_rejects_until_a_batch_starts() -> None:
    scheduler = Scheduler({1: 0.5}, capacity=2)
    assert [scheduler.admit(request(99.0, identity), 0.0) for identity in range(2)] == [None, None]
    rejection = scheduler.admit(request(99.0, 2), 0.0)
    assert rejection is not None
    assert (rejection.reason, rejection.retry_after_seconds) == ("full", 0.5)


def test_measured_seconds_follow_the_duration_of_batches() -> None:
    scheduler = Scheduler({1: 0.1, 2: 0.2})
    for step in range(100):
        scheduler.admit(request(1e9, step), 0.0)
        batch = scheduler.next_batch(0, 10.0 * step)
        assert batch is not None
        scheduler.done(batch, 10.0 * step + 0.3)
    assert scheduler.measured[0] == pytest.approx(0.3, rel=1e-3)


@given(batches=st.lists(st.tuples(st.integers(1, 4), st.floats(0.2, 5.0)), max_size=200))
def test_the_preferred_batch_size_never_changes(batches: list[tuple[int, float]]) -> None:
    """Durations in production are not comparable: large batches run under load and small ones with little load."""
    scheduler = Scheduler(SECONDS)
    for number, (size, times) in enumerate(batches):
        started = 10.0 * number
        scheduler.done(
            Batch(0, tuple(request(1e9, identity) for identity in range(size)), started),
            started + times * SECONDS[size],
        )
        assert scheduler.preferred_batch_size == 4


def test_only_a_waiting_request_can_be_withdrawn() -> None:
    scheduler = Scheduler({1: 0.1})
    for number in range(2):
        assert scheduler.admit(request(9.0, number), 0.0) is None
    assert scheduler.next_batch(0, 0.0) is not None
    assert not scheduler.withdraw(request(9.0, 0)), "it is running"
    assert not scheduler.withdraw(request(5.0, 7)), "unknown"
    assert scheduler.withdraw(request(9.0, 1))
    assert scheduler.waiting == 0


def test_a_failed_batch_frees_its_stream_and_is_not_measured() -> None:
    scheduler = Scheduler({1: 0.1})
    scheduler.admit(request(9.0, 0), 0.0)
    batch = scheduler.next_batch(0, 0.0)
    assert batch is not None
    with pytest.raises(ValueError, match="stream 0 is still running"):
        scheduler.next_batch(0, 0.0)
    scheduler.abandon(batch, 5.0)
    assert scheduler.measured == [0.1]
    assert scheduler.next_batch(0, 5.0) is None


def test_a_gap_in_the_measurements_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got sizes \[1, 3\]"):
        Scheduler({1: 0.1, 3: 0.2})


ACTIONS = st.sampled_from(["admit", "restore", "run", "done", "abandon", "withdraw", "expire"])


@settings(max_examples=200)
@given(st.lists(st.tuples(ACTIONS, st.integers(0, 20)), max_size=60), st.integers(1, 3))
def test_every_request_is_in_exactly_one_place(actions: list[tuple[str, int]], streams: int) -> None:
    scheduler = Scheduler(SECONDS, streams=streams, capacity=6)
    waiting: set[Request] = set()
    running: dict[int, Batch] = {}
    for identity, (action, number) in enumerate(actions):
        now = 0.002 * (identity + 1)
        new = request(now + 0.01 * number, identity, priority_level=number % 3, alone=number % 4 == 0)
        if action == "admit":
            if scheduler.admit(new, now) is None:
                waiting.add(new)
        elif action == "restore":
            scheduler.restore(new)
            waiting.add(new)
        elif action == "run" and number % streams not in running:
            batch = scheduler.next_batch(number % streams, now)
            assert (batch is None) is (not waiting)
            if batch is not None:
                running[number % streams] = batch
                assert set(batch.requests) <= waiting
                assert max(batch.requests) <= min(waiting - set(batch.requests), default=max(batch.requests))
                assert len(batch.requests) == 1 or not any(each.alone for each in batch.requests)
                waiting -= set(batch.requests)
        elif action in ("done", "abandon") and number % streams in running:
            (scheduler.done if action == "done" else scheduler.abandon)(running.pop(number % streams), now)
        elif action == "withdraw":
            withdrawn = min(waiting, default=new)
            assert scheduler.withdraw(withdrawn) is (withdrawn in waiting)
            waiting.discard(withdrawn)
            started = [request for batch in running.values() for request in batch.requests]
            assert not any(map(scheduler.withdraw, started)), "a running request cannot be withdrawn"
        elif action == "expire":
            expired = scheduler.expire(now)
            assert set(expired) == {each for each in waiting if each.deadline < now}
            waiting -= set(expired)
        assert scheduler.waiting == len(waiting)


def test_a_more_urgent_request_runs_before_an_earlier_deadline() -> None:
    scheduler = Scheduler({1: 0.1})
    for deadline, identity, priority_level in ((1.0, 0, 9), (8.0, 1, 0), (2.0, 2, 4)):
        assert scheduler.admit(request(deadline, identity, priority_level), 0.0) is None
    order = []
    while (batch := scheduler.next_batch(0, 0.0)) is not None:
        order += [each.id for each in batch.requests]
        scheduler.done(batch, 0.1)
    assert order == [1, 2, 0]


def test_time_is_reserved_only_after_urgent_requests() -> None:
    def accepted(urgent: int) -> int:
        """How many of 100 unimportant requests are admitted after a second with urgent ones. All could be in time."""
        scheduler = Scheduler({1: 0.01})
        for number in range(urgent):
            scheduler.count_arrivals(partial(lambda count: [count] + [0] * 9, number + 1), number / urgent)
            assert scheduler.admit(request(number / urgent + 9, number, priority_level=0), number / urgent) is None
            batch = scheduler.next_batch(0, number / urgent)
            assert batch is not None
            scheduler.done(batch, number / urgent + 0.01)
        scheduler.count_arrivals(lambda: [urgent] + [0] * 9, 1.0)
        return sum(
            scheduler.admit(request(2.0 + 1e-9, 1000 + number, priority_level=9), 1.0) is None for number in range(100)
        )

    assert accepted(urgent=0) == 100
    assert 85 < accepted(urgent=50) < 95, "50 requests of 10 ms reserve a tenth of five seconds"


def test_a_restored_request_is_never_rejected() -> None:
    scheduler = Scheduler(SECONDS, capacity=1)
    for number in range(3):
        scheduler.restore(request(-1.0, number, alone=number == 0))
    batches = []
    while (batch := scheduler.next_batch(0, 0.0)) is not None:
        batches.append([each.id for each in batch.requests])
        scheduler.done(batch, 0.004)
    assert batches == [[0], [1, 2]]


def test_the_safety_margin_grows_until_few_deadlines_are_missed() -> None:
    """The speed of the machine drifts for seconds, at three times its capacity. The engine stays busy all the same."""
    generator, now, pace, due = random.Random(0), 0.0, 1.0, 0.0
    scheduler = Scheduler({1: 0.01})
    in_time: list[bool] = []
    began = busy_seconds = 0.0
    while now < 200.0:
        while due <= now:
            scheduler.admit(request(due + 0.5, round(due * 1e9)), due)
            due += generator.expovariate(300)
        if now > 20.0 and not began:
            began = now
            in_time.clear()
        in_time += [False] * len(scheduler.expire(now))
        batch = scheduler.next_batch(0, now)
        if batch is None:
            now = due
            continue
        pace = min(2.0, max(0.5, pace * math.exp(generator.gauss(0, 0.03))))
        now += 0.01 * pace
        busy_seconds += 0.01 * pace if began else 0.0
        scheduler.done(batch, now)
        in_time.append(now <= batch.requests[0].deadline)
    assert in_time.count(False) / len(in_time) < 0.01
    assert busy_seconds / (now - began) > 0.95
    assert scheduler.safety_margin > 0


def test_a_free_stream_admits_with_any_safety_margin() -> None:
    scheduler = Scheduler({1: 0.03}, safety_margin=1.0)
    assert scheduler.admit(request(0.05, 0), 0.0) is None
    assert scheduler.admit(request(0.10, 1), 0.0) is not None, "behind another request, the safety margin counts"


def test_simultaneous_misses_count_as_a_few() -> None:
    """Those of restored requests do not count at all."""
    scheduler = Scheduler({1: 0.01})
    for identity in range(60):
        scheduler.restore(Request(4, 1.0, identity, restored=True))
    assert len(scheduler.expire(2.0)) == 60
    assert scheduler.safety_margin == 0.0
    for identity in range(60):
        assert scheduler.admit(request(9.0, identity), 2.0) is None
    assert len(scheduler.expire(10.0)) == 60
    assert 0.0 < scheduler.safety_margin < 0.1


def test_a_stalled_batch_hardly_changes_the_estimate() -> None:
    scheduler = Scheduler({1: 0.01})
    assert scheduler.admit(request(99.0, 0), 0.0) is None
    batch = scheduler.next_batch(0, 0.0)
    assert batch is not None
    scheduler.done(batch, 60.0)
    assert scheduler.estimated_seconds(1) < 0.02


def test_requests_that_are_late_anyway_do_not_block_urgent_ones() -> None:
    scheduler = Scheduler({1: 0.1})
    for identity in range(5):
        assert scheduler.admit(request(0.55, identity, priority_level=9), 0.0) is None
    assert scheduler.next_batch(0, 0.0) is not None
    scheduler.safety_margin = 9.0  # as if batches had become ten times slower since
    assert scheduler.admit(request(50.0, 9, priority_level=0), 0.0) is None
