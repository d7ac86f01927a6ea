"""The process that owns a device: it loads and verifies an engine, then runs batches for the HTTP workers.

python -m vitserve.service.engine_worker.main <file descriptor of the control channel>
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

from vitserve.service.engine_worker.batch_loop import BatchLoop
from vitserve.service.engine_worker.startup import (
    BundleRejectedError,
    Progress,
    create_slot_table,
    describe,
    is_light,
    open_model,
    startup_hints,
)
from vitserve.service.engines.selection import build_missing
from vitserve.service.ipc.child_runtime import start_child
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.ipc.control_messages import Built, Message, Opened, Rejected, StartEngineWorker
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import in_files

log = logging.getLogger("vitserve.engine_worker")

# HTTP workers get a core first when both need it: the images that they decode make the next batch larger, and a
# rejection is sent without delay.
NICENESS = 5
_PR_SET_PDEATHSIG = 1


def main() -> None:
    began = time.monotonic()
    channel, start, descriptors = start_child(StartEngineWorker)
    _exit_with_the_supervisor()
    os.nice(NICENESS)
    try:
        loop, created, build = _open(start, descriptors, channel)
    except BundleRejectedError as error:
        channel.send(Rejected(error.result, str(error)[:10_000]))
        return
    loop.slot_table.publish_start(loop.index, time.monotonic() - began)
    channel.send(Opened(loop.slot_table.shape.workers), created)
    gc.freeze()  # as in the HTTP worker's main.py
    threading.Thread(target=_build, args=(build, channel), name="builder", daemon=True).start()
    loop.run(channel)
    loop.engine.close()


def _open(
    start: StartEngineWorker, descriptors: list[int], channel: Channel
) -> tuple[BatchLoop, list[int], Callable[[], bool]]:
    """Returns the loop, the descriptor of the slot table if this process created it, and what builds a faster engine.

    Raises BundleRejectedError.
    """
    settings = start.settings
    # The slot table of this generation fixes streams and threads, even if tuning has changed them since.
    if descriptors:
        slot_table = SlotTable(descriptors[0])
        threads = ModelInfo.from_json(slot_table.description).details["serving"]["threads"]
        settings = dataclasses.replace(settings, streams=slot_table.shape.streams, threads=threads)
        log.info("streams: %d, threads per stream: %s, as before", settings.streams, threads or "automatic")
    bundle, opened, options, seconds, threads = open_model(settings, Progress(channel), start.skipped)
    model_info = describe(bundle, opened, threads)
    created: list[int] = []
    if not descriptors:
        workers = start.light_workers if is_light(seconds) else start.workers
        created = [create_slot_table(bundle, opened, model_info, settings, workers, start.engines)]
        for hint in startup_hints(settings, bundle, opened.engine.name):
            log.info("%s", hint)
    slot_table = SlotTable((descriptors or created)[0])
    if ModelInfo.from_json(slot_table.description).identity != model_info.identity:
        raise BundleRejectedError("changed", f"the bundle at {bundle.path} is not the one that is being served")
    opened.engine.share(slot_table.pixels)
    metrics = in_files(start.process)
    loop = BatchLoop(
        opened.engine, slot_table, start.engine, start.incarnation, seconds, metrics, settings.hang_seconds
    )
    return loop, created, lambda: build_missing(bundle, options, opened.rejected)


def _build(build: Callable[[], bool], channel: Channel) -> None:
    try:
        if build():
            _send_blocking(channel, Built())
    except Exception:  # the current engine continues to serve
        log.error("failed to build the preferred engine", exc_info=True)


def _send_blocking(channel: Channel, message: Message) -> None:
    """Waits until the supervisor has read enough of the earlier messages. The channel itself is non-blocking by now."""
    while True:
        try:
            return channel.send(message)
        except BlockingIOError:
            select.select([], [channel], [])


def _exit_with_the_supervisor() -> None:
    """Has the kernel kill this process when the supervisor exits, even while the main thread is stuck in a library.

    Without prctl (macOS), the end of the control channel is noticed later.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
