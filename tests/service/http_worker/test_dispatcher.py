"""A dispatcher: results, admission, deadlines, disconnects and model replacement."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter

import numpy as np
import pytest

from tests.support.dispatching import (
    FAST,
    IMAGE,
    BlockingEngine,
    FakeEngine,
    Harness,
    Results,
    images,
    run_dispatcher,
)
from vitserve.model.arrays import Floats, Pixels
from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.service import errors
from vitserve.service.http_worker.dispatch.decoding import ImageDecoder
from vitserve.service.http_worker.dispatch.image_job import ImageResult, ModelReplacedError
from vitserve.service.ipc.memory_layout import WAITING
from vitserve.service.scheduler import Scheduler


def logits_of(image: bytes) -> Floats:
    pixels = Decoder(Preprocessing(16)).decode(image)
    logits: Floats = pixels.mean(axis=(0, 1), dtype=np.float32) / 10
    return logits


def all_succeeded(results: Results) -> bool:
    return all(isinstance(result, ImageResult) for result in results)


def test_each_image_gets_its_own_result() -> None:
    results = run_dispatcher(lambda harness: harness.classify_all(images(60)), FakeEngine())
    for image, result in zip(images(60), results, strict=True):
        assert isinstance(result, ImageResult)
        expected = np.exp(logits_of(image))
        np.testing.assert_allclose(result.probabilities, expected / expected.sum(), rtol=1e-4)


def test_a_missed_deadline_is_reported_while_the_engine_hangs() -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> tuple[Results, ImageResult]:
        running = harness.classify()
        await asyncio.to_thread(engine.running.wait)
        expired = await harness.classify_all(images(3), timeout_seconds=0.2)
        engine.release.set()
        return expired, await running

    expired, result = run_dispatcher(work, engine)
    assert all(isinstance(error, errors.DeadlineExceededError) for error in expired)
    assert isinstance(result, ImageResult), "an image that is running at its deadline is still classified"


def test_an_image_that_cannot_meet_its_deadline_is_not_decoded() -> None:
    async def work(harness: Harness) -> None:
        with pytest.raises(errors.OverloadedError, match="the deadline cannot be met") as rejection:
            await harness.result(b"not an image", time.monotonic() + 1.0)
        assert 8 < rejection.value.retry_after_seconds < 10
        assert rejection.value.headers() == {"Retry-After": "10"}

    run_dispatcher(work, FakeEngine(), seconds=2.0)


def test_a_worker_that_stalled_once_admits_images_again() -> None:
    async def work(harness: Harness) -> Results:
        harness.dispatcher.admission.delivery_time.seconds = 1e6  # as after a stall of days
        return await harness.classify_all(images(60))

    assert all_succeeded(run_dispatcher(work, FakeEngine()))


def test_an_image_without_a_free_slot_is_rejected() -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> Results:
        admitted = asyncio.create_task(harness.classify_all(images(4)))
        await harness.taken(4)
        with pytest.raises(errors.OverloadedError, match="all slots are in use"):
            await harness.classify()
        engine.release.set()
        return await admitted

    assert all_succeeded(run_dispatcher(work, engine, slots=4))


def test_an_admitted_image_waits_for_a_slot() -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> tuple[ImageResult, Results]:
        first = asyncio.create_task(harness.classify_all(images(4)))
        await harness.taken(4)
        with pytest.raises(errors.DeadlineExceededError, match="before a slot was free"):
            await harness.result(IMAGE, time.monotonic() - 1, admitted=True)
        deadline = time.monotonic() + 30
        second = asyncio.create_task(harness.result(IMAGE, deadline, admitted=True))
        await asyncio.sleep(0)  # starts the task, which then waits
        engine.release.set()
        return await second, await first

    result, others = run_dispatcher(work, engine, slots=4)
    assert isinstance(result, ImageResult)
    assert all_succeeded(others)


def test_a_disconnect_frees_the_slot_before_the_image_runs() -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> ImageResult:
        first = harness.classify()
        await asyncio.to_thread(engine.running.wait)
        cancelled = asyncio.create_task(harness.classify_all(images(20)))
        await harness.waiting(20)
        cancelled.cancel()
        await harness.taken(1)
        engine.release.set()
        return await first

    assert isinstance(run_dispatcher(work, engine), ImageResult)
    assert engine.sizes == [1], "cancelled images do not run"


class BlockingDecoder:
    """Sets ``decoding`` when decoding starts, and blocks until ``release`` is set."""

    seconds, peak_bytes = 0.01, 0  # a decode thread decodes

    def __init__(self, decoder: ImageDecoder) -> None:
        self.decoder, self.decoding, self.release = decoder, threading.Event(), threading.Event()
        self.on_cpu = decoder.on_cpu

    def open(self, encoded: bytes) -> BlockingDecoder:
        self.image = self.decoder.open(encoded)
        return self

    def pixels(self) -> Pixels:
        self.decoding.set()
        assert self.release.wait(60)
        return self.image.pixels()


def test_a_disconnect_during_decoding_frees_the_slot() -> None:
    engine = FakeEngine()

    async def work(harness: Harness) -> None:
        decoder = harness.dispatcher.decoding.decoder = BlockingDecoder(harness.dispatcher.decoding.decoder)
        task = harness.classify()
        await asyncio.to_thread(decoder.decoding.wait)
        task.cancel()
        await asyncio.wait([task])
        decoder.release.set()
        await harness.taken(0)

    run_dispatcher(work, engine)
    assert engine.sizes == []


def test_a_replaced_model_finishes_its_images_and_takes_no_others() -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> Results:
        admitted = asyncio.create_task(harness.classify_all(images(30)))
        await harness.taken(30)
        harness.dispatcher.retire()
        with pytest.raises(ModelReplacedError):
            await harness.classify()
        engine.release.set()
        return await admitted

    assert all_succeeded(run_dispatcher(work, engine))


def test_a_replaced_model_whose_engine_crashes_returns_its_images() -> None:
    async def work(harness: Harness) -> Results:
        endpoint = harness.connect()
        admitted = asyncio.create_task(harness.classify_all(images(5)))
        await harness.waiting(5)
        harness.dispatcher.retire()
        endpoint.close()
        return await admitted

    assert [type(result) for result in run_dispatcher(work)] == [ModelReplacedError] * 5


def test_images_go_to_the_engine_that_finishes_them_first() -> None:
    """Engine 0 needs a second for a batch, so the ten batches of engine 1 finish before its first one."""

    async def work(harness: Harness) -> Results:
        table = harness.slot_table

        def assigned() -> Counter[int]:
            pairs = zip(table.engines, table.states, strict=True)
            return Counter(engine for engine, state in pairs if state == WAITING)

        table.publish(0, Scheduler(dict.fromkeys(range(1, 5), 1.0)))
        table.publish(1, Scheduler(FAST))
        endpoints = [harness.connect(0), harness.connect(1)]
        results = asyncio.create_task(harness.classify_all(images(40)))
        await harness.waiting(40)
        assert assigned() == {1: 40}
        busy = Scheduler(FAST)
        busy.free_at = [time.monotonic() + 10]
        table.publish(1, busy)
        another = harness.classify()
        await harness.waiting(41)
        assert assigned() == {0: 1, 1: 40}
        for endpoint in endpoints:
            endpoint.close()
        await harness.unreachable()
        harness.start(FakeEngine())
        return [await another, *await results]

    assert all_succeeded(run_dispatcher(work))
