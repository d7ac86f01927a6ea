"""Turns of a real event loop: arrival times, and work at the end of a turn."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry

from vitserve.service.http_worker.metric_buffer import MetricBuffer
from vitserve.service.http_worker.turn import Turns
from vitserve.service.metrics import Metrics


async def next_turn() -> None:
    await asyncio.sleep(0)


def test_data_of_the_next_turn_may_have_arrived_since_this_one_began() -> None:
    async def work() -> None:
        turns = Turns(asyncio.get_running_loop())
        before = time.monotonic()
        first = turns.arrived()
        assert first >= before
        assert turns.arrived() == first, "one time per turn"
        await next_turn()
        assert turns.arrived() == first, "it may have arrived a moment after the first"

    asyncio.run(work())


def test_data_that_ends_an_idle_time_arrived_now() -> None:
    async def work() -> None:
        turns = Turns(asyncio.get_running_loop())
        turns.arrived()
        for _ in range(5):
            await next_turn()
        before = time.monotonic()
        assert turns.arrived() >= before

    asyncio.run(work())


def test_callbacks_run_once_at_the_end_of_the_turn() -> None:
    async def work() -> list[str]:
        turns, calls = Turns(asyncio.get_running_loop()), list[str]()

        def first() -> None:
            calls.append("first")
            turns.at_end(second)

        def second() -> None:
            calls.append("second")

        for _ in range(3):
            turns.at_end(first)
        assert not calls
        for _ in range(5):
            await next_turn()
        return calls

    assert asyncio.run(work()) == ["first", "second"]


def test_a_long_turn_is_reported() -> None:
    async def work(limit_seconds: float) -> int:
        turns, reports = Turns(asyncio.get_running_loop()), list[None]()
        turns.on_long_turn(limit_seconds, lambda: reports.append(None))
        turns.arrived()
        await next_turn()
        await next_turn()
        return len(reports)

    assert asyncio.run(work(-1.0)) == 1
    assert asyncio.run(work(60.0)) == 0


def test_metrics_are_added_up_during_a_turn() -> None:
    async def work() -> None:
        turns, metrics = Turns(asyncio.get_running_loop()), Metrics(CollectorRegistry())
        buffer = MetricBuffer(metrics, turns)

        def value(name: str) -> float | None:
            return metrics.registry.get_sample_value(name)

        for seconds in (0.001, 0.002, 3.0):
            buffer.inc(metrics.images_retried, 2)
            buffer.observe(metrics.read_seconds, seconds)
        assert value("vitserve_images_retried_total") == 0
        await next_turn()
        assert value("vitserve_images_retried_total") == 6
        assert value("vitserve_read_seconds_count") == 3
        assert value("vitserve_read_seconds_sum") == 3.003

    asyncio.run(work())
