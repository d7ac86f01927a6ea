"""Large images are decoded in processes: bounded in time and memory, and without delaying others."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support.dispatching import FakeEngine, Harness, run_dispatcher
from tests.support.http import classify, metric
from tests.support.images import encoded, random_image
from tests.support.processes import HTTP_WORKER, has_exited, kill, serving
from tests.support.waiting import eventually, eventually_async
from vitserve.model.bundle.preprocess import DamagedImageError, Decoder, NotAnImageError, Preprocessing
from vitserve.service import errors
from vitserve.service.http_worker.dispatch.decode_memory import DecodeMemory
from vitserve.service.http_worker.dispatch.decode_process import (
    DecodeProcess,
    DecodeProcessError,
    DecodeTimeoutError,
)
from vitserve.service.http_worker.dispatch.image_job import ImageResult

DECODER = Decoder(Preprocessing(32, 0.9))
SMALL = encoded(random_image(40, 30))
LARGE = encoded(Image.new("RGBA", (3000, 3000), (10, 200, 30, 128)), compress_level=1)
DECODE_PROCESS = "vitserve.service.http_worker.dispatch.decode_process_main"


def later(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def process() -> Iterator[DecodeProcess]:
    process = DecodeProcess()
    yield process
    process.close()


def waiting_bytes(process: DecodeProcess) -> int:
    """Bytes that were sent to the process and not read by it (ioctl SIOCOUTQ, unix(7))."""
    connection = process.process.connection
    assert connection is not None
    size = bytearray(4)
    fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, size)
    return int.from_bytes(size, sys.byteorder)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        kill(pid, signal.SIGCONT)


def test_a_process_gives_the_pixels_and_the_errors_of_the_decoder(process: DecodeProcess) -> None:
    for image in (SMALL, LARGE):
        assert np.array_equal(process.decode(DECODER, image, later()), DECODER.decode(image))
    for broken in (LARGE[:-2000], b"no image"):
        with pytest.raises((DamagedImageError, NotAnImageError)) as expected:
            DECODER.decode(broken)
        with pytest.raises(expected.type, match=str(expected.value)[:20]):
            process.decode(DECODER, broken, later())


def test_a_process_that_takes_too_long_is_killed_and_replaced(process: DecodeProcess) -> None:
    process.decode(DECODER, SMALL, later())
    pid = process.pid
    assert pid is not None
    with stopped(pid), pytest.raises(DecodeTimeoutError):
        process.decode(DECODER, SMALL, later(0.05))
    assert has_exited(pid)
    assert process.decode(DECODER, SMALL, later()).shape == (32, 32, 3)


def test_a_process_that_ends_rejects_its_image_only(process: DecodeProcess) -> None:
    process.decode(DECODER, SMALL, later())
    pid = process.pid
    assert pid is not None
    with stopped(pid), ThreadPoolExecutor() as pool:
        decoding = pool.submit(process.decode, DECODER, LARGE, later())
        eventually(lambda: waiting_bytes(process) > 0, "the image is sent")
        kill(pid)
        with pytest.raises(DamagedImageError, match="SIGKILL"):
            decoding.result()
    assert process.decode(DECODER, SMALL, later()).shape == (32, 32, 3)


def test_an_idle_process_that_has_exited_is_replaced_without_an_error(process: DecodeProcess) -> None:
    process.decode(DECODER, SMALL, later())
    assert process.pid is not None
    kill(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie's other threads may still hold its socket
    assert process.decode(DECODER, SMALL, later()).shape == (32, 32, 3)


def test_a_process_that_cannot_be_started_is_no_damaged_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(24, "Too many open files")

    process = DecodeProcess()
    monkeypatch.setattr("vitserve.service.http_worker.dispatch.decode_process.subprocess.Popen", fail)
    with pytest.raises(DecodeProcessError, match="Too many open files"):
        process.decode(DECODER, SMALL, later())
    monkeypatch.undo()
    assert process.decode(DECODER, SMALL, later()).shape == (32, 32, 3)
    process.close()


def test_a_process_that_starts_slowly_is_kept_for_the_next_image(process: DecodeProcess) -> None:
    with pytest.raises(DecodeTimeoutError):
        process.decode(DECODER, SMALL, later(0.0))
    pid = process.pid
    assert process.decode(DECODER, SMALL, later()).shape == (32, 32, 3)
    assert process.pid == pid


@pytest.mark.parametrize("failure", [DecodeProcessError("none"), OSError(24, "Too many open files")])
def test_a_failure_beside_the_image_is_an_internal_error(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The HTTP worker does not exit, and the next image is decoded."""

    async def work(harness: Harness) -> tuple[object, object]:
        workers = harness.dispatcher.decoders
        with monkeypatch.context() as patch:
            patch.setattr(workers, "decode_large", raising(failure))
            (failed,) = await harness.classify_all([LARGE])
        (decoded,) = await harness.classify_all([LARGE])
        return failed, decoded

    failed, decoded = run_dispatcher(work, FakeEngine())
    assert isinstance(failed, errors.ServiceError)
    assert (failed.status, failed.code) == (500, "internal")
    assert isinstance(decoded, ImageResult)
    assert "unexpected error while decoding an image" in caplog.text


def test_slow_images_do_not_cause_rejections_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow they were, and however long they waited for memory, an image that finds an idle pool is measured."""

    async def work(harness: Harness) -> tuple[float, object]:
        pool = harness.dispatcher.decoders.large_pool
        for _ in range(30):
            pool.submit(0.0, 4, lambda: 1e6, time.monotonic(), 0.5)
        await eventually_async(lambda: pool.decoded_at(0.0, 4, 5.0) == 5.0, "the pool is idle")
        slow = pool.seconds
        (result,) = await harness.classify_all([LARGE])
        return slow, result

    slow, result = run_dispatcher(work, FakeEngine())
    assert slow > 1e3
    assert isinstance(result, ImageResult)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_processes_of_all_workers_share_the_memory(tmp_path: Path) -> None:
    """Each holds its share for a moment; their sum never exceeds the capacity."""
    capacity, held, most, lock = 100, [0], [0], threading.Lock()
    memories = [DecodeMemory(tmp_path, worker, capacity) for worker in range(3)]

    def use(number: int) -> None:
        memory, process, size = memories[number % 3], number // 3, 20 + 9 * number
        for _ in range(20):
            assert memory.reserve(process, size, later())
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            with lock:
                held[0] -= size
            memory.release(process)

    with ThreadPoolExecutor(9) as pool:
        list(pool.map(use, range(9)))
    assert 0 < most[0] <= capacity
    assert memories[0].reserve(0, capacity, later())
    assert not memories[1].reserve(0, 1, time.monotonic()), "all of it is taken"
    DecodeMemory(tmp_path, 0, capacity).close()  # the successor of a worker that was killed
    assert memories[1].reserve(0, capacity, later())
    for memory in memories:
        memory.close()


def test_large_images_are_served_and_do_not_outlive_their_worker() -> None:
    with serving("--decode-threads", "1") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        small = classify(client, SMALL).json()["results"]
        assert classify(client, LARGE).json()["results"][0]["predictions"]
        children = psutil.Process(server.pids(HTTP_WORKER)[0]).children()
        assert [child.cmdline()[3] for child in children] == [DECODE_PROCESS]
        assert children[0].nice() > 0
        assert Path(f"/proc/{children[0].pid}/oom_score_adj").read_text().strip() == "1000"
        with stopped(children[0].pid):  # as long as a decoder that does not end
            late = client.post("/v1/classify?timeout_ms=2500", content=LARGE)
            assert (late.status_code, late.json()["code"]) == (429, "overloaded")
            assert classify(client, SMALL).json()["results"] == small
        assert metric(client, "vitserve_images_shed_total", reason="large") == 1
        assert classify(client, LARGE).status_code == 200
        child = psutil.Process(server.pids(HTTP_WORKER)[0]).children()[0].pid
        kill(server.pids(HTTP_WORKER)[0])
        eventually(lambda: has_exited(child), "the decode process has exited")


def test_the_limits_of_large_images_are_reported() -> None:
    """Of the memory for images, a quarter is for bodies, and half of the rest for the decode thread."""
    memory = str(64 * 2**20)
    limits = "--decode-threads", "1", "--image-memory-bytes", memory, "--max-decode-seconds", "0.001"
    with serving(*limits) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        response = classify(client, LARGE)
        assert (response.status_code, response.json()["code"]) == (413, "image_too_large")
        assert "bytes" in response.json()["detail"]
        slow = encoded(Image.new("L", (4000, 3500)), "TIFF", compression="tiff_lzw")
        response = classify(client, slow)
        assert (response.status_code, response.json()["code"]) == (422, "image_too_complex"), response.text
        assert classify(client, SMALL).status_code == 200
