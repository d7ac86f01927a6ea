"""The measurements that an engine worker makes before it serves."""

from __future__ import annotations

import pytest

from tests.support.dispatching import FakeEngine
from vitserve.service.engine_worker.startup import warm_up


def test_warm_up_runs_every_batch_size() -> None:
    engine = FakeEngine()
    seconds = warm_up(engine, (16, 16, 3), patience_seconds=60)
    assert set(engine.sizes) == set(seconds) == {1, 2, 3, 4}
    assert all(duration > 0 for duration in seconds.values())


def test_warm_up_interpolates_sizes_that_a_slow_engine_skips() -> None:
    """Powers of two and the largest size are measured."""
    engine = FakeEngine()
    engine.max_batch = 7
    seconds = warm_up(engine, (16, 16, 3), patience_seconds=0)
    assert set(engine.sizes) == {1, 2, 4, 7}
    assert list(seconds) == [1, 2, 3, 4, 5, 6, 7]
    assert seconds[3] == pytest.approx((seconds[2] + seconds[4]) / 2)
    assert seconds[5] == pytest.approx(seconds[4] + (seconds[7] - seconds[4]) / 3)
