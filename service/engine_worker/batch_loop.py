"""Runs batches of the images that the HTTP workers submit.

An exception that ends a thread ends the process. The supervisor starts another, and the HTTP workers submit their
images again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping

import numpy as np

from vitserve.service.engine_worker.pending import PendingRequests
from vitserve.service.engine_worker.worker_connections import WorkerConnections
from vitserve.service.engines.engine import Engine
from vitserve.service.ipc.child_runtime import HEARTBEATS, received_messages, send_heartbeat
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.ipc.control_messages import ConnectWorker, Retire
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import Metrics
from vitserve.service.scheduler import Batch, Scheduler

log = logging.getLogger("vitserve.engine_worker")

INITIAL_SAFETY_MARGIN = 0.25  # of the completion estimates, until their error on this machine is known
SHORT_BATCH_SECONDS = 0.001  # messages may wait so long while their reader runs a batch
OVERDUE = 5  # a stream hangs when its batch takes this many times its estimate and longer than hang_seconds

Work = tuple[Batch, list[int]]  # a batch, and the slots of its images


class BatchLoop:
    """Runs batches until it is retired and the last HTTP worker has disconnected.

    There is one thread more than streams, and all are alike. One of them reads messages; the others run batches or
    are idle. When the reader has a batch for a free stream, it runs that batch itself, and another thread becomes the
    reader. Work is never handed from thread to thread, so a batch starts without a thread switch. If the batch is short
    and there is one stream, the reader remains the reader: waking another thread would take longer than the batch.
    """

    def __init__(
        self,
        engine: Engine,
        slot_table: SlotTable,
        index: int,
        incarnation: int,
        seconds: Mapping[int, float],
        metrics: Metrics,
        hang_seconds: float,
    ) -> None:
        """``seconds`` is the measured duration of a batch by its size, from warm_up()."""
        self.engine, self.slot_table, self.index, self.incarnation = engine, slot_table, index, incarnation
        self.metrics = metrics
        self.pending = PendingRequests(
            slot_table, index, Scheduler(seconds, engine.streams, slot_table.shape.slots, INITIAL_SAFETY_MARGIN)
        )
        self._hang_seconds = hang_seconds
        self._running: dict[int, Batch] = {}  # by stream
        self._lock = threading.Lock()  # guards pending and _running; never held while a batch runs
        self._reading = threading.Lock()  # held by the reader
        self._outage = False  # the last batch failed, which has been logged
        self._retired = False
        self._finished = False
        self._next_heartbeat = 0.0
        slot_table.publish(index, self.pending.scheduler)

    def run(self, channel: Channel) -> None:
        """Returns when retired and no HTTP worker is connected."""
        channel.setblocking(False)
        self._channel = channel
        self._connections = WorkerConnections(channel, self.incarnation, self._handle_disconnect)
        runners = [
            threading.Thread(target=self._run_thread, name=f"runner-{number}", daemon=True)
            for number in range(self.engine.streams + 1)
        ]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
        self._connections.close()

    def _run_thread(self) -> None:
        try:
            while not self._finished:
                with self._reading:
                    work = self._read_until_work()
                    while work is not None and self._is_short(work[0]):
                        self._run(*work)
                        self._check_streams_and_send_heartbeat()
                        self._read(0.0)
                        work = self._read_until_work()
                while work is not None:
                    self._run(*work)
                    with self._lock:
                        work = self._next_work()
        except BaseException:  # if only this thread ended, clients would wait forever
            log.critical("unexpected error in a runner thread; exiting", exc_info=True)
            os._exit(os.EX_SOFTWARE)

    # -- the reader

    def _read_until_work(self) -> Work | None:
        """None when the process has to exit."""
        while True:
            with self._lock:
                work = self._next_work()
            if work is not None:
                return work
            if self._retired and not self._connections:
                self._finished = True
            if self._finished:
                return None
            self._check_streams_and_send_heartbeat()
            self._read(self._hang_seconds / HEARTBEATS)

    def _read(self, timeout_seconds: float) -> None:
        """Handles the messages that have arrived. Waits for the first one."""
        submissions, control = self._connections.receive(timeout_seconds)
        if control:
            self._handle_control_messages()
        if submissions:
            with self._lock:
                completions = self.pending.submit(submissions, time.monotonic())
            self._connections.send(completions)

    def _is_short(self, batch: Batch) -> bool:
        if self.engine.streams > 1:
            return False
        with self._lock:
            return self.pending.scheduler.estimated_seconds(len(batch.requests)) < SHORT_BATCH_SECONDS

    def _handle_control_messages(self) -> None:
        for message, descriptors in received_messages(self._channel):
            match message:
                case ConnectWorker():
                    self._connections.connect(message.worker, message.incarnation, descriptors[0])
                case Retire():
                    self._retired = True

    def _handle_disconnect(self, worker: int) -> None:
        with self._lock:
            self.pending.worker_lost(worker)

    def _check_streams_and_send_heartbeat(self) -> None:
        """Exits the process if a stream hangs."""
        now = time.monotonic()
        if now < self._next_heartbeat:
            return
        self._next_heartbeat = now + self._hang_seconds / HEARTBEATS
        with self._lock:
            for batch in self._running.values():
                size, seconds = len(batch.requests), now - batch.started
                limit = max(self._hang_seconds, OVERDUE * self.pending.scheduler.conservative_seconds(size))
                if seconds > limit:
                    log.critical("a batch of %d has been running for %.1f s; the limit is %.1f s", size, seconds, limit)
                    os._exit(os.EX_SOFTWARE)
        send_heartbeat(self._channel)

    # -- a runner

    def _run(self, batch: Batch, slots: list[int]) -> None:
        """Runs the batch and sends the completions."""
        failure = None
        try:
            outputs = self.engine.run(batch.stream, self.slot_table.pixels, slots)
            if not np.isfinite(outputs.logits).all():
                raise FloatingPointError("the engine's logits are not finite")
        except Exception as error:
            failure = error
        now = time.monotonic()
        with self._lock:
            if failure is None:
                for row, image in self.pending.wanted(batch):
                    self.slot_table.logits[image.slot] = outputs.logits[row]
                    if image.embedding:
                        self.slot_table.embeddings[image.slot] = outputs.embedding[row]
            completions = self.pending.complete(batch, now, failed=failure is not None)
        self._connections.send(completions)
        self._report(batch, now, failure)
        with self._lock:
            self._running.pop(batch.stream)
            if failure is None:
                self.pending.scheduler.done(batch, now)
            else:
                self.pending.scheduler.abandon(batch, now)
            self.slot_table.publish(self.index, self.pending.scheduler)

    def _next_work(self) -> Work | None:
        """The lock is held."""
        now = time.monotonic()
        self._connections.send(self.pending.expire(now))
        for stream in range(self.engine.streams):
            if stream not in self._running and (work := self.pending.next_batch(stream, now)) is not None:
                self._running[stream] = work[0]
                self.slot_table.publish(self.index, self.pending.scheduler)
                return work
        return None

    def _report(self, batch: Batch, now: float, failure: Exception | None) -> None:
        self.metrics.inference_seconds.observe(now - batch.started)
        self.metrics.batch_size.observe(len(batch.requests))
        if failure is not None:
            self.metrics.engine_failures.inc()
            if not self._outage:  # log the first failure of an outage only
                log.error("the engine failed to run a batch", exc_info=failure)
        self._outage = failure is not None
