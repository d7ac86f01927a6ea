"""The deadline counts the time in which data waits for the worker, and not the time in which the client sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitserve.service.http_worker.connections.body_clock import WINDOW_BYTES, BodyClock

SECONDS = st.floats(0.001, 10)
SMALL, LARGE = st.integers(1, WINDOW_BYTES - 1), st.integers(WINDOW_BYTES, 10**7)


def start(parts: list[tuple[float, float, int]]) -> float:
    clock = BodyClock(*parts[0])
    for part in parts[1:]:
        clock.read(*part)
    return clock.start


@given(st.lists(st.tuples(SECONDS, SMALL | LARGE), min_size=1, max_size=20))
def test_an_idle_worker_adds_nothing_to_a_slow_upload(parts: list[tuple[float, int]]) -> None:
    """It reads every part at once: the deadline counts from the last one."""
    now, reads = 0.0, []
    for pause, length in parts:
        now += pause
        reads.append((now, now, length))
    assert start(reads) == now


@given(st.lists(st.tuples(SECONDS, LARGE), min_size=1, max_size=20))
def test_a_body_that_waits_for_a_busy_worker_counts_from_its_beginning(turns: list[tuple[float, int]]) -> None:
    """Each turn takes some time and then finds a full buffer: the client could have sent everything at once."""
    began = now = 100.0
    reads = []
    for seconds, length in turns:
        reads.append((now, now + seconds, length))
        now += seconds
    assert start(reads) == pytest.approx(began)


@given(st.lists(st.tuples(SECONDS, SMALL), min_size=2, max_size=20))
def test_a_slow_client_of_a_busy_worker_is_delayed_by_one_turn(turns: list[tuple[float, int]]) -> None:
    """No buffer was full, so only the last bytes can have waited: since the turn before began."""
    now, reads = 0.0, []
    for seconds, length in turns:
        reads.append((now, now + seconds, length))
        now += seconds
    assert start(reads) == reads[-1][0]


def test_reads_of_the_same_turn_are_one_part() -> None:
    half = WINDOW_BYTES // 2 + 1
    assert start([(1.0, 3.0, half), (1.0, 3.0, half), (9.0, 9.0, 10)]) == 9.0 - 2.0
    assert start([(1.0, 3.0, half), (9.0, 9.0, 10)]) == 9.0


@given(st.lists(st.tuples(SECONDS, SECONDS, SMALL | LARGE), min_size=1, max_size=20))
def test_the_start_is_never_before_the_first_and_never_after_the_last_arrival(
    turns: list[tuple[float, float, int]],
) -> None:
    now, reads = 0.0, []
    for pause, seconds, length in turns:
        arrived = now + pause
        now = arrived + seconds
        reads.append((arrived, now, length))
    assert reads[0][0] - 1e-6 <= start(reads) <= reads[-1][0]
