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
from vitserve.service.http_worker.dispatch.decoding import (
    ImageDecoder,
    OpenedImage,
    decode_into,
    open_image,
    response_error,
)
from vitserve.service.http_worker.dispatch.image_job import ImageJob, too_many_large_images
from vitserve.service.http_worker.dispatch.offered_load import DecodeWork
from vitserve.service.ipc.control_channel import METRICS_DIR
from vitserve.service.ipc.shared_memory import sort_key
from vitserve.service.settings import Settings

# Larger files are opened by decode threads: a header may be long.
_MAX_OPENED_BYTES = 65_536
# Images are decoded on the event loop if that takes about as long as waking a decode thread, a tenth of a millisecond.
# With one HTTP worker per core, decode threads would only compete with the event loops, so up to a millisecond is done
# there.
_MAX_SECONDS, _MAX_SECONDS_PER_CORE = 1e-4, 1e-3
# Images that take more than this, or more memory than a decode thread has, are large: on a decode thread, others would
# wait for them.
MAX_THREAD_SECONDS = 0.1

_OUTLIER_FACTOR = 10.0  # an image counts with at most this multiple of its estimate in the average

# job, its error or None, the work that was done, whether this is the event loop
Finished = Callable[[ImageJob, errors.ServiceError | None, DecodeWork, bool], None]


class MemoryBusyError(Exception):
    """Other large images took the memory until the deadline."""


class DecodeWorkers:
    """The decode threads and processes of an HTTP worker. All models that it serves share them."""

    def __init__(self, threads: int, worker: int, settings: Settings) -> None:
        self.pool = DecodePool(threads)
        processes = min(threads, MAX_PROCESSES)
        self.large_pool = DecodePool(processes, "decode-large", seconds=1.0)
        self.settings = settings
        directory = os.environ.get(METRICS_DIR) or tempfile.gettempdir()
        self.memory = DecodeMemory(Path(directory), worker, settings.process_memory_bytes(settings.workers))
        self._processes = [DecodeProcess() for _ in range(processes)]
        self._idle = queue.SimpleQueue[int]()
        for number in range(processes):
            self._idle.put(number)

    def decode_large(
        self, decoder: preprocess.Decoder, encoded: bytes, size: int, until: float
    ) -> tuple[Pixels, float]:
        """On a thread of the large pool: the pixels, and the seconds without the wait for memory.

        ``size``: bytes of memory. Raises ImageError, MemoryBusyError, DecodeTimeoutError or DecodeProcessError.
        """
        number = self._idle.get()  # there is one for each thread
        try:
            if not self.memory.reserve(number, size, until):
                raise MemoryBusyError
            began = time.monotonic()
            try:
                pixels = self._processes[number].decode(
                    decoder, encoded, min(until, began + self.settings.max_decode_seconds)
                )
            finally:
                self.memory.release(number)
            return pixels, time.monotonic() - began
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
        """``pixels``: of all slots, [slots, height, width, channels]."""
        self.decoder, self._workers, self._pixels, self._finished = decoder, workers, pixels, finished
        self._thread_bytes = workers.settings.thread_memory_bytes(http_workers)
        self._max_seconds_on_loop = _MAX_SECONDS_PER_CORE if http_workers >= machine.cores() else _MAX_SECONDS

    def start(self, job: ImageJob) -> None:
        """On the event loop."""
        if len(job.encoded) <= _MAX_OPENED_BYTES:
            began = time.monotonic()
            if job.image is None:
                job.image = open_image(self.decoder, job.encoded)
            if isinstance(job.image, errors.ServiceError) or job.image.seconds <= self._max_seconds_on_loop:
                self._decode(job, job.image, began, on_loop=True)
                return
            if self._start_large(job, job.image, on_loop=True):
                return
        work = partial(self._decode_on_thread, job)
        self._workers.pool.submit(_sort_key(job), 9 - job.slot.priority, work, job.received)

    def _decode_on_thread(self, job: ImageJob) -> float | None:
        began = time.monotonic()
        image = job.image
        if image is None and job.late_error(began) is None:
            image = job.image = open_image(self.decoder, job.encoded)
            if not isinstance(image, errors.ServiceError) and self._start_large(job, image, on_loop=False):
                return None
        return self._decode(job, image, began, on_loop=False)

    def _decode(
        self, job: ImageJob, image: OpenedImage | errors.ServiceError | None, began: float, on_loop: bool
    ) -> float | None:
        """Returns the seconds of decoding, None if nothing was decoded. ``image``: None for a late one."""
        error: errors.ServiceError | None = job.late_error(began)
        work = DecodeWork.NONE
        if error is None and isinstance(image, errors.ServiceError):
            error, work = image, DecodeWork.HEADER
        elif error is None:
            assert image is not None
            error, work = decode_into(self._pixels, job.slot.slot, image), DecodeWork.DECODED
        job.decode_began, job.decode_seconds = began, time.monotonic() - began
        self._finished(job, error, work, on_loop)
        return job.decode_seconds if work == DecodeWork.DECODED else None

    # -- large images

    def _start_large(self, job: ImageJob, image: OpenedImage, on_loop: bool) -> bool:
        """False if the image is not large."""
        if image.seconds <= MAX_THREAD_SECONDS and image.peak_bytes <= self._thread_bytes:
            return False
        error = self._large_error(job, image)
        if error is None:
            job.waits_as_large = True
            work, now = partial(self._decode_large, job, image), time.monotonic()
            self._workers.large_pool.submit(_sort_key(job), 9 - job.slot.priority, work, now, image.seconds)
        else:
            self._finished(job, error, DecodeWork.NONE, on_loop)
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
        # An idle pool gives ``now``: an image that finds it idle is measured, whatever earlier ones took.
        queued_until = pool.decoded_at(_sort_key(job), level, now, image.seconds)
        decoded_at = max(now + image.seconds, queued_until)
        return None if decoded_at <= deadline else too_many_large_images(decoded_at - deadline)

    def _decode_large(self, job: ImageJob, image: OpenedImage) -> float | None:
        """Returns the seconds of decoding, None if it was not completed, so that there is nothing to learn."""
        began = time.monotonic()
        error: errors.ServiceError | None = job.late_error(began)
        late_seconds = began + image.seconds - job.slot.deadline
        if late_seconds > 0 and not (job.admitted or job.abandoned):
            error = too_many_large_images(late_seconds)
        job.waits_as_large = False
        seconds: float | None = None
        if error is None:
            seconds, error = self._decode_in_process(job, image)
        job.decode_began, job.decode_seconds = time.monotonic() - (seconds or 0.0), seconds or 0.0
        self._finished(job, error, DecodeWork.NONE if seconds is None else DecodeWork.DECODED, False)
        return seconds if seconds is None else min(seconds, _OUTLIER_FACTOR * image.seconds)

    def _decode_in_process(self, job: ImageJob, image: OpenedImage) -> tuple[float | None, errors.ServiceError | None]:
        workers, deadline, began = self._workers, job.slot.deadline, time.monotonic()
        try:
            pixels, seconds = workers.decode_large(self.decoder.on_cpu, job.encoded, image.peak_bytes, deadline)
            self._pixels[job.slot.slot] = pixels
        except MemoryBusyError:
            return None, too_many_large_images(1.0)
        except DecodeTimeoutError:
            if deadline <= time.monotonic():
                return None, too_many_large_images(1.0)
            return None, errors.ImageTooComplexError(
                f"decoding the image takes more than {workers.settings.max_decode_seconds:g} s"
            )
        except Exception as error:  # otherwise the HTTP worker would exit
            return time.monotonic() - began, response_error(error)
        return seconds, None


def _sort_key(job: ImageJob) -> float:
    return sort_key(job.slot.priority, job.slot.deadline)
