"""A dispatcher and its engine workers: failing batches, crashes, successors and stale messages.

tests/service/supervisor/test_engine_crash.py kills real processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.dispatching import (
    ENGINE_INCARNATION,
    FakeEngine,
    Harness,
    Results,
    images,
    received,
    run_dispatcher,
)
from tests.support.waiting import eventually_async
from vitserve.model.arrays import Outputs, Pixels
from vitserve.service import errors
from vitserve.service.http_worker.dispatch.image_job import ImageResult
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.memory_layout import RUNNING


def test_a_failed_batch_is_reported_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    failing = True

    def fail() -> None:
        if failing:
            raise RuntimeError("device lost")

    async def work(harness: Harness) -> tuple[Results, Results]:
        nonlocal failing
        first = await harness.classify_all(images(20))
        failing = False
        return first, await harness.classify_all(images(20))

    first, second = run_dispatcher(work, FakeEngine(fail))
    assert all(isinstance(error, errors.EngineFailedError) for error in first)
    assert all("device lost" not in str(error) for error in first), "internal details are only in the log"
    assert all(isinstance(result, ImageResult) for result in second)
    assert caplog.text.count("RuntimeError: device lost") == 1, "logged once per outage"


def test_a_batch_with_non_finite_logits_fails() -> None:
    class NonFiniteEngine(FakeEngine):
        def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
            outputs = super().run(stream, pixels, rows)
            return Outputs(np.full_like(outputs.logits, np.nan), outputs.embedding)

    engine = NonFiniteEngine()
    results = run_dispatcher(lambda harness: harness.classify_all(images(5)), engine)
    assert sum(engine.sizes) == 5
    assert [type(result) for result in results] == [errors.EngineFailedError] * 5


def test_a_successor_may_connect_before_the_exit_is_read() -> None:
    async def work(harness: Harness) -> Results:
        first = harness.connect_fast()
        results = asyncio.create_task(harness.classify_all(images(6)))
        await harness.waiting(6)
        first.close()
        harness.start(FakeEngine())  # before the event loop can read that the socket was closed
        return [*await results, *await harness.classify_all(images(6))]

    results = run_dispatcher(work)
    assert len(results) == 12
    assert all(isinstance(result, ImageResult) for result in results)


def test_images_of_a_crashed_engine_are_retried() -> None:
    """The test plays the first two engine workers.

    The first receives ten images, starts two, completes one and exits. The second starts one of the two and exits.
    """

    async def work(harness: Harness) -> Results:
        states = harness.slot_table.states
        first = harness.connect_fast()
        results = asyncio.create_task(harness.classify_all(images(10)))
        await harness.waiting(10)
        submissions = received(first, 10)
        assert {submission.action for submission in submissions} == {wire_format.SUBMIT}
        suspect, other_suspect, failed, *rest = submissions
        states[suspect.slot] = states[other_suspect.slot] = RUNNING
        completion = wire_format.Completion(failed.slot, wire_format.FAILED, failed.sequence)
        (message,) = wire_format.pack_completions(ENGINE_INCARNATION, [completion])
        first.send(message)
        first.close()
        await harness.unreachable()
        second = harness.connect()
        actions = {
            submission.sequence: submission.action for submission in await asyncio.to_thread(received, second, 9)
        }
        assert actions == {
            suspect.sequence: wire_format.RETRY_ALONE,
            other_suspect.sequence: wire_format.RETRY_ALONE,
            **{submission.sequence: wire_format.RETRY for submission in rest},
        }
        states[suspect.slot] = RUNNING
        second.close()
        await harness.unreachable()
        harness.start(FakeEngine())
        return await results

    results = run_dispatcher(work)
    failures = [result for result in results if isinstance(result, errors.EngineFailedError)]
    assert sorted(str(failure) for failure in failures) == [
        "2 engine workers crashed while running this image",
        "the engine failed while running this image",
    ]
    assert sum(isinstance(result, ImageResult) for result in results) == 8


def test_stale_messages_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    stale = "dropped a stale completion of image"

    async def work(harness: Harness) -> ImageResult:
        endpoint = harness.connect_fast()
        task = harness.classify()
        await harness.waiting(1)
        (submission,) = received(endpoint, 1)
        valid = wire_format.Completion(submission.slot, wire_format.DONE, submission.sequence)
        for incarnation, completion in (
            (ENGINE_INCARNATION - 1, valid),
            (ENGINE_INCARNATION, valid._replace(sequence=submission.sequence - 1)),
            (ENGINE_INCARNATION, valid),
            (ENGINE_INCARNATION, valid),
        ):
            (message,) = wire_format.pack_completions(incarnation, [completion])
            endpoint.send(message)
        result = await task
        await eventually_async(lambda: caplog.text.count(stale) == 2, "two dropped completions")
        endpoint.close()
        return result

    assert isinstance(run_dispatcher(work), ImageResult)
    expected = f"incarnation {ENGINE_INCARNATION - 1} from engine 0, which is connected as incarnation"
    assert f"{expected} {ENGINE_INCARNATION}" in caplog.text
