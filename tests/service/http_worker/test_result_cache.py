"""The response cache: identical images run once, and no image gets the result of another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.dispatching import IMAGE, BlockingEngine, FakeEngine, Harness, images, run_dispatcher
from tests.support.http import metric
from tests.support.images import encoded, random_image
from tests.support.processes import ADMIN_KEY, reload
from tests.support.server import Server, start_server
from tests.support.waiting import eventually, eventually_async
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.service import errors
from vitserve.service.http_worker.dispatch.image_job import ImageResult
from vitserve.service.http_worker.dispatch.result_cache import ResultCache

LATER, TIMEOUT = 60.0, 30.0  # seconds
OTHER = encoded(random_image(16, 16, seed=1))


def cached(work: Callable[[Harness], Awaitable[object]], engine: FakeEngine, capacity: int = 2**20) -> None:
    async def with_cache(harness: Harness) -> None:
        harness.dispatcher.images = ResultCache(harness.dispatcher, capacity)
        await work(harness)

    run_dispatcher(with_cache, engine)


async def running(engine: BlockingEngine) -> None:
    await asyncio.to_thread(engine.running.wait)


def test_identical_images_run_once_at_the_same_time_and_later() -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> None:
        tasks = [harness.classify() for _ in range(100)]
        await running(engine)
        engine.release.set()
        first, *others = await asyncio.gather(*tasks)
        assert first.inference_seconds > 0
        for result in (*others, await harness.classify()):
            np.testing.assert_array_equal(result.logits, first.logits)
            assert result.inference_seconds == result.decode_seconds == 0

    cached(work, engine)
    assert engine.sizes == [1]


def test_a_client_that_disconnects_does_not_take_the_result_from_others() -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> None:
        first = harness.classify()
        others = [harness.classify() for _ in range(2)]
        await running(engine)
        first.cancel()
        others[0].cancel()
        await asyncio.gather(first, others[0], return_exceptions=True)
        engine.release.set()
        assert isinstance(await others[1], ImageResult)

    cached(work, engine)
    assert engine.sizes == [1]


def test_the_image_is_withdrawn_if_all_clients_disconnect() -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> None:
        blocking = harness.classify(OTHER)
        await running(engine)
        waiting = [harness.classify() for _ in range(3)]
        await harness.waiting(1)
        for task in waiting:
            task.cancel()
        await eventually_async(lambda: len(harness.dispatcher.slots) == 1, "the image was withdrawn")
        again = harness.classify()  # does not wait for the image that was withdrawn
        engine.release.set()
        await asyncio.gather(blocking, again)

    cached(work, engine)
    assert sum(engine.sizes) == 2


@pytest.mark.parametrize(("seconds", "priority"), [(TIMEOUT, 5), (LATER, 9)], ids=["earlier deadline", "more urgent"])
def test_a_more_urgent_client_does_not_wait_for_a_less_urgent_one(seconds: float, priority: int) -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> None:
        now = time.monotonic()
        less = asyncio.create_task(harness.result(IMAGE, now + LATER))
        await running(engine)
        more = asyncio.create_task(harness.result(IMAGE, now + seconds, priority=priority))
        await harness.waiting(1)
        engine.release.set()
        await asyncio.gather(less, more)

    cached(work, engine)
    assert engine.sizes == [1, 1]


def test_a_deadline_that_passes_is_only_that_of_its_client() -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> None:
        blocking = harness.classify(OTHER)
        await running(engine)
        now = time.monotonic()
        short = asyncio.create_task(harness.result(IMAGE, now + 0.3))
        await harness.waiting(1)
        long = asyncio.create_task(harness.result(IMAGE, now + LATER))
        with pytest.raises(errors.DeadlineExceededError):
            await short
        engine.release.set()
        assert isinstance(await long, ImageResult)
        await blocking

    cached(work, engine)


def test_rejected_images_are_rejected_for_clients_with_the_same_deadline_only() -> None:
    engine = BlockingEngine()

    async def work(harness: Harness) -> None:
        past = time.monotonic() - 1
        late = [asyncio.create_task(harness.result(IMAGE, past)) for _ in range(3)]
        for outcome in await asyncio.gather(*late, return_exceptions=True):
            assert isinstance(outcome, errors.OverloadedError | errors.DeadlineExceededError)
        engine.release.set()
        assert isinstance(await harness.classify(), ImageResult)

    cached(work, engine)
    assert engine.sizes == [1]


def test_the_least_recently_used_results_are_evicted() -> None:
    engine = FakeEngine()

    async def work(harness: Harness) -> None:
        first, second, third = images(3)
        for image in (first, second, first, third, first, second):
            await harness.classify(image)

    cached(work, engine, capacity=2 * 1100)  # of two results
    assert engine.sizes == [1] * 4  # first, second, third, and second again


@settings(max_examples=25, deadline=None)
@given(colors=st.lists(st.integers(0, 255), min_size=1, max_size=12))
def test_no_image_gets_the_result_of_another(colors: list[int]) -> None:
    """Sent together and again, in files that differ in a few bytes only."""
    files = [encoded(Image.new("RGB", (16, 16), (color, color, color)), "PNG") for color in colors]
    decoder = Decoder(Preprocessing(16))
    expected = [decoder.decode(file).mean(axis=(0, 1), dtype=np.float32) / 10 for file in files]

    async def work(harness: Harness) -> None:
        for results in [await harness.classify_all(files), await harness.classify_all(files)]:
            for result, logits in zip(results, expected, strict=True):
                assert isinstance(result, ImageResult)
                np.testing.assert_allclose(result.logits, logits, rtol=1e-6)

    engine = FakeEngine()
    cached(work, engine)
    assert sum(engine.sizes) == len(set(files))


@pytest.fixture(scope="module")
def server(slow_bundle: Bundle) -> Iterator[Server]:
    options = "--response-cache-bytes", "1000000", "--workers", "1", "--slots", "128"
    running = start_server("--bundle", str(slow_bundle.path), *options, "--admin-key", ADMIN_KEY)
    yield running
    assert running.stop() == 0


def test_a_hundred_identical_requests_run_once_until_a_reload(server: Server) -> None:
    image = encoded(random_image(seed=5))
    limits = httpx.Limits(max_connections=100)
    with (
        httpx.Client(base_url=server.url, timeout=60, limits=limits) as client,
        ThreadPoolExecutor(100) as pool,
    ):

        def runs(count: int) -> None:
            eventually(lambda: metric(client, "vitserve_batch_size_sum") == count, f"{count} images have run")

        def count(outcome: str) -> float:
            return metric(client, "vitserve_cache_images_total", outcome=outcome)

        def send(_: int) -> str:
            return client.post("/v1/classify", content=image).text

        bodies = set(pool.map(send, range(100)))
        assert len(bodies) == 1
        runs(1)
        assert count("miss") == 1
        assert count("hit") + count("shared") == 99
        assert client.post("/v1/embed", content=image).status_code == 200  # its result has an embedding too
        runs(2)
        assert reload(client).status_code == 200
        assert client.post("/v1/classify", content=image).text in bodies
        runs(3)
