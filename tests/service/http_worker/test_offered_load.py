"""What is asked of a replica: the arithmetic, what engines say an image takes, and which images count. test_saturation.py overloads a real service."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from tests.service.http_worker.test_dispatcher import IMAGE, House, Scripted, with_house
from vitserve.service import errors
from vitserve.service.http_worker.offered_load import WINDOW_SECONDS, Asked, OfferedLoad, Rates, rates, saturation
from vitserve.service.ipc import memory_layout
from vitserve.service.ipc.memory_layout import Shape
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import Metrics
from vitserve.service.scheduler import Batch, Request, Scheduler

SHAPE = Shape(workers=2, share=4, engines=2, streams=2, max_batch=4, image_size=8, classes=3, width=3)


@pytest.fixture
def slot_table() -> Iterator[SlotTable]:
    descriptor = memory_layout.create(SHAPE, b"")
    yield SlotTable(descriptor)
    os.close(descriptor)


@given(st.floats(0.01, 100), st.floats(1e-4, 10), st.integers(1, 8))
def test_steady_demand_is_what_comes_in_a_second_times_what_it_takes(
    per_second: float, seconds: float, workers: int
) -> None:
    """However it is spread over HTTP workers, and seen at any moment: within the part that one image is of a window."""
    asked, now = [Asked() for _ in range(workers)], 0.0
    for number in range(math.ceil(20 * WINDOW_SECONDS * per_second)):
        now += 1 / per_second
        asked[number % workers] = asked[number % workers].plus(seconds / 2, seconds, now)
    found = rates(asked, now + 0.5 / per_second)
    one_image = seconds / WINDOW_SECONDS
    assert found.run == pytest.approx(per_second * seconds, abs=one_image)
    assert found.decode == pytest.approx(found.run / 2)


@given(st.floats(0, 1e6), st.floats(0, 1e3))
def test_what_was_asked_is_forgotten_and_never_negative(seconds: float, later: float) -> None:
    asked = Asked().plus(0.0, seconds, 5.0)
    assert 0 <= rates([asked], 5.0 + later).run <= rates([asked], 5.0).run
    assert rates([asked], 5.0 + WINDOW_SECONDS).run == pytest.approx(seconds / WINDOW_SECONDS / math.e)


def test_saturation_is_of_the_stage_that_is_asked_for_the_most() -> None:
    assert saturation(Rates(decode=1.0, run=1.0), Rates(decode=2.0, run=1.0)) == 1.0
    assert saturation(Rates(decode=5.0, run=1.0), Rates(decode=2.0, run=1.0)) == 2.5


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0.1, 10))
def test_twice_the_capacity_halves_it(decode: float, run: float, capacity: float) -> None:
    once = saturation(Rates(decode, run), Rates(capacity, capacity))
    assert saturation(Rates(decode, run), Rates(2 * capacity, 2 * capacity)) == pytest.approx(once / 2)


def test_every_front_sees_what_all_were_asked_and_a_successor_goes_on(slot_table: SlotTable) -> None:
    slot_table.publish(0, Scheduler({1: 0.5, 2: 0.9, 3: 1.3, 4: 1.7}, streams=2))
    one, other = (OfferedLoad(slot_table, worker, Metrics(CollectorRegistry())) for worker in range(2))
    one.decoded(0.25, runs=True)
    other.decoded(0.25, runs=True)
    assert one.rates() == pytest.approx(
        (2 * 0.25 / WINDOW_SECONDS, 2 * slot_table.image_seconds() / WINDOW_SECONDS), rel=0.05
    )
    successor = OfferedLoad(slot_table, 1, Metrics(CollectorRegistry()))
    successor.decoded(0.25, runs=True)
    assert successor.rates().decode == pytest.approx(3 * 0.25 / WINDOW_SECONDS, rel=0.05)


def test_another_model_does_not_make_it_forget(slot_table: SlotTable) -> None:
    slot_table.publish(0, Scheduler(dict.fromkeys(range(1, 5), 0.5), streams=2))
    old = OfferedLoad(slot_table, 0, Metrics(CollectorRegistry()))
    old.decoded(0.25, runs=True)
    descriptor = memory_layout.create(SHAPE, b"")
    new = OfferedLoad(SlotTable(descriptor), 0, Metrics(CollectorRegistry()))
    new.go_on(old)
    assert new.rates() == pytest.approx(old.rates(), rel=0.01)
    os.close(descriptor)


# -- what an image takes


def run(scheduler: Scheduler, size: int, seconds: float, times: int = 1) -> None:
    for number in range(times):
        requests = tuple(Request(0, math.inf, each) for each in range(size))
        scheduler.done(Batch(0, requests, float(number)), number + seconds)


def test_an_image_takes_its_part_of_a_full_batch_whatever_the_engines_measured(slot_table: SlotTable) -> None:
    slot_table.publish(0, Scheduler({1: 1.0, 2: 1.2, 3: 1.5, 4: 1.6}, streams=2))  # preferred batch size 4
    assert slot_table.image_seconds() == pytest.approx(0.4)
    slot_table.publish(1, Scheduler({1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8}, streams=2))  # preferred batch size 1
    assert slot_table.image_seconds() == pytest.approx(0.3)


def test_no_engine_takes_nothing(slot_table: SlotTable) -> None:
    assert slot_table.image_seconds() == 0.0


def test_a_slow_batch_of_one_does_not_change_what_an_image_of_a_full_batch_takes(slot_table: SlotTable) -> None:
    """Although nothing may be promised sooner than a batch of one, and under load no batch of one may ever be run again."""
    scheduler = Scheduler({1: 1.0, 2: 1.2, 3: 1.5, 4: 1.6}, streams=2)
    run(scheduler, 1, 1000.0, times=20)
    assert scheduler.estimated_seconds(4) > 3.0
    slot_table.publish(0, scheduler)
    assert slot_table.image_seconds() == pytest.approx(0.4)


@given(slow=st.floats(1.0, 1e4), size=st.integers(1, 4))
def test_a_slow_batch_is_forgotten_within_the_next_fifty(slow: float, size: int) -> None:
    descriptor = memory_layout.create(SHAPE, b"")
    slot_table, scheduler = SlotTable(descriptor), Scheduler({each: 0.1 * each for each in range(1, 5)}, streams=2)
    run(scheduler, size, slow)
    for _ in range(50):
        run(scheduler, scheduler.preferred_batch_size, 0.1 * scheduler.preferred_batch_size)
    slot_table.publish(0, scheduler)
    assert slot_table.image_seconds() == pytest.approx(0.1, rel=0.02)
    os.close(descriptor)


# -- which images count


def offered_load_seconds(house: House) -> tuple[float, float]:
    metrics = house.dispatcher.metrics
    return metrics.offered_decode_seconds._value.get(), metrics.offered_inference_seconds._value.get()


async def images(house: House, *several: bytes, seconds: float = 60.0) -> list[Any]:
    deadline = time.monotonic() + seconds
    return await asyncio.gather(
        *(house.dispatcher.classify(each, deadline, 5) for each in several), return_exceptions=True
    )


def test_an_image_that_nobody_can_decode_asks_for_no_run() -> None:
    async def work(house: House) -> None:
        (answer,) = await images(house, b"no image")
        assert isinstance(answer, errors.NotAnImageError)
        decode, run = offered_load_seconds(house)
        assert decode > 0
        assert run == 0

    with_house(work, Scripted())


def test_images_that_are_refused_ask_for_as_much_as_those_that_are_answered() -> None:
    async def work(house: House) -> None:
        each = house.dispatcher.slot_table.image_seconds()
        asked = asyncio.create_task(images(house, *[IMAGE] * 8))
        async with asyncio.timeout(30):
            while offered_load_seconds(house)[1] < 7.9 * each:
                await asyncio.sleep(0)
        assert offered_load_seconds(house)[1] == pytest.approx(8 * each)
        release.set()
        assert sum(isinstance(answer, errors.OverloadedError) for answer in await asked) == 4, "there are four slots"
        before = offered_load_seconds(house)[0]
        (late,) = await images(house, IMAGE, seconds=-1.0)
        assert isinstance(late, errors.OverloadedError)
        assert offered_load_seconds(house)[0] > before, "decoding was asked for too"

    release = threading.Event()  # until then nothing is measured again
    with_house(work, Scripted(release.wait), slots=4)


def test_an_image_that_is_run_again_asks_once() -> None:
    async def work(house: House) -> None:
        dying = house.connection()
        asked = asyncio.create_task(images(house, IMAGE))
        while not house.dispatcher.slots:
            await asyncio.sleep(0)
        await asyncio.to_thread(dying.recv, 1000)  # the engine has it
        before = offered_load_seconds(house)
        dying.close()
        house.start(Scripted(), 0.001, index=1)
        (answer,) = await asked
        assert not isinstance(answer, Exception)
        assert house.dispatcher.metrics.images_retried._value.get() == 1
        assert offered_load_seconds(house) == before

    with_house(work)
