"""benchmarks.overload: goodput and offered load of an interval, and the report."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.overload import Interval, Result, RetryAfter, report
from tests.support.samples import sample
from vitserve.bench.load import LoadResult


@given(st.lists(st.floats(0, 3), max_size=200), st.floats(0.0, 2.0))
def test_late_responses_do_not_raise_goodput(latencies: list[float], client_delay: float) -> None:
    """Responses after the interval, and those beyond the timeout, count nothing, however late the client sends."""
    samples = tuple(
        sample(client_delay + latency, planned=number / 100, sent=number / 100 + client_delay)
        for number, latency in enumerate(latencies)
    )
    interval = Interval(LoadResult("open", 0, 100.0, 2.0, samples, 0.0), timeout_seconds=0.5, capacity=50.0)
    ended = [request for request in samples if request.ended < 2.0]
    assert interval.goodput * 2.0 == pytest.approx(sum(request.ended - request.sent <= 0.5 for request in ended))
    assert interval.offered * 2.0 == pytest.approx(sum(request.sent < 2.0 for request in samples))


def test_the_report_shows_goodput_and_retry_after() -> None:
    samples = tuple(sample(0.1) for _ in range(98)) + tuple(sample(0.004, "429") for _ in range(100))
    interval = Interval(LoadResult("open", 0, 200.0, 1.0, samples, 0.0), timeout_seconds=0.5, capacity=100.0)
    console = Console(width=140)
    with console.capture() as capture:
        console.print(report(Result([interval], [RetryAfter(1.1, 1.0)])))
    text = capture.get()
    assert "offered load: 2.0 × the capacity" in text
    assert "median 98.0% (98.0% – 98.0%)" in text
    assert "100.00%" in text
    assert "4 ms, 4 ms" in text
    assert "1.10 (the shortest actual time is 1.00 s)" in text


def test_the_report_shows_a_dash_without_samples() -> None:
    interval = Interval(LoadResult("open", 0, 200.0, 1.0, (), 0.0), timeout_seconds=0.5, capacity=100.0)
    console = Console(width=140)
    with console.capture() as capture:
        console.print(report(Result([interval], [])))
    lines = [line for line in capture.get().splitlines() if "latency" in line or "Retry-After" in line]
    assert len(lines) == 3
    assert all("–" in line for line in lines)
