"""The offered load: its arithmetic, the measured seconds per image, and which images count.

test_saturation.py overloads a real service.
"""

from __future__ import annotations

import asyncio
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from tests.support.dispatching import IMAGE, BlockingEngine, FakeEngine, Harness, received, run_dispatcher
from tests.support.waiting import eventually_async
from vitserve.service import errors
from vitserve.service.http_worker.dispatch.image_job import ImageResult
from vitserve.service.http_worker.dispatch.offered_load import (
    WINDOW_SECONDS,
    DecodeWork,
    OfferedLoad,
    OfferedWork,
    Rates,
    rates,
    saturation,
)
from vitserve.service.ipc import memory_layout
from vitserve.service.ipc.memory_layout import Shape
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import Metrics
from vitserve.service.scheduler import Batch, Request, Scheduler

SHAPE = Shape(workers=2, slots_per_worker=4, engines=2, streams=2, max_batch=4, image_size=8, classes=3)


def new_slot_table() -> SlotTable:
    descriptor = memory_layout.create(SHAPE, b"")
    try:
        return SlotTable(descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def slot_table() -> SlotTable:
    return new_slot_table()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


# -- arithmetic


@given(st.floats(0.01, 100), st.floats(1e-4, 10), st.integers(1, 8))
def test_steady_load_is_the_rate_times_the_work(per_second: float, seconds: float, workers: int) -> None:
    """For any distribution over HTTP workers and at any moment, up to the weight of one image."""
    works, now = [OfferedWork() for _ in range(workers)], 0.0
    for number in range(math.ceil(20 * WINDOW_SECONDS * per_second)):
        now += 1 / per_second
        works[number % workers] = works[number % workers].plus(seconds / 2, seconds, now)
    offered = rates(works, now + 0.5 / per_second)
    one_image = seconds / WINDOW_SECONDS
    assert offered.inference == pytest.approx(per_second * seconds, abs=one_image)
    assert offered.decode == pytest.approx(offered.inference / 2)


@given(st.floats(0, 1e6), st.floats(0, 1e3))
def test_load_decays_and_is_never_negative(seconds: float, later: float) -> None:
    work = OfferedWork().plus(0.0, seconds, 5.0)
    assert 0 <= rates([work], 5.0 + later).inference <= rates([work], 5.0).inference
    assert rates([work], 5.0 + WINDOW_SECONDS).inference == pytest.approx(seconds / WINDOW_SECONDS / math.e)


def test_saturation_is_that_of_the_most_loaded_stage() -> None:
    assert saturation(Rates(decode=1.0, inference=1.0), Rates(decode=2.0, inference=1.0)) == 1.0
    assert saturation(Rates(decode=5.0, inference=1.0), Rates(decode=2.0, inference=1.0)) == 2.5


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0.1, 10))
def test_twice_the_capacity_halves_the_saturation(decode: float, inference: float, capacity: float) -> None:
    saturated = saturation(Rates(decode, inference), Rates(capacity, capacity))
    halved = saturation(Rates(decode, inference), Rates(2 * capacity, 2 * capacity))
    assert halved == pytest.approx(saturated / 2)


def test_every_worker_sees_the_total_and_a_restart_continues_it(slot_table: SlotTable) -> None:
    slot_table.publish(0, Scheduler({1: 0.5, 2: 0.9, 3: 1.3, 4: 1.7}, streams=2))
    first, second = (OfferedLoad(slot_table, worker, Metrics(CollectorRegistry())) for worker in range(2))
    first.record_decoded(0.25, inference=True)
    second.record_decoded(0.25, inference=True)
    first.flush()
    second.flush()
    total = 2 * 0.25 / WINDOW_SECONDS, 2 * slot_table.image_seconds() / WINDOW_SECONDS
    assert first.rates() == pytest.approx(total, rel=0.05)
    restarted = OfferedLoad(slot_table, 1, Metrics(CollectorRegistry()))
    restarted.record_decoded(0.25, inference=True)
    restarted.flush()
    assert restarted.rates().decode == pytest.approx(3 * 0.25 / WINDOW_SECONDS, rel=0.05)


def test_a_reload_continues_the_load(slot_table: SlotTable, metrics: Metrics) -> None:
    slot_table.publish(0, Scheduler(dict.fromkeys(range(1, 5), 0.5), streams=2))
    previous = OfferedLoad(slot_table, 0, metrics)
    previous.record_decoded(0.25, inference=True)
    current = OfferedLoad(new_slot_table(), 0, metrics)
    current.continue_from(previous)
    assert current.rates() == pytest.approx(previous.rates(), rel=0.01)


# -- seconds per image


def run_batches(scheduler: Scheduler, size: int, seconds: float, count: int = 1) -> None:
    for number in range(count):
        requests = tuple(Request(0, math.inf, identity) for identity in range(size))
        scheduler.done(Batch(0, requests, float(number)), number + seconds)


def test_an_image_takes_its_share_of_a_full_batch(slot_table: SlotTable) -> None:
    slot_table.publish(0, Scheduler({1: 1.0, 2: 1.2, 3: 1.5, 4: 1.6}, streams=2))  # preferred batch size 4
    assert slot_table.image_seconds() == pytest.approx(0.4)
    slot_table.publish(1, Scheduler({1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8}, streams=2))  # preferred batch size 1
    assert slot_table.image_seconds() == pytest.approx(0.3), "the average of both engine workers"


def test_without_an_engine_an_image_takes_no_time(slot_table: SlotTable) -> None:
    assert slot_table.image_seconds() == 0.0


def test_a_slow_batch_of_one_does_not_change_full_batches(slot_table: SlotTable) -> None:
    """Although it raises the estimates of all batch sizes, until another batch of one runs."""
    scheduler = Scheduler({1: 1.0, 2: 1.2, 3: 1.5, 4: 1.6}, streams=2)
    run_batches(scheduler, 1, 1000.0, count=20)
    assert scheduler.estimated_seconds(4) > 3.0
    slot_table.publish(0, scheduler)
    assert slot_table.image_seconds() == pytest.approx(0.4)


@given(slow=st.floats(1.0, 1e4), size=st.integers(1, 4))
def test_fifty_batches_after_a_slow_one_its_effect_is_gone(slow: float, size: int) -> None:
    slot_table, scheduler = new_slot_table(), Scheduler({each: 0.1 * each for each in range(1, 5)}, streams=2)
    run_batches(scheduler, size, slow)
    for _ in range(50):
        run_batches(scheduler, scheduler.preferred_batch_size, 0.1 * scheduler.preferred_batch_size)
    slot_table.publish(0, scheduler)
    assert slot_table.image_seconds() == pytest.approx(0.1, rel=0.02)


# -- which images count


def value(harness: Harness, name: str, **labels: str) -> float:
    return harness.dispatcher.metrics.all.registry.get_sample_value(name, labels) or 0.0


def offered_seconds(harness: Harness) -> Rates:
    harness.dispatcher.admission.flush_offered_load()
    harness.dispatcher.metrics.flush()
    name = "vitserve_offered_load_seconds_total"
    return Rates(value(harness, name, stage="decode"), value(harness, name, stage="inference"))


def test_an_image_that_cannot_be_decoded_adds_no_inference() -> None:
    async def work(harness: Harness) -> None:
        (error,) = await harness.classify_all([b"not an image"])
        assert isinstance(error, errors.NotAnImageError)
        offered = offered_seconds(harness)
        assert offered.decode > 0
        assert offered.inference == 0

    run_dispatcher(work, FakeEngine())


def test_rejected_images_count_like_finished_ones() -> None:
    engine = BlockingEngine()  # until it is released, no batch changes the measured seconds

    async def work(harness: Harness) -> None:
        image_seconds = harness.slot_table.image_seconds()
        results = asyncio.create_task(harness.classify_all([IMAGE] * 8))
        await eventually_async(
            lambda: offered_seconds(harness).inference == pytest.approx(8 * image_seconds), "eight images are counted"
        )
        engine.release.set()
        rejections = [result for result in await results if isinstance(result, errors.OverloadedError)]
        assert len(rejections) == 4, "there are four slots"
        before = offered_seconds(harness)
        (error,) = await harness.classify_all([IMAGE], timeout_seconds=-1.0)
        assert isinstance(error, errors.OverloadedError)
        assert offered_seconds(harness).decode > before.decode

    run_dispatcher(work, engine, slots=4)


def test_a_retried_image_counts_once() -> None:
    async def work(harness: Harness) -> None:
        crashing = harness.connect()
        task = harness.classify()
        await harness.taken(1)
        await asyncio.to_thread(received, crashing, 1)
        before = offered_seconds(harness)
        crashing.close()
        harness.start(FakeEngine(), index=1)
        assert isinstance(await task, ImageResult)
        assert offered_seconds(harness) == before
        assert value(harness, "vitserve_images_retried_total") == 1

    run_dispatcher(work)


def test_a_header_that_cannot_be_read_does_not_change_the_average(slot_table: SlotTable, metrics: Metrics) -> None:
    """It takes microseconds. Damaged images would otherwise make admission too optimistic."""
    offered_load = OfferedLoad(slot_table, 0, metrics)
    offered_load.record(0.1, DecodeWork.DECODED, inference=True)
    for _ in range(100):
        offered_load.record(1e-6, DecodeWork.HEADER, inference=False)
    offered_load.flush()
    before = offered_load.rates().decode
    offered_load.record_rejected()
    offered_load.flush()
    assert (offered_load.rates().decode - before) * WINDOW_SECONDS == pytest.approx(0.1, rel=0.05)
