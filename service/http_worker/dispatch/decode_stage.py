"""Decodes admitted images into their slots: on the event loop, on a decode thread, or in a decode process.

The header of an image gives an upper bound of the memory, and an estimate of the time, that decoding takes:

    event loop       small images, for which waking a thread would take as long as decoding
    decode thread    others
    decode process   large images: bounded in memory together, in time each, and behind others in the CPU's queue
"""

from __future__ import annotations

import os
import queue
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vitserve.model.arrays import Pixels
from vitserve.model.bundle import preprocess
from vitserve.service import errors, machine
from vitserve.service.http_worker.dispatch.decode_memory import MAX_PROCESSES, DecodeMemory
from vitserve.service.http_worker.dispatch.decode_pool import DecodePool
from vitserve.service.http_worker.dispatch.decode_process import DecodeProcess, DecodeTimeoutError
from vitserve.service.http_worker.dispatch.decoding import ImageDecoder, OpenedImage, decode_into, open_image
from vitserve.service.http_worker.dispatch.image_job import ImageJob, too_many_large_images
from vitserve.service.ipc.control_channel import METRICS_DIR
from vitserve.service.ipc.shared_memory import sort_key
from vitserve.service.settings import THREAD_BYTES, Settings

# Larger files are opened by decode threads: a header may be long.
_MAX_OPENED_BYTES = 65_536
# Images are decoded on the event loop if that takes about as long as waking a decode thread, a tenth of a millisecond.
# With one HTTP worker per core, decode threads would only compete with the event loops, so up to a millisecond is done
# there.
_MAX_SECONDS, _MAX_SECONDS_PER_CORE = 1e-4, 1e-3
# Images that take more than this, or more than THREAD_BYTES, are large: on a decode thread, others would wait for them.
MAX_THREAD_SECONDS = 0.1

# job, its error or None, whether it was decoded, whether this is the event loop
Finished = Callable[[ImageJob, errors.ServiceError | None, bool, bool], None]


class MemoryBusyError(Exception):
    """Other large images took the memory until the deadline."""


class DecodeWorkers:
    """The decode threads and processes of an HTTP worker. All models that it serves share them."""

    def __init__(self, threads: int, worker: int, settings: Settings) -> None:
        self.pool = DecodePool(threads)
        processes = min(threads, MAX_PROCESSES)
        self.large_pool = DecodePool(processes, "decode-large", seconds=1.0)
        self.max_seconds = settings.max_decode_seconds
        directory = os.environ.get(METRICS_DIR) or tempfile.gettempdir()
        self.memory = DecodeMemory(Path(directory), worker, settings.decode_memory_bytes)
        self._processes = [DecodeProcess() for _ in range(processes)]
        self._idle = queue.SimpleQueue[int]()
        for number in range(processes):
            self._idle.put(number)

    def decode_large(self, decoder: preprocess.Decoder, encoded: bytes, size: int, until: float) -> Pixels:
        """On a thread of the large pool. ``size``: bytes of memory.

        Raises ImageError, MemoryBusyError or DecodeTimeoutError.
        """
        number = self._idle.get()  # there is one for each thread
        try:
            if not self.memory.reserve(number, size, until):
                raise MemoryBusyError
            try:
                return self._processes[number].decode(decoder, encoded, min(until, time.monotonic() + self.max_seconds))
            finally:
                self.memory.release(number)
        finally:
            self._idle.put(number)

    def close(self) -> None:
        """Waits for the images that are queued."""
        self.pool.close()
        self.large_pool.close()
        for process in self._processes:
            process.close()
        self.memory.close()


class DecodeStage:
    """Of one model."""

    def __init__(
        self, decoder: ImageDecoder, workers: DecodeWorkers, pixels: Pixels, http_workers: int, finished: Finished
    ) -> None:
        """``pixels``: of all slots, [slots, image size, image size, 3]."""
        self.decoder, self._workers, self._pixels, self._finished = decoder, workers, pixels, finished
        self._max_seconds_on_loop = _MAX_SECONDS_PER_CORE if http_workers >= machine.cores() else _MAX_SECONDS

    def start(self, job: ImageJob) -> None:
        """On the event loop."""
        if len(job.encoded) <= _MAX_OPENED_BYTES:
            job.image = open_image(self.decoder, job.encoded)
            if isinstance(job.image, errors.ServiceError) or job.image.seconds <= self._max_seconds_on_loop:
                self._decode(job, job.image, on_loop=True)
                return
            if self._start_large(job, job.image, on_loop=True):
                return
        work = partial(self._decode_on_thread, job)
        self._workers.pool.submit(_sort_key(job), 9 - job.slot.priority, work, job.received)

    def _decode_on_thread(self, job: ImageJob) -> float | None:
        image = job.image
        if image is None and job.late_error(time.monotonic()) is None:
            image = job.image = open_image(self.decoder, job.encoded)
            if not isinstance(image, errors.ServiceError) and self._start_large(job, image, on_loop=False):
                return None
        return self._decode(job, image, on_loop=False)

    def _decode(self, job: ImageJob, image: OpenedImage | errors.ServiceError | None, on_loop: bool) -> float | None:
        """Returns the seconds of decoding, None if the image was not decoded. ``image``: None for a late one."""
        began = time.monotonic()
        error: errors.ServiceError | None = job.late_error(began)
        decoded = error is None
        if decoded:
            assert image is not None
            error = decode_into(self._pixels, job.slot.slot, image)
        job.decode_seconds = time.monotonic() - began
        self._finished(job, error, decoded, on_loop)
        return job.decode_seconds if decoded else None

    # -- large images

    def _start_large(self, job: ImageJob, image: OpenedImage, on_loop: bool) -> bool:
        """False if the image is not large."""
        if image.seconds <= MAX_THREAD_SECONDS and image.peak_bytes <= THREAD_BYTES:
            return False
        error = self._large_error(job, image)
        if error is None:
            job.waits_as_large = True
            work, now = partial(self._decode_large, job, image), time.monotonic()
            self._workers.large_pool.submit(_sort_key(job), 9 - job.slot.priority, work, now, image.seconds)
        else:
            self._finished(job, error, False, on_loop)
        return True

    def _large_error(self, job: ImageJob, image: OpenedImage) -> errors.ServiceError | None:
        """Why the image is rejected before it is decoded."""
        if image.peak_bytes > self._workers.memory.capacity:
            return errors.ImageTooLargeError(
                f"decoding the image takes up to {image.peak_bytes:,} bytes;"
                f" the limit for all images is {self._workers.memory.capacity:,}"
            )
        if job.admitted:
            return None
        now, deadline = time.monotonic(), job.slot.deadline
        pool, level = self._workers.large_pool, 9 - job.slot.priority
        queued_until = pool.decoded_at(_sort_key(job), level, now, image.seconds)
        decoded_at = max(now + self._expected_seconds(image), queued_until)
        return None if decoded_at <= deadline else too_many_large_images(decoded_at - deadline)

    def _decode_large(self, job: ImageJob, image: OpenedImage) -> float | None:
        began = time.monotonic()
        error: errors.ServiceError | None = job.late_error(began)
        late_seconds = began + self._expected_seconds(image) - job.slot.deadline
        if late_seconds > 0 and not (job.admitted or job.abandoned):
            error = too_many_large_images(late_seconds)
        job.waits_as_large = False
        if decoded := error is None:
            error = self._decode_in_process(job, image.peak_bytes)
        job.decode_seconds = time.monotonic() - began
        self._finished(job, error, decoded, False)
        return job.decode_seconds if decoded else None

    def _expected_seconds(self, image: OpenedImage) -> float:
        return image.seconds * max(1.0, self._workers.large_pool.seconds)

    def _decode_in_process(self, job: ImageJob, size: int) -> errors.ServiceError | None:
        workers, deadline = self._workers, job.slot.deadline
        try:
            self._pixels[job.slot.slot] = workers.decode_large(self.decoder.on_cpu, job.encoded, size, deadline)
        except preprocess.ImageError as error:
            return errors.from_image_error(error)
        except MemoryBusyError:
            return too_many_large_images(1.0)
        except DecodeTimeoutError:
            if deadline <= time.monotonic():
                return too_many_large_images(1.0)
            return errors.ImageTooComplexError(f"decoding the image takes more than {workers.max_seconds:g} s")
        return None


def _sort_key(job: ImageJob) -> float:
    return sort_key(job.slot.priority, job.slot.deadline)
