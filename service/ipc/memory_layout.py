"""Layout of the shared memory of one model: a table of image slots and the figures that the workers publish.

    header | completion estimates, a row per engine worker | offered load and arrivals, a row per HTTP worker |
    slot columns | pixels | embeddings | logits | model description

This module does not import numpy, so that the supervisor can clear the slots of a crashed HTTP worker.
The HTTP worker that owns a slot writes its column entries, with two exceptions: when an engine worker starts a batch,
it changes the state from WAITING to RUNNING and sets the sort key to infinity.
"""

from __future__ import annotations

import dataclasses
import fcntl
import math
import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from typing import NamedTuple

from vitserve.service.ipc.allocation import allocate

# States of a slot. HELD: the HTTP worker has the image (it is being decoded, or no engine worker is connected).
# WAITING and RUNNING: an engine worker has it.
FREE, HELD, WAITING, RUNNING = range(4)

# Columns of a row of completion estimates: seconds from the start of the engine worker until it was ready; preferred
# batch size; estimated seconds of a batch of that size; safety factor; then, for each of ten priority levels, the share
# of time reserved for more urgent images; then the time at which each stream becomes free (monotonic seconds);
# then the measured seconds of each batch size.
START_SECONDS, PREFERRED_BATCH_SIZE, BATCH_SECONDS, SAFETY_FACTOR, RESERVED = range(5)
FREE_AT = RESERVED + 10

NO_ENGINE = 255  # entry of the engines column of a slot that no engine worker has

NOT_RUNNING = 1 << 40  # entry of the connections of an HTTP worker that is not running

_MAGIC = b"vitslots"
_HEADER = struct.Struct("<8s11Q")
_PAGE_BYTES = 4096
_ITEM_BYTES = {"u1": 1, "<u8": 8, "<f8": 8, "<f4": 4}


class SlotTableError(ValueError):
    """The memory is not a slot table, or not one with this layout."""


@dataclass(frozen=True)
class Shape:
    workers: int
    slots_per_worker: int
    engines: int
    streams: int  # per engine worker
    max_batch: int
    image_size: int  # pixels, height of an image
    classes: int
    width: int = 0  # pixels; 0 for a square
    channels: int = 3
    embedding: int = 1  # values of an embedding

    @property
    def slots(self) -> int:
        return self.workers * self.slots_per_worker


class Region(NamedTuple):
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def regions(shape: Shape) -> dict[str, Region]:
    """All arrays by name. Each starts on its own page, so that no two writers share a cache line."""
    slots = shape.slots
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        "completion_estimates": ("<f8", (shape.engines, FREE_AT + shape.streams + shape.max_batch)),
        "offered_load": ("<f8", (shape.workers, 3)),  # OfferedWork; survives a restart of the HTTP worker
        "arrivals": ("<u8", (shape.workers, 10)),  # images by priority level, admitted or rejected, since the start
        "connections": ("<u8", (shape.workers,)),  # open HTTP connections
        "states": ("u1", (slots,)),
        "engines": ("u1", (slots,)),  # index of the engine worker that has the image, or NO_ENGINE
        "sequences": ("<u8", (slots,)),
        "sort_keys": ("<f8", (slots,)),  # smaller keys run first; infinite for slots that are free or running
        "pixels": ("u1", (slots, shape.image_size, shape.width or shape.image_size, shape.channels)),
        "embeddings": ("<f4", (slots, shape.embedding)),  # written only for images that need them
        "logits": ("<f4", (slots, shape.classes)),
    }
    result: dict[str, Region] = {}
    end = _HEADER.size
    for name, (dtype, extent) in arrays.items():
        result[name] = Region(-(-end // _PAGE_BYTES) * _PAGE_BYTES, dtype, extent)
        end = result[name].end
    return result


def create(shape: Shape, description: bytes) -> int:
    """Creates anonymous shared memory of fixed size and returns its file descriptor.

    All of it is allocated now: a process that writes later to memory that cannot be had is killed by SIGBUS. Raises
    OSError.
    """
    start = regions(shape)["logits"].end
    header = _HEADER.pack(_MAGIC, *dataclasses.astuple(shape), len(description))
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("vitserve-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        allocate(descriptor, start + len(description))
    except OSError:
        os.close(descriptor)
        raise
    if hasattr(fcntl, "F_ADD_SEALS"):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    os.pwrite(descriptor, header, 0)
    os.pwrite(descriptor, description, start)
    for worker in range(shape.workers):
        clear_worker_slots(descriptor, worker)
    return descriptor


def read(memory: mmap.mmap) -> tuple[Shape, bytes]:
    """The shape and the model description. Raises SlotTableError."""
    if len(memory) < _HEADER.size:
        raise SlotTableError(f"the memory has {len(memory)} bytes; a slot table's header has {_HEADER.size}")
    magic, *extents, length = _HEADER.unpack_from(memory)
    if magic != _MAGIC:
        raise SlotTableError(f"the memory begins with {magic!r}; a slot table begins with {_MAGIC!r}")
    shape = Shape(*extents)
    start = regions(shape)["logits"].end
    if len(memory) != start + length:
        raise SlotTableError(f"the memory has {len(memory)} bytes; its header requires {start + length}")
    return shape, memory[start:]


def clear_worker_slots(descriptor: int, worker: int) -> None:
    """Frees all slots of an HTTP worker that has exited. Call this before its replacement starts."""
    with mmap.mmap(descriptor, 0) as memory:
        shape, _ = read(memory)
        columns = regions(shape)
        # A worker that is not running must not make others leave connections to it.
        struct.pack_into("<Q", memory, columns["connections"].offset + 8 * worker, NOT_RUNNING)
        for name, value in (
            ("states", bytes([FREE])),
            ("sequences", bytes(8)),
            ("sort_keys", struct.pack("<d", math.inf)),
        ):
            start = columns[name].offset + worker * shape.slots_per_worker * len(value)
            memory[start : start + shape.slots_per_worker * len(value)] = value * shape.slots_per_worker
