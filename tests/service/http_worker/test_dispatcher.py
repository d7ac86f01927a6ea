"""A dispatcher and an engine worker's threads over real sockets and memory, when the engine fails, dawdles or is gone. test_processes.py kills real ones."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from tests.support.images import encoded, random_image
from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.service import errors
from vitserve.service.engine_worker.batch_loop import BatchLoop
from vitserve.service.engine_worker.startup import warm_up
from vitserve.service.engines.engine import select_rows
from vitserve.service.http_worker.dispatcher import Answer, Dispatcher, ModelReplacedError
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.connection import Connection
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.ipc.memory_layout import FREE, Shape
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import Metrics
from vitserve.service.scheduler import Scheduler
from vitserve.service.settings import Settings

IMAGE = encoded(random_image(16, 16))
SERVED = ModelInfo("scripted", "1", "0" * 64, ("red", "green", "blue"), Preprocessing(16), "scripted", "fp32", {})
EPOCH = 7


class Scripted:
    """An engine that does what the test says, and otherwise answers with the image's mean color as its logits."""

    name, precision, streams, max_batch = "scripted", "fp32", 1, 4
    precision: Precision

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.act = act
        self.sizes: list[int] = []

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        pixels = select_rows(pixels, rows)
        self.sizes.append(len(pixels))
        self.act()
        means = pixels.mean(axis=(1, 2), dtype=np.float32) / 10
        return Outputs(means, means)

    def close(self) -> None:
        pass


def logits_of(image: bytes) -> np.ndarray:
    return Decoder(Preprocessing(16)).decode(image).mean(axis=(0, 1), dtype=np.float32) / 10


@dataclass
class House:
    """One HTTP worker's dispatcher, and the links to whatever plays its engines."""

    dispatcher: Dispatcher
    memory: int
    threads: list[threading.Thread] = field(default_factory=list)
    channels: list[socket.socket] = field(default_factory=list)

    def start(self, engine: Scripted, seconds: float, index: int = 0) -> None:
        """A real engine worker's threads, in this process."""
        measured = {size: seconds * (1 + size) for size in range(1, 5)}
        metrics = Metrics(CollectorRegistry())
        process = BatchLoop(engine, SlotTable(self.memory), index, EPOCH, measured, metrics, hang_seconds=60.0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection = self.connection(index)
        Channel(ours).send({"kind": "connect", "worker": 0, "incarnation": 1}, [connection.fileno()])
        connection.close()
        Channel(ours).send({"kind": "retire"})
        thread = threading.Thread(target=process.run, args=(Channel(theirs),), daemon=True)
        thread.start()
        self.threads.append(thread)
        self.channels += [ours, theirs]

    def connection(self, index: int = 0) -> socket.socket:
        """The engine's end; the HTTP worker's is connected."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.dispatcher.connect(index, Connection(ours, index, EPOCH, self.dispatcher.stuck))
        return theirs

    @property
    def taken(self) -> int:
        return len(self.dispatcher.slots)


def with_house(
    work: Callable[[House], Awaitable[Any]], engine: Scripted | None = None, slots: int = 64, seconds: float = 0.001
) -> Any:
    """Afterwards every slot has come back, and the engine's process has ended because its last HTTP worker had let go."""

    async def main() -> Any:
        memory = memory_layout.create(Shape(1, slots, 2, 1, 4, 16, 3, 3), SERVED.to_json())
        metrics = Metrics(CollectorRegistry())
        with ThreadPoolExecutor(2) as decoders:
            house = House(
                Dispatcher(SlotTable(memory), 0, 1, Settings(), metrics, decoders, asyncio.get_running_loop()), memory
            )
            if engine is not None:
                house.start(engine, seconds)
            result = await work(house)
            house.dispatcher.retire()
            while house.dispatcher.reachable or house.taken:
                await asyncio.sleep(0)
            for thread in house.threads:
                await asyncio.to_thread(thread.join)
        assert house.dispatcher.slot_table.count(FREE) == slots
        for channel in house.channels:
            channel.close()
        os.close(memory)
        return result

    return asyncio.run(main())


async def outcomes(house: House, count: int, timeout_seconds: float = 30.0) -> list[Answer | BaseException]:
    deadline = time.monotonic() + timeout_seconds
    images = [encoded(random_image(16, 16, seed=seed)) for seed in range(count)]
    return await asyncio.gather(
        *(house.dispatcher.classify(image, deadline, 5) for image in images), return_exceptions=True
    )


def test_each_image_gets_its_own_answer() -> None:
    answers = with_house(lambda house: outcomes(house, 60), Scripted())
    for seed, answer in enumerate(answers):
        assert isinstance(answer, Answer)
        expected = np.exp(logits_of(encoded(random_image(16, 16, seed=seed))))
        np.testing.assert_allclose(answer.probabilities, expected / expected.sum(), rtol=1e-4)


def test_a_failed_batch_is_answered_and_the_next_one_served(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        if failing:
            raise RuntimeError("device lost")

    async def work(house: House) -> list[list[Answer | BaseException]]:
        first = await outcomes(house, 20)
        failing.clear()
        return [first, await outcomes(house, 20)]

    failing = [True]
    first, second = with_house(work, Scripted(fail))
    assert all(isinstance(each, errors.EngineFailedError) for each in first)
    assert all("device lost" not in str(each) for each in first), "what went wrong inside is for the log"
    assert all(isinstance(each, Answer) for each in second)
    assert caplog.text.count("RuntimeError: device lost") == 1, "logged once an outage, not once a batch"


def test_logits_that_are_not_numbers_are_a_failure() -> None:
    engine = Scripted()
    nothing = np.full((1, 3), np.nan, np.float32)
    engine.run = lambda stream, pixels: Outputs(np.repeat(nothing, len(pixels), 0), nothing)  # type: ignore[method-assign]
    assert all(
        isinstance(each, errors.EngineFailedError) for each in with_house(lambda house: outcomes(house, 5), engine)
    )


def test_a_caller_whose_deadline_passes_is_told_so_while_the_engine_hangs() -> None:
    release, running = threading.Event(), threading.Event()

    async def work(house: House) -> list[Answer | BaseException]:
        hung = asyncio.create_task(outcomes(house, 1))
        await asyncio.to_thread(running.wait)
        late = await outcomes(house, 3, timeout_seconds=0.2)
        release.set()
        return [*late, *await hung]

    *late, hung = with_house(work, Scripted(lambda: (running.set(), release.wait())))
    assert all(isinstance(each, errors.DeadlineExceededError) for each in late)
    assert isinstance(hung, Answer)


def test_what_cannot_be_in_time_is_refused_before_it_is_decoded() -> None:
    async def work(house: House) -> None:
        with pytest.raises(errors.OverloadedError, match="leaves no room before its deadline") as rejected:
            await house.dispatcher.classify(b"never looked at", time.monotonic() + 1.0, 5)
        assert 8 < rejected.value.retry_after_seconds < 10
        assert rejected.value.headers() == {"Retry-After": "10"}

    with_house(work, Scripted(), seconds=2.0)


def test_a_front_that_stood_still_once_admits_again_and_learns_better() -> None:
    async def work(house: House) -> list[Answer | BaseException]:
        house.dispatcher._return_seconds = 1e6  # as if an answer had lain unread for weeks
        return await outcomes(house, 60)

    assert all(isinstance(each, Answer) for each in with_house(work, Scripted()))


def test_an_engines_successor_may_be_connected_before_its_end_is_read() -> None:
    async def work(house: House) -> list[Answer | BaseException]:
        house.dispatcher.slot_table.publish(0, Scheduler(dict.fromkeys(range(1, 5), 0.001)))
        first = house.connection()
        asked = asyncio.create_task(outcomes(house, 6))
        while house.dispatcher.slot_table.count(memory_layout.WAITING) < 6:
            await asyncio.sleep(0)
        first.close()
        house.start(Scripted(), 0.001)  # before the event loop has had a turn to read the end
        return [*await asked, *await outcomes(house, 6)]

    found = with_house(work)
    assert len(found) == 12
    assert all(isinstance(each, Answer) for each in found)


def test_without_a_free_slot_an_image_is_refused() -> None:
    release = threading.Event()

    async def work(house: House) -> list[Answer | BaseException]:
        held = asyncio.create_task(outcomes(house, 4))
        while house.taken < 4:
            await asyncio.sleep(0)
        with pytest.raises(errors.OverloadedError, match="every slot is taken"):
            await house.dispatcher.classify(IMAGE, time.monotonic() + 30, 5)
        release.set()
        return await held

    assert all(isinstance(each, Answer) for each in with_house(work, Scripted(release.wait), slots=4))


def test_a_caller_who_leaves_frees_the_place_before_a_batch_is_formed() -> None:
    release, running = threading.Event(), threading.Event()
    engine = Scripted(lambda: (running.set(), release.wait()))

    async def work(house: House) -> None:
        first = asyncio.create_task(house.dispatcher.classify(IMAGE, time.monotonic() + 30, 5))
        await asyncio.to_thread(running.wait)
        leaving = asyncio.create_task(outcomes(house, 20))
        while house.dispatcher.slot_table.count(memory_layout.WAITING) < 20:
            await asyncio.sleep(0)
        leaving.cancel()
        while house.taken > 1:
            await asyncio.sleep(0)
        release.set()
        assert isinstance(await first, Answer)

    with_house(work, engine)
    assert engine.sizes == [1], "nobody ran those that nobody waits for"


def test_a_replaced_model_answers_what_it_admitted_and_refuses_what_comes() -> None:
    release = threading.Event()

    async def work(house: House) -> list[Answer | BaseException]:
        admitted = asyncio.create_task(outcomes(house, 30))
        while house.taken < 30:
            await asyncio.sleep(0)
        house.dispatcher.retire()
        with pytest.raises(ModelReplacedError):
            await house.dispatcher.classify(IMAGE, time.monotonic() + 30, 5)
        release.set()
        return await admitted

    assert all(isinstance(each, Answer) for each in with_house(work, Scripted(release.wait)))


def test_a_replaced_model_that_dies_hands_its_images_on() -> None:
    async def work(house: House) -> list[Answer | BaseException]:
        engine = house.connection()
        admitted = asyncio.create_task(outcomes(house, 5))
        while house.dispatcher.slot_table.count(memory_layout.WAITING) < 5:
            await asyncio.sleep(0)
        house.dispatcher.retire()
        engine.close()
        return await admitted

    assert [type(each) for each in with_house(work)] == [ModelReplacedError] * 5


def test_what_a_dead_engine_left_is_run_by_the_next() -> None:
    """The first engine is a socket that the test holds: it takes in ten, marks two as running, answers one, and dies."""

    async def work(house: House) -> list[Answer | BaseException]:
        house.dispatcher.slot_table.publish(0, Scheduler(dict.fromkeys(range(1, 5), 0.001)))
        first = house.connection()
        asked = asyncio.create_task(outcomes(house, 10))
        while house.dispatcher.slot_table.count(memory_layout.WAITING) < 10:
            await asyncio.sleep(0)
        sent = [wire_format.unpack_submissions(first.recv(wire_format.MAX_BYTES))[1][0] for _ in range(10)]
        assert {each.ask for each in sent} == {wire_format.ASK}
        house.dispatcher.slot_table.states[sent[0].slot] = house.dispatcher.slot_table.states[sent[1].slot] = (
            memory_layout.RUNNING
        )
        (message,) = wire_format.pack_answers(
            EPOCH, [wire_format.Answer(sent[2].slot, wire_format.FAILED, sent[2].sequence)]
        )
        first.send(message)
        first.close()
        while house.dispatcher.reachable:
            await asyncio.sleep(0)
        second = house.connection()
        again = [wire_format.unpack_submissions(second.recv(wire_format.MAX_BYTES))[1][0] for _ in range(9)]
        asks = {each.sequence: each.ask for each in again}
        suspects = {sent[0].sequence, sent[1].sequence}
        assert asks == {
            each.sequence: wire_format.ALONE if each.sequence in suspects else wire_format.AGAIN
            for each in sent
            if each.sequence != sent[2].sequence
        }
        house.dispatcher.slot_table.states[sent[0].slot] = memory_layout.RUNNING
        second.close()
        while house.dispatcher.reachable:
            await asyncio.sleep(0)
        house.start(Scripted(), 0.001)
        return await asked

    found = with_house(work)
    failed = [each for each in found if isinstance(each, errors.EngineFailedError)]
    assert sorted(str(each) for each in failed) == [
        "2 engines died while they ran this image",
        "the engine failed while it ran this image",
    ]
    assert sum(isinstance(each, Answer) for each in found) == 8


def test_work_goes_to_the_engine_that_will_have_it_done_first() -> None:
    async def work(house: House) -> tuple[list[Answer | BaseException], int]:
        other = Scripted()
        house.start(other, 0.001, index=1)
        return await outcomes(house, 40), sum(other.sizes)

    slow = Scripted(lambda: time.sleep(0.02))
    found, by_the_other = with_house(work, slow, seconds=0.02)
    assert all(isinstance(each, Answer) for each in found)
    assert by_the_other > sum(slow.sizes)


def test_stale_messages_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def work(house: House) -> Answer:
        house.dispatcher.slot_table.publish(0, Scheduler(dict.fromkeys(range(1, 5), 0.001)))
        engine = house.connection()
        asked = asyncio.create_task(house.dispatcher.classify(IMAGE, time.monotonic() + 30, 5))
        while house.dispatcher.slot_table.count(memory_layout.WAITING) < 1:
            await asyncio.sleep(0)
        (submission,) = wire_format.unpack_submissions(engine.recv(wire_format.MAX_BYTES))[1]
        right = wire_format.Answer(submission.slot, wire_format.DONE, submission.sequence)
        for incarnation, answer in (
            (EPOCH - 1, right),
            (EPOCH, right._replace(sequence=submission.sequence - 1)),
            (EPOCH, right),
            (EPOCH, right),
        ):
            (message,) = wire_format.pack_answers(incarnation, [answer])
            engine.send(message)
        answer = await asked
        while "which is not there; it is dropped" not in caplog.text.partition("which is not there; it is dropped")[2]:
            await asyncio.sleep(0)
        engine.close()
        return answer

    assert isinstance(with_house(work), Answer)
    assert f"engine 0, epoch {EPOCH}, sent a message of epoch {EPOCH - 1}; it is dropped" in caplog.text


def test_warming_up_runs_every_batch_size() -> None:
    engine = Scripted()
    seconds = warm_up(engine, 16, patience_seconds=60)
    assert set(engine.sizes) == set(seconds) == {1, 2, 3, 4}
    assert all(each > 0 for each in seconds.values())


def test_warming_up_a_slow_engine_measures_powers_of_two_and_the_largest_and_draws_lines_between() -> None:
    engine = Scripted()
    engine.max_batch = 7
    seconds = warm_up(engine, 16, patience_seconds=0)
    assert set(engine.sizes) == {1, 2, 4, 7}
    assert list(seconds) == [1, 2, 3, 4, 5, 6, 7]
    assert seconds[3] == pytest.approx((seconds[2] + seconds[4]) / 2)
    assert seconds[5] == pytest.approx(seconds[4] + (seconds[7] - seconds[4]) / 3)
