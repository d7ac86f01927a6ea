"""A HTTP worker's life: starting → ready → draining, the model it serves now, and the reasons it gives."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from vitserve.model.bundle.preprocess import prepare_pillow
from vitserve.service import errors
from vitserve.service.http_worker.dispatcher import Dispatcher
from vitserve.service.http_worker.gpu_gauges import gpu_gauges
from vitserve.service.http_worker.offered_load import Rates, saturation
from vitserve.service.ipc import memory_layout
from vitserve.service.ipc.control_channel import BEATS, Channel, Message, orphaned
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import Exposition, Metrics
from vitserve.service.settings import Settings

log = logging.getLogger("vitserve.http_worker")


@dataclass
class State:
    settings: Settings
    channel: Channel
    metrics: Metrics
    worker: int
    incarnation: int
    decode_threads: int
    draining: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    current: Dispatcher | None = field(default=None, init=False)
    _generation: int = field(default=-1, init=False)
    _said: Message = field(default_factory=dict, init=False)  # the supervisor's last status
    _reloads: dict[int, asyncio.Future[Message]] = field(default_factory=dict, init=False)
    _ids: Iterator[int] = field(default_factory=itertools.count, init=False)

    def begin(self) -> None:
        """On the event loop: listens to the supervisor, and tells it that this HTTP worker lives."""
        prepare_pillow()
        self._loop = asyncio.get_running_loop()
        self._decoders = ThreadPoolExecutor(self.decode_threads, "decode")
        self._exposition = Exposition(self._gauges, self.metrics)
        self.channel.setblocking(False)
        self._loop.add_reader(self.channel.fileno(), self._obey)
        self._beat()

    def end(self) -> None:
        self._decoders.shutdown(wait=True)

    def reasons(self) -> list[str]:
        """Why the service cannot answer well now; empty when it can."""
        reasons = []
        if self.draining.is_set():
            reasons.append("draining: the service is stopping")
        if self.current is not None and not self.current.reachable:
            reasons.append("the engine died and is being restarted")
        if self._said.get("failure") is not None:
            reasons.append(self._said["failure"])
        elif self.current is None:
            reasons.append(
                f"starting: {self._said.get('progress') or 'the engine is being opened, warmed up and proven'}"
            )
        return reasons

    def rejected(self) -> list[dict[str, Any]]:
        """The faster engines that are not the one that serves, each with cause and reason."""
        if self.current is None:
            return []
        rejected: list[dict[str, Any]] = self.current.model_info.details["serving"]["rejected"]
        return rejected

    def serving(self) -> Dispatcher:
        """While draining too: what still arrives on an open connection is admitted and answered. Raises NotReady."""
        if self.current is None or (self._said.get("failure") is not None and not self.current.reachable):
            raise errors.NotReadyError("; ".join(self.reasons()))
        return self.current

    async def reload(self) -> Message:
        """Has the supervisor open the bundle again; returns what came of it when it is known."""
        asked = next(self._ids)
        answer: asyncio.Future[Message] = self._loop.create_future()
        self._reloads[asked] = answer
        try:
            self.channel.send({"kind": "reload", "id": asked})
            return await answer
        finally:
            del self._reloads[asked]

    def exposition(self) -> bytes:
        return self._exposition.text()

    # -- what the supervisor says

    def _beat(self) -> None:
        try:
            self.channel.send({"kind": "alive"})
        except BlockingIOError:
            pass  # a supervisor that does not read will not judge either
        except OSError:
            orphaned()
        self._loop.call_later(self.settings.hang_seconds / BEATS, self._beat)

    def _obey(self) -> None:
        while True:
            try:
                received = self.channel.receive()
            except BlockingIOError:
                return
            if received is None:
                orphaned()
                return
            message, descriptors = received
            match message["kind"]:
                case "connect":
                    self._connect(message, *descriptors)
                case "status":
                    self._said = message
                case "reloaded":
                    if message["id"] in self._reloads:  # else its client has left
                        self._reloads[message["id"]].set_result(message)
                case "drain":
                    self.draining.set()

    def _connect(self, message: dict[str, Any], slot_table: int, connection: int) -> None:
        """An engine is there. If it is of a newer model than the one served, that one is served from now on."""
        if message["generation"] < self._generation:  # its slots are not those of the model served now
            os.close(slot_table)
            os.close(connection)
            return
        if message["generation"] > self._generation:
            before, self._generation = self.current, message["generation"]
            self.current = Dispatcher(
                SlotTable(slot_table),
                self.worker,
                self.incarnation,
                self.settings,
                self.metrics,
                self._decoders,
                self._loop,
            )
            if before is not None:
                self.current.offered_load.continue_from(before.offered_load)
                before.retire()
        os.close(slot_table)
        assert self.current is not None
        self.current.connect(message["engine"], message["incarnation"], socket.socket(fileno=connection))
        model_info = self.current.model_info
        log.info(
            "ready: %s %s on %s in %s", model_info.name, model_info.version, model_info.engine, model_info.precision
        )

    def _gauges(self) -> Iterable[Metric]:
        ready = GaugeMetricFamily("vitserve_ready", "1 when the service can answer well now.")
        ready.add_metric([], float(not self.reasons()))
        queue = GaugeMetricFamily("vitserve_queue_length", "Decoded images that wait for a stream.")
        flight = GaugeMetricFamily("vitserve_images_in_flight", "Images that hold a slot.")
        capacity = GaugeMetricFamily(
            "vitserve_stage_capacity",
            "Seconds of work that a stage can do in a second: decode threads, streams of engines.",
            labels=["stage"],
        )
        saturated = GaugeMetricFamily(
            "vitserve_saturation",
            "Work asked for, admitted or shed, over what can be done, of the stage where that is most.",
        )
        model = GaugeMetricFamily(
            "vitserve_model_info", "Which model is served, by what.", labels=["name", "version", "engine", "precision"]
        )
        if self.current is not None:
            slot_table, model_info = self.current.slot_table, self.current.model_info
            queue.add_metric([], slot_table.count(memory_layout.WAITING))
            flight.add_metric([], slot_table.count(memory_layout.HELD, memory_layout.WAITING, memory_layout.RUNNING))
            can = Rates(self.decode_threads * self.settings.workers, self.current.streams)
            capacity.add_metric(["decode"], can.decode)
            capacity.add_metric(["inference"], can.inference)
            # While no engine is there, one is being started: as if it were there already, for nobody is helped by more replicas that restart theirs.
            saturated.add_metric(
                [],
                saturation(
                    self.current.offered_load.rates(), can._replace(inference=can.inference or slot_table.shape.streams)
                ),
            )
            model.add_metric([model_info.name, model_info.version, model_info.engine, model_info.precision], 1)
        rejected = GaugeMetricFamily(
            "vitserve_engine_rejected",
            "1 for each faster engine that does not serve, by cause.",
            labels=["engine", "precision", "cause"],
        )
        for each in self.rejected():
            rejected.add_metric([each["engine"], each["precision"], each["cause"]], 1)
        restarts = CounterMetricFamily(
            "vitserve_restarts", "Processes that died and were replaced.", labels=["process", "cause"]
        )
        for process, causes in self._said.get("restarts", {}).items():
            for cause, count in causes.items():
                restarts.add_metric([process, cause], count)
        reloads = CounterMetricFamily("vitserve_reloads", "Reloads of the bundle by result.", labels=["result"])
        for result, count in self._said.get("reloads", {}).items():
            reloads.add_metric([result], count)
        return ready, queue, flight, capacity, saturated, model, rejected, restarts, reloads, *gpu_gauges()
