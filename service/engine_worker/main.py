"""The process that owns a device: it opens the engine, verifies it, and runs batches of what the HTTP workers send.

python -m vitserve.service.engine_worker.main <descriptor of the supervisor's channel>
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
    open_model,
    warm_up,
)
from vitserve.service.engines.selection import build_missing
from vitserve.service.ipc.control_channel import Channel, Message, start_child
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import in_files
from vitserve.service.settings import Settings

log = logging.getLogger("vitserve.engine_worker")

# HTTP workers go first where both want the same core: what they decode meanwhile makes the next batch larger, and a rejection is not kept waiting.
NICENESS = 5
_PR_SET_PDEATHSIG = 1


def main() -> None:
    began = time.monotonic()
    channel, opening, descriptors = start_child()
    _die_with_the_supervisor()
    os.nice(NICENESS)
    settings = Settings(**opening["settings"])
    try:
        process, founded, build = _open(settings, opening, descriptors, channel)
    except BundleRejectedError as rejected:
        channel.send({"kind": "rejected", "result": rejected.result, "reason": str(rejected)[:10_000]})
        return
    process.slot_table.publish_start(process.index, time.monotonic() - began)
    channel.send({"kind": "opened"}, founded)
    gc.freeze()  # as in HTTP worker.py
    threading.Thread(target=_build, args=(build, channel), name="builder", daemon=True).start()
    process.run(channel)
    process.engine.close()


def _tell(channel: Channel, message: Message) -> None:
    """However long the supervisor is busy."""
    while True:
        try:
            return channel.send(message)
        except BlockingIOError:
            select.select([], [channel], [])


def _build(build: Callable[[], bool], channel: Channel) -> None:
    try:
        if build():
            _tell(channel, {"kind": "built"})
    except Exception:  # what serves goes on serving
        log.error("what was to serve better cannot be built", exc_info=True)


def _open(
    settings: Settings, opening: Message, descriptors: list[int], channel: Channel
) -> tuple[BatchLoop, list[int], Callable[[], bool]]:
    """The process's work, the descriptor of the slot table if it was made here, and what builds a better engine's plan if one is missing. Raises Refused."""
    if descriptors:  # it takes its place at slots that are there, whatever was tuned meanwhile
        settings = dataclasses.replace(settings, streams=SlotTable(descriptors[0]).shape.streams)
    bundle, opened, options = open_model(settings, Progress(channel), opening["skipped"])
    seconds = warm_up(opened.engine, bundle.manifest.preprocessing.image_size)
    model_info = describe(bundle, opened)
    founded = (
        []
        if descriptors
        else [create_slot_table(bundle, opened, model_info, settings, opening["workers"], opening["engines"])]
    )
    slot_table = SlotTable((descriptors or founded)[0])
    if ModelInfo.from_json(slot_table.description).identity != model_info.identity:
        raise BundleRejectedError("changed", f"the bundle at {bundle.path} is not the one that is being served")
    opened.engine.share(slot_table.pixels)
    metrics = in_files(opening["process"])
    process = BatchLoop(
        opened.engine, slot_table, opening["engine"], opening["incarnation"], seconds, metrics, settings.hang_seconds
    )
    return process, founded, lambda: build_missing(bundle, options, opened.rejected)


def _die_with_the_supervisor() -> None:
    """Even while the main thread stands still, in a foreign library say. Where there is no prctl, the channel's end is noticed later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
