"""The threads of an engine worker."""

from __future__ import annotations

import asyncio

from tests.support.dispatching import BlockingEngine, Harness, Results, images, run_dispatcher
from vitserve.service.http_worker.dispatch.image_job import ImageResult


def test_heartbeats_are_sent_while_short_batches_always_wait() -> None:
    """One thread reads and runs them. The supervisor would otherwise restart an engine worker that has much to do."""
    heartbeats: list[bytes] = []

    async def work(harness: Harness) -> Results:
        harness.start(engine, seconds=1e-6, hang_seconds=1e-3)
        supervisor, _ = harness.channels
        supervisor.setblocking(False)

        def receive() -> None:
            try:
                while True:
                    heartbeats.append(supervisor.recv(1000))
            except BlockingIOError:
                return

        task = asyncio.create_task(harness.classify_all(images(60)))
        await asyncio.to_thread(engine.running.wait)
        await harness.waiting(60 - engine.sizes[0])
        receive()
        heartbeats.clear()
        engine.on_run = receive  # for the batches after the one that blocks
        engine.release.set()
        return await task

    engine = BlockingEngine()
    assert all(isinstance(result, ImageResult) for result in run_dispatcher(work))
    assert len(engine.sizes) > 10
    assert heartbeats, "none was sent before the last batch"
