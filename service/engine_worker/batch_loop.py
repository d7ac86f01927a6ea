"""Runs batches of what the HTTP workers send.

Whatever ends a thread ends the process: the supervisor starts another, and the HTTP workers send their images again.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Mapping

import numpy as np

from vitserve.service.engine_worker.pending import Completions, PendingRequests
from vitserve.service.engines.engine import Engine
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.connection import Connection
from vitserve.service.ipc.control_channel import BEATS, Channel, orphaned
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import Metrics
from vitserve.service.scheduler import Batch, Scheduler

log = logging.getLogger("vitserve.engine_worker")

INITIAL_SAFETY_MARGIN = 0.25  # of the promises, until it is known how well this machine keeps them
OVERDUE = 5  # times the promised seconds of a batch after which its stream is taken to hang, if that is more than hang_seconds

Work = tuple[Batch, list[int]]  # a batch, and the slots of its images


class BatchLoop:
    """Runs batches until it is retired and the last HTTP worker has let go of it.

    One thread more than streams, all alike: one of them reads what HTTP workers and supervisor say, the others run batches or stand by. When the reader
    finds a batch for a free stream, it runs that batch itself and another takes over reading: work is never handed from thread to thread.
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
        self.engine, self.slot_table, self.index, self.incarnation, self.metrics = (
            engine,
            slot_table,
            index,
            incarnation,
            metrics,
        )
        self.pending = PendingRequests(
            slot_table, index, Scheduler(seconds, engine.streams, slot_table.shape.slots, INITIAL_SAFETY_MARGIN)
        )
        self._hang_seconds = hang_seconds
        self._connections: dict[int, Connection] = {}  # by HTTP worker
        self._running: dict[int, Batch] = {}  # by stream
        self._lock = threading.Lock()  # guards the intake and the two above; never held while a batch runs
        self._reading = threading.Lock()  # held by the reader
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = (
            socket.socketpair()
        )  # for the reader, when a HTTP worker's socket did not take an answer
        self._failing = False  # in an outage of the engine, which is logged once
        self._retired = False
        self._over = False
        self._beat_at = 0.0
        slot_table.publish(index, self.pending.scheduler)

    def run(self, channel: Channel) -> None:
        """Returns when retired and no HTTP worker is connected."""
        channel.setblocking(False)
        self._channel = channel
        self._woken.setblocking(False)
        self._selector.register(channel, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        hands = [
            threading.Thread(target=self._serve, name=f"hand-{number}", daemon=True)
            for number in range(self.engine.streams + 1)
        ]
        for hand in hands:
            hand.start()
        for hand in hands:
            hand.join()
        for each in (self._selector, self._wake, self._woken):
            each.close()

    def _serve(self) -> None:
        try:
            while not self._over:
                with self._reading:
                    work = self._read_until_there_is_work()
                while work is not None:
                    work = self._run(*work)
        except BaseException:  # a thread that ended silently would leave clients waiting
            log.critical("a thread ended, and with it this process", exc_info=True)
            os._exit(os.EX_SOFTWARE)

    # -- by the reader

    def _read_until_there_is_work(self) -> Work | None:
        """None when this process is to end."""
        while True:
            with self._lock:
                work = self._next()
            if work is not None:
                return work
            if self._retired and not self._connections:
                self._over = True
            if self._over:
                return None
            self._beat()
            arrived: list[tuple[int, wire_format.Submission]] = []
            for key, events in self._selector.select(self._hang_seconds / BEATS):
                if isinstance(key.fileobj, Connection):
                    if events & selectors.EVENT_READ:
                        arrived += self._read(key.fileobj)
                    elif key.fileobj.flush():
                        self._selector.modify(key.fileobj, selectors.EVENT_READ)
                elif key.fileobj is self._channel:
                    self._obey()
                else:
                    self._watch_stuck_connections()
            if arrived:
                with self._lock:
                    answers = self.pending.submit(arrived, time.monotonic())
                self._send(answers)

    def _read(self, connection: Connection) -> list[tuple[int, wire_format.Submission]]:
        arrived: list[tuple[int, wire_format.Submission]] = []
        try:
            while (message := connection.receive()) is not None:
                incarnation, submissions = wire_format.unpack_submissions(message)
                if incarnation != connection.peer_incarnation:
                    log.error(
                        "HTTP worker %d, epoch %d, sent a message of epoch %d; it is dropped",
                        connection.peer,
                        connection.peer_incarnation,
                        incarnation,
                    )
                    continue
                arrived += [(connection.peer, each) for each in submissions]
        except EOFError:
            self._lose(connection)
            return []
        return arrived

    def _obey(self) -> None:
        while True:
            try:
                received = self._channel.receive()
            except BlockingIOError:
                return
            if received is None:
                orphaned()
                return
            message, descriptors = received
            if message["kind"] == "connect":
                self._connect(
                    message["worker"],
                    Connection(
                        socket.socket(fileno=descriptors[0]), message["worker"], message["incarnation"], self._stuck
                    ),
                )
            elif message["kind"] == "retire":
                self._retired = True

    def _connect(self, worker: int, connection: Connection) -> None:
        if worker in self._connections:  # an earlier incarnation, whose end has not been noticed yet
            self._lose(self._connections[worker])
        with self._lock:
            self._connections[worker] = connection
        self._selector.register(connection, selectors.EVENT_READ)

    def _lose(self, connection: Connection) -> None:
        self._selector.unregister(connection)
        with self._lock:
            self.pending.worker_lost(connection.peer)
            del self._connections[connection.peer]
        connection.close()

    def _beat(self) -> None:
        """Says that this process lives, or ends it where a stream hangs."""
        now = time.monotonic()
        if now < self._beat_at:
            return
        self._beat_at = now + self._hang_seconds / BEATS
        with self._lock:
            for batch in self._running.values():
                bound = max(
                    self._hang_seconds, OVERDUE * self.pending.scheduler.conservative_seconds(len(batch.requests))
                )
                if now - batch.started > bound:
                    log.critical(
                        "a batch of %d has been running for %.1f s; the bound is %.1f s",
                        len(batch.requests),
                        now - batch.started,
                        bound,
                    )
                    os._exit(os.EX_SOFTWARE)
        try:
            self._channel.send({"kind": "alive"})
        except BlockingIOError:
            return  # a supervisor that does not read will not judge either
        except OSError:
            orphaned()

    def _watch_stuck_connections(self) -> None:
        self._woken.recv(64)
        for connection in self._connections.values():
            if not connection.flush():
                self._selector.modify(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)

    # -- by a runner

    def _run(self, batch: Batch, slots: list[int]) -> Work | None:
        """Runs the batch, answers it, and returns what the stream shall run next."""
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
            answers = self.pending.complete(batch, now, failed=failure is not None)
        self._send(answers)
        self._report(batch, now, failure)
        with self._lock:
            self._running.pop(batch.stream)
            if failure is None:
                self.pending.scheduler.done(batch, now)
            else:
                self.pending.scheduler.abandon(batch, now)
            self.slot_table.publish(self.index, self.pending.scheduler)
            return self._next()

    def _next(self) -> Work | None:
        """The lock is held."""
        now = time.monotonic()
        self._send(self.pending.expire(now))
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
            if not self._failing:  # the first of an outage, not one a batch
                log.error("the engine failed to run a batch", exc_info=failure)
        self._failing = failure is not None

    # -- by both

    def _send(self, answers: Completions) -> None:
        by_worker: dict[int, list[wire_format.Completion]] = {}
        for worker, answer in answers:
            by_worker.setdefault(worker, []).append(answer)
        for worker, its in by_worker.items():
            connection = self._connections.get(worker)
            if connection is not None:
                for message in wire_format.pack_completions(self.incarnation, its):
                    connection.send(message)

    def _stuck(self, connection: Connection) -> None:
        self._wake.send(b"1")
