"""The decode threads of an HTTP worker."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable

from vitserve.service.decode_queue import DecodeQueue

log = logging.getLogger(__name__)

Work = Callable[[], float | None]  # returns the seconds of decoding, or None if the image was not decoded


class DecodePool:
    """Threads that decode the most urgent image first. All models that this HTTP worker serves share them."""

    def __init__(self, threads: int, name: str = "decode", seconds: float = 0.0) -> None:
        """``seconds``: the first estimate of the time that one unit of work takes."""
        self._queue = DecodeQueue[tuple[Work, float]](threads, seconds)
        self._lock = threading.Lock()  # guards the queue
        self._wake = queue.SimpleQueue[bool]()  # an item for each waiting image; False ends a thread
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, sort_key: float, priority_level: int, work: Work, now: float, amount: float = 1.0) -> None:
        """``amount``: of work, see DecodeQueue.push()."""
        with self._lock:
            self._queue.push(sort_key, priority_level, (work, amount), now, amount)
        self._wake.put(True)

    def decoded_at(self, sort_key: float, priority_level: int, now: float, amount: float = 1.0) -> float:
        """When a new image would be decoded: see DecodeQueue.decoded_at()."""
        with self._lock:
            return self._queue.decoded_at(sort_key, priority_level, now, amount)

    @property
    def seconds(self) -> float:
        """Moving average of the time that one unit of work takes."""
        return self._queue.seconds

    def close(self) -> None:
        """Waits for the images that are queued."""
        for _ in self._threads:
            self._wake.put(False)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        try:
            while self._wake.get():
                with self._lock:
                    work, amount = self._queue.pop()
                seconds = work()
                with self._lock:
                    self._queue.done(seconds, amount)
        except BaseException:  # if only this thread ended, clients would wait until their deadlines
            log.critical("unexpected error in a decode thread; exiting", exc_info=True)
            os._exit(os.EX_SOFTWARE)
