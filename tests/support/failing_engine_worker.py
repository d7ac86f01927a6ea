"""An engine worker's batch loop with one submitted image, whose engine fails in the way named on the command line.

python -m tests.support.failing_engine_worker hang | exit | "device lost"
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.service.engine_worker.batch_loop import BatchLoop
from vitserve.service.engines.engine import DeviceLostError
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.ipc.control_messages import ConnectWorker
from vitserve.service.ipc.memory_layout import Shape
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.ipc.slots import Slots
from vitserve.service.metrics import Metrics

MODEL = ModelInfo("failing", "1", "0" * 64, ("red", "green", "blue"), Preprocessing(16), "failing", "fp32", {})


class FailingEngine:
    name, streams, max_batch = "failing", 1, 4
    precision: Precision = "fp32"

    def __init__(self, fail: Callable[[], None]) -> None:
        self._fail = fail

    def share(self, pixels: Pixels) -> None:
        pass

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        self._fail()
        raise AssertionError("the engine did not fail")

    def close(self) -> None:
        pass


def hang() -> None:
    time.sleep(60)


def lose_device() -> None:
    raise DeviceLostError("an illegal address")


def main() -> None:
    logging.basicConfig()
    fail: Callable[[], None] = {"hang": hang, "exit": sys.exit, "device lost": lose_device}[sys.argv[1]]
    memory = memory_layout.create(Shape(1, 8, 1, 1, 4, 16, 3), MODEL.to_json())
    seconds = dict.fromkeys(range(1, 5), 0.001)
    metrics = Metrics(CollectorRegistry())
    loop = BatchLoop(FailingEngine(fail), SlotTable(memory), 0, 7, seconds, metrics, hang_seconds=0.2)
    supervisor, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    http_worker, connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    Channel(supervisor).send(ConnectWorker(worker=0, incarnation=1), [connection.fileno()])
    slots = Slots(SlotTable(memory), 0, 1)
    ticket = slots.take(time.monotonic() + 60, 5)
    assert ticket is not None
    slots.submit(ticket, 0)
    submission = wire_format.Submission(ticket.slot, wire_format.SUBMIT, 5, ticket.sequence, ticket.deadline)
    http_worker.send(next(iter(wire_format.pack_submissions(1, [submission]))))
    loop.run(Channel(channel))


if __name__ == "__main__":
    main()
