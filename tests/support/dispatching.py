"""A dispatcher connected to engine workers over real sockets and shared memory, all in one process."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from prometheus_client import CollectorRegistry

from tests.support.images import encoded, random_image
from tests.support.waiting import eventually_async
from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.service.engine_worker.batch_loop import BatchLoop
from vitserve.service.engines.engine import select_rows
from vitserve.service.http_worker.dispatch.decode_stage import DecodeWorkers
from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.http_worker.dispatch.image_job import ImageResult, Outcome
from vitserve.service.http_worker.metric_buffer import MetricBuffer
from vitserve.service.http_worker.turn import Turns
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.ipc.control_messages import ConnectWorker, Retire
from vitserve.service.ipc.memory_layout import FREE, WAITING, Shape
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import Metrics
from vitserve.service.scheduler import Scheduler
from vitserve.service.settings import Settings

IMAGE = encoded(random_image(16, 16))
MODEL_INFO = ModelInfo("fake", "1", "0" * 64, ("red", "green", "blue"), Preprocessing(16), "fake", "fp32", {})
ENGINE_INCARNATION = 7
FAST = dict.fromkeys(range(1, 5), 0.001)  # seconds per batch size
TIMEOUT_SECONDS = 30.0

Result = TypeVar("Result")
Results = list[ImageResult | BaseException]


class FakeEngine:
    """Calls ``on_run`` for every batch. Its logits are the mean color of the image divided by ten."""

    name: str = "fake"
    precision: Precision = "fp32"
    streams: int = 1
    max_batch: int = 4

    def __init__(self, on_run: Callable[[], object] = lambda: None) -> None:
        self.on_run = on_run
        self.sizes: list[int] = []

    def share(self, pixels: Pixels) -> None:
        pass

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        pixels = select_rows(pixels, rows)
        self.sizes.append(len(pixels))
        self.on_run()
        means = pixels.mean(axis=(1, 2), dtype=np.float32) / 10
        return Outputs(means, means)

    def close(self) -> None:
        pass


class BlockingEngine(FakeEngine):
    """Sets ``running`` when the first batch starts, and blocks until ``release`` is set."""

    def __init__(self) -> None:
        super().__init__(self._block)
        self.running, self.release = threading.Event(), threading.Event()

    def _block(self) -> None:
        self.running.set()
        assert self.release.wait(60)


@dataclass
class Harness:
    """The dispatcher of one HTTP worker, and its engine workers: real batch loops, or sockets that the test holds."""

    dispatcher: Dispatcher
    memory: int
    threads: list[threading.Thread] = field(default_factory=list)
    channels: list[socket.socket] = field(default_factory=list)

    @property
    def slot_table(self) -> SlotTable:
        return self.dispatcher.slot_table

    def start(self, engine: FakeEngine, seconds: float = 0.001, index: int = 0, hang_seconds: float = 60.0) -> None:
        """Runs the threads of an engine worker. A batch of n is expected to take ``seconds`` * (1 + n)."""
        expected = {size: seconds * (1 + size) for size in range(1, 5)}
        metrics = Metrics(CollectorRegistry())
        loop = BatchLoop(engine, SlotTable(self.memory), index, ENGINE_INCARNATION, expected, metrics, hang_seconds)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        endpoint = self.connect(index)
        Channel(ours).send(ConnectWorker(worker=0, incarnation=1), [endpoint.fileno()])
        endpoint.close()
        Channel(ours).send(Retire())
        thread = threading.Thread(target=loop.run, args=(Channel(theirs),), daemon=True)
        thread.start()
        self.threads.append(thread)
        self.channels += [ours, theirs]

    def connect(self, index: int = 0) -> socket.socket:
        """Connects the dispatcher to an engine worker whose end of the socket is returned."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.dispatcher.connect(index, ENGINE_INCARNATION, ours)
        return theirs

    def connect_fast(self, index: int = 0) -> socket.socket:
        """As connect(), of an engine worker with estimates of a millisecond per batch."""
        self.slot_table.publish(index, Scheduler(FAST))
        return self.connect(index)

    def classify(self, image: bytes = IMAGE) -> asyncio.Task[ImageResult]:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        return asyncio.create_task(self.result(image, deadline))

    async def result(self, image: bytes, deadline: float, admitted: bool = False, priority: int = 5) -> ImageResult:
        """Raises the error that the client would get. Cancellation abandons the image, as a disconnect does."""
        future: asyncio.Future[ImageResult] = asyncio.get_running_loop().create_future()

        def on_done(outcome: Outcome) -> None:
            if isinstance(outcome, ImageResult):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

        job = self.dispatcher.images.submit(image, deadline, priority, on_done, admitted)
        try:
            return await future
        except asyncio.CancelledError:
            self.dispatcher.images.abandon(job)
            raise

    async def classify_all(self, images: Sequence[bytes], timeout_seconds: float = TIMEOUT_SECONDS) -> Results:
        deadline = time.monotonic() + timeout_seconds
        return await asyncio.gather(*(self.result(image, deadline) for image in images), return_exceptions=True)

    async def waiting(self, count: int) -> None:
        """Returns when exactly ``count`` images are assigned to engine workers and not running."""
        await eventually_async(lambda: self.slot_table.count(WAITING) == count, f"{count} waiting images")

    async def taken(self, count: int) -> None:
        """Returns when exactly ``count`` slots are in use."""
        await eventually_async(lambda: len(self.dispatcher.slots) == count, f"{count} slots in use")

    async def unreachable(self) -> None:
        await eventually_async(lambda: not self.dispatcher.reachable, "no engine worker is connected")


def images(count: int) -> list[bytes]:
    return [encoded(random_image(16, 16, seed=seed)) for seed in range(count)]


def received(endpoint: socket.socket, count: int) -> list[wire_format.Submission]:
    """The next submissions that an engine worker receives. Blocks until they have arrived."""
    endpoint.settimeout(60)
    submissions: list[wire_format.Submission] = []
    while len(submissions) < count:
        submissions += wire_format.unpack_submissions(endpoint.recv(wire_format.MAX_BYTES))[1]
    assert len(submissions) == count
    return submissions


def run_dispatcher(
    work: Callable[[Harness], Awaitable[Result]],
    engine: FakeEngine | None = None,
    slots: int = 64,
    seconds: float = 0.001,
) -> Result:
    """Afterwards every slot is free, and the engine workers have exited because their last HTTP worker disconnected."""

    async def main() -> Result:
        memory = memory_layout.create(Shape(1, slots, 2, 1, 4, 16, 3), MODEL_INFO.to_json())
        metrics = Metrics(CollectorRegistry())
        loop = asyncio.get_running_loop()
        settings = Settings(image_memory_bytes=2**30)
        turns, decoders = Turns(loop), DecodeWorkers(2, 0, settings)
        buffer = MetricBuffer(metrics, turns)
        dispatcher = Dispatcher(SlotTable(memory), 0, 1, settings, buffer, decoders, turns, loop)
        harness = Harness(dispatcher, memory)
        if engine is not None:
            harness.start(engine, seconds)
        result = await work(harness)
        dispatcher.retire()
        await harness.unreachable()
        await harness.taken(0)
        for thread in harness.threads:
            await asyncio.to_thread(thread.join)
        decoders.close()
        assert harness.slot_table.count(FREE) == slots
        for channel in harness.channels:
            channel.close()
        os.close(memory)
        return result

    return asyncio.run(main())
