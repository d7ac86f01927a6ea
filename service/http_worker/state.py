"""An HTTP worker's state: whether it is starting, ready or draining, the model it serves, the supervisor's status."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vitserve import __version__
from vitserve.model.bundle.preprocess import prepare_pillow
from vitserve.service import errors
from vitserve.service.http_worker.classifiers.heads import Heads
from vitserve.service.http_worker.dispatch.decode_stage import DecodeWorkers
from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.http_worker.dispatch.result_cache import ResultCache
from vitserve.service.http_worker.exchange.clients import Clients
from vitserve.service.http_worker.exchange.cors import Cors
from vitserve.service.http_worker.exchange.request_log import RequestLog
from vitserve.service.http_worker.explain.explainer import Explainer
from vitserve.service.http_worker.inference.body_memory import BodyMemory
from vitserve.service.http_worker.inference.request_parsing import ImageBytes
from vitserve.service.http_worker.inference.response import ResponseEncoder
from vitserve.service.http_worker.metric_buffer import MetricBuffer
from vitserve.service.http_worker.turn import Turns
from vitserve.service.ipc.child_runtime import HEARTBEATS, received_messages, send_heartbeat
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.ipc.control_messages import ConnectEngine, Drain, Reload, Reloaded, Status
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import Metrics
from vitserve.service.settings import DEFAULT_BUNDLE, Settings

if TYPE_CHECKING:
    from vitserve.service.http_worker.exchange.tracing import Tracing

log = logging.getLogger("vitserve.http_worker")


@dataclass
class State:
    settings: Settings
    channel: Channel
    stored_metrics: Metrics
    worker: int
    incarnation: int
    decode_threads: int
    draining: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    current: Dispatcher | None = field(default=None, init=False)
    status: Status = field(default_factory=Status, init=False)  # the supervisor's latest
    image_bytes: ImageBytes = field(default_factory=ImageBytes, init=False)
    body_memory: BodyMemory = field(init=False)
    # One thread: several would compete with the event loop for the interpreter lock.
    parsing_threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "parse"), init=False)
    _encoders: WeakKeyDictionary[Dispatcher, ResponseEncoder] = field(default_factory=WeakKeyDictionary, init=False)
    _use_slot_table: Callable[[SlotTable], None] | None = field(default=None, init=False)
    _generation: int = field(default=-1, init=False)
    _reloads: dict[int, asyncio.Future[Reloaded]] = field(default_factory=dict, init=False)
    _reload_ids: Iterator[int] = field(default_factory=itertools.count, init=False)

    def __post_init__(self) -> None:
        self.cors = Cors(self.settings.cors_origins)
        self.clients = Clients(self.settings)
        self.request_log = RequestLog(self.settings.request_log, self.settings.request_log_sample)
        self.tracing: Tracing | None = None
        self.explainer = Explainer(self.settings)

    def begin(self) -> None:
        """Starts to handle the supervisor's messages and to send heartbeats, on the running event loop."""
        prepare_pillow()
        if self.settings.otlp_endpoint:
            from vitserve.service.http_worker.exchange.tracing import Tracing

            self.tracing = Tracing(self.settings.otlp_endpoint, self.settings.trace_share, __version__)
        self._loop = asyncio.get_running_loop()
        self.body_memory = BodyMemory(self.settings.body_memory_bytes // max(1, self.settings.workers))
        self.turns = Turns(self._loop)
        self.metrics = MetricBuffer(self.stored_metrics, self.turns)
        self._decoders = DecodeWorkers(self.decode_threads, self.worker, self.settings)
        # Looking up labels takes longer than counting.
        self._request_counter = functools.cache(self.stored_metrics.requests.labels)
        self._request_seconds = functools.cache(self.stored_metrics.request_seconds.labels)
        self.channel.setblocking(False)
        self._loop.add_reader(self.channel.fileno(), self._handle_messages)
        self._send_heartbeats()

    def end(self) -> None:
        self._decoders.close()
        self.explainer.close()
        if self.tracing is not None:
            self.tracing.close()
        self.parsing_threads.shutdown()

    def reasons(self) -> list[str]:
        """Why the service is not ready. Empty when it is."""
        reasons = []
        if self.draining.is_set():
            reasons.append("draining: the service is stopping")
        if self.current is not None and not self.current.reachable:
            reasons.append("the engine worker exited and is being restarted")
        if self.status.failure is not None:
            reasons.append(self.status.failure)
        elif self.current is None:
            reasons.append(f"starting: {self.status.progress or 'loading, verifying and warming up the engine'}")
        return reasons

    def rejected(self) -> list[dict[str, Any]]:
        """The engines that would have been preferred to the one that serves, each with cause and reason."""
        if self.current is None:
            return []
        rejected: list[dict[str, Any]] = self.current.model_info.details["serving"]["rejected"]
        return rejected

    def serving(self) -> Dispatcher:
        """Also while draining: requests that arrive on open connections are still answered. Raises NotReadyError."""
        if self.current is None or (self.status.failure is not None and not self.current.reachable):
            raise errors.NotReadyError("; ".join(self.reasons()))
        return self.current

    def on_slot_table(self, use: Callable[[SlotTable], None]) -> None:
        """Calls ``use`` with the slot table of each model, from the current one on."""
        self._use_slot_table = use
        if self.current is not None:
            use(self.current.slot_table)

    def encoder(self, dispatcher: Dispatcher) -> ResponseEncoder:
        return self._encoders[dispatcher]

    def count_request(self, route: str, status: str, seconds: float) -> None:
        self.metrics.inc(self._request_counter(route, status))
        self.metrics.observe(self._request_seconds(route), seconds)

    async def reload(self) -> Reloaded:
        """Requests that the supervisor load the bundle again, and waits for the result."""
        reload = Reload(next(self._reload_ids))
        result: asyncio.Future[Reloaded] = self._loop.create_future()
        self._reloads[reload.id] = result
        try:
            self.channel.send(reload)
            return await result
        finally:
            del self._reloads[reload.id]

    # -- messages from and to the supervisor

    def _send_heartbeats(self) -> None:
        send_heartbeat(self.channel)
        self._loop.call_later(self.settings.hang_seconds / HEARTBEATS, self._send_heartbeats)

    def _handle_messages(self) -> None:
        for message, descriptors in received_messages(self.channel):
            match message:
                case ConnectEngine():
                    self._connect(message, *descriptors)
                case Status():
                    self.status = message
                case Reloaded():
                    if message.id in self._reloads:  # else the client has disconnected
                        self._reloads[message.id].set_result(message)
                case Drain():
                    self.draining.set()
                    self.explainer.stop()

    def _connect(self, message: ConnectEngine, slot_table: int, connection: int) -> None:
        """Connects to an engine worker. One of a newer generation replaces the model that is served."""
        if message.generation < self._generation:
            os.close(slot_table)
            os.close(connection)
            return
        if message.generation > self._generation:
            self._generation = message.generation
            self._replace_model(SlotTable(slot_table))
        os.close(slot_table)
        assert self.current is not None
        self.current.connect(message.engine, message.incarnation, socket.socket(fileno=connection))
        model = self.current.model_info
        log.info("ready: %s (version %s) on %s in %s", model.name, model.version, model.engine, model.precision)

    def _replace_model(self, slot_table: SlotTable) -> None:
        previous = self.current
        workers = slot_table.shape.workers
        self.body_memory.capacity = self.settings.body_memory_bytes // workers
        self._decoders.memory.capacity = self.settings.process_memory_bytes(workers)
        self.current = Dispatcher(
            slot_table,
            self.worker,
            self.incarnation,
            self.settings,
            self.metrics,
            self._decoders,
            self.turns,
            self._loop,
        )
        bundle, info = Path(self.settings.bundle or DEFAULT_BUNDLE), self.current.model_info
        heads = Heads(bundle, info, slot_table.shape.embedding, self.metrics)
        self._encoders[self.current] = ResponseEncoder(info, heads, self.metrics)
        if self.settings.response_cache_bytes:
            self.current.images = ResultCache(self.current, self.settings.response_cache_bytes // workers)
        if self._use_slot_table is not None:
            self._use_slot_table(slot_table)
        if previous is not None:
            self.current.offered_load.continue_from(previous.offered_load)
            previous.retire()
