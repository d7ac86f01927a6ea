"""The runtime when its engine fails, dawdles, or ends: everybody is answered, and nothing dies silently."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from model.parity import Outputs, Precision
from model.preprocess import Decoder, Pixels, Preprocessing
from service import errors
from service.metrics import Metrics
from service.runtime import Answer, Runtime, warm_up
from tests.conftest import encoded, picture

IMAGE = encoded(picture(16, 16))


class Scripted:
    """An engine that does what the test says, and otherwise answers with the image's mean colour as its logits."""

    name, precision, lanes, max_batch = "scripted", "fp32", 1, 4
    precision: Precision

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.act = act
        self.closed = False

    def run(self, lane: int, pixels: Pixels) -> Outputs:
        self.act()
        means = pixels.mean(axis=(1, 2), dtype=np.float32) / 10
        return Outputs(means, means)

    def close(self) -> None:
        self.closed = True


def with_runtime(engine: Scripted, work: Callable[[Runtime], Awaitable[Any]], slots: int = 64, seconds: float = 0.001) -> Any:
    async def main() -> Any:
        runtime = Runtime(
            engine=engine,
            decoder=Decoder(Preprocessing(16)),
            metrics=Metrics(CollectorRegistry()),
            seconds={size: seconds * (1 + size) for size in range(1, 5)},
            slots=slots,
            decode_threads=2,
            loop=asyncio.get_running_loop(),
        )
        runtime.start()
        try:
            return await work(runtime)
        finally:
            await runtime.drain()
            assert engine.closed
            assert runtime.metrics.images_in_flight._value.get() == 0
            assert sorted(runtime._free_slots) == list(range(slots)), "every slot came back, once"

    return asyncio.run(main())


async def outcomes(runtime: Runtime, count: int, timeout_seconds: float = 30.0) -> list[Answer | BaseException]:
    deadline = time.monotonic() + timeout_seconds
    images = [encoded(picture(16, 16, seed=seed)) for seed in range(count)]
    return await asyncio.gather(*(runtime.classify(image, deadline) for image in images), return_exceptions=True)


def test_each_image_gets_its_own_answer() -> None:
    answers = with_runtime(Scripted(), lambda runtime: outcomes(runtime, 60))
    for seed, answer in enumerate(answers):
        assert isinstance(answer, Answer)
        pixels = Decoder(Preprocessing(16)).decode(encoded(picture(16, 16, seed=seed)))
        means = pixels.mean(axis=(0, 1), dtype=np.float32) / 10
        expected = np.exp(means - means.max())
        np.testing.assert_allclose(answer.probabilities, expected / expected.sum(), rtol=1e-4)


def test_a_failed_batch_is_answered_and_the_next_one_served(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        if failing:
            raise RuntimeError("device lost")

    async def work(runtime: Runtime) -> list[list[Answer | BaseException]]:
        first = await outcomes(runtime, 20)
        failing.clear()
        return [first, await outcomes(runtime, 20)]

    failing = [True]
    first, second = with_runtime(Scripted(fail), work)
    assert all(isinstance(each, errors.EngineFailed) for each in first)
    assert all("device lost" not in str(each) for each in first), "what went wrong inside is for the log"
    assert all(isinstance(each, Answer) for each in second)
    assert caplog.text.count("RuntimeError: device lost") == 1, "logged once an outage, not once a batch"


def test_logits_that_are_not_numbers_are_a_failure() -> None:
    engine = Scripted()
    nothing = np.full((1, 3), np.nan, np.float32)
    engine.run = lambda lane, pixels: Outputs(np.repeat(nothing, len(pixels), 0), nothing)  # type: ignore[method-assign]
    assert all(isinstance(each, errors.EngineFailed) for each in with_runtime(engine, lambda runtime: outcomes(runtime, 5)))


def test_a_lane_that_ends_makes_the_service_unready_and_answers_those_who_wait() -> None:
    class Fatal(BaseException):
        pass

    def end() -> None:
        raise Fatal

    async def work(runtime: Runtime) -> None:
        waiting = await outcomes(runtime, 20)
        assert all(isinstance(each, errors.NotReady) for each in waiting)
        assert runtime.broken == "a lane ended: Fatal"
        assert all(isinstance(each, errors.NotReady) for each in await outcomes(runtime, 3)), "and those who come later"

    with_runtime(Scripted(end), work)


def test_a_caller_whose_deadline_passes_is_told_so_while_the_engine_hangs() -> None:
    release = threading.Event()

    async def work(runtime: Runtime) -> list[Answer | BaseException]:
        hung = asyncio.create_task(outcomes(runtime, 1))
        while not runtime.scheduler._busy[0]:
            await asyncio.sleep(0)
        late = await outcomes(runtime, 3, timeout_seconds=0.2)
        release.set()
        return [*late, *await hung]

    *late, hung = with_runtime(Scripted(release.wait), work)  # type: ignore[arg-type]
    assert all(isinstance(each, errors.DeadlineExceeded) for each in late)
    assert isinstance(hung, Answer)


def test_what_cannot_be_in_time_is_refused_before_it_is_decoded() -> None:
    class Undecodable(bytes):
        pass

    async def work(runtime: Runtime) -> None:
        with pytest.raises(errors.Overloaded, match="leaves no room before its deadline") as refused:
            await runtime.classify(b"never looked at", time.monotonic() + 1.0)
        assert 8 < refused.value.retry_after_seconds < 10
        assert refused.value.headers() == {"Retry-After": "10"}

    with_runtime(Scripted(), work, seconds=2.0)


def test_without_a_free_slot_an_image_is_refused() -> None:
    release = threading.Event()

    async def work(runtime: Runtime) -> list[Answer | BaseException]:
        held = asyncio.create_task(outcomes(runtime, 4))
        while runtime._free_slots:
            await asyncio.sleep(0)
        with pytest.raises(errors.Overloaded, match="every slot is taken"):
            await runtime.classify(IMAGE, time.monotonic() + 30)
        release.set()
        return await held

    assert all(isinstance(each, Answer) for each in with_runtime(Scripted(release.wait), work, slots=4))  # type: ignore[arg-type]


def test_draining_answers_what_was_admitted() -> None:
    release = threading.Event()

    async def work(runtime: Runtime) -> list[Answer | BaseException]:
        admitted = asyncio.create_task(outcomes(runtime, 30))
        while len(runtime._free_slots) > 34:
            await asyncio.sleep(0)
        draining = asyncio.create_task(runtime.drain())
        while not runtime._stopping:
            await asyncio.sleep(0)
        with pytest.raises(errors.NotReady, match="stopping"):
            await runtime.classify(IMAGE, time.monotonic() + 30)
        release.set()
        await draining
        return await admitted

    assert all(isinstance(each, Answer) for each in with_runtime(Scripted(release.wait), work))  # type: ignore[arg-type]


def test_warming_up_runs_every_batch_size() -> None:
    sizes: list[int] = []
    engine = Scripted()
    genuine = engine.run
    engine.run = lambda lane, pixels: (sizes.append(len(pixels)), genuine(lane, pixels))[1]  # type: ignore[method-assign, func-returns-value]
    seconds = warm_up(engine, 16)
    assert set(sizes) == set(seconds) == {1, 2, 3, 4}
    assert all(each > 0 for each in seconds.values())
