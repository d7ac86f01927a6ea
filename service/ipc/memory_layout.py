"""How one model's shared memory is laid out: an anonymous slot table of slots, with what the engines publish of themselves.

    header | completion estimate of each engine | demand of each HTTP worker | columns of the slots | pixels | logits | embedding | description

Needs no numpy, so that the supervisor can clear a dead HTTP worker's slots.
A slot's column entries are written by its HTTP worker, except that an engine turns WAITING into RUNNING and then its urgency into infinity.
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

# States of a slot. Held: its HTTP worker has it (decoding, or no engine is there). Waiting, running: an engine has it.
FREE, HELD, WAITING, RUNNING = range(4)

# Columns of an engine's completion estimate: seconds that opening it took; images in a full batch; the mean of its seconds; how many times that it is promised in;
# then the share of its time that is left to more urgent images, for each of ten ranks; then when each stream will be free (monotonic seconds);
# then the measured seconds of each batch size.
START, PREFERRED_BATCH_SIZE, BATCH, SAFETY_FACTOR, RESERVED = range(5)
STREAMS = RESERVED + 10

NOWHERE = 255  # in the column of engines: none has it

_MAGIC = b"vitring1"
_HEADER = struct.Struct("<8s9Q")
_PAGE = 4096
_SIZES = {"u1": 1, "<u8": 8, "<f8": 8, "<f4": 4}


class SlotTableError(ValueError):
    """The memory is not a slot table, or not one of this layout."""


@dataclass(frozen=True)
class Shape:
    workers: int
    share: int  # slots of each HTTP worker
    engines: int
    streams: int  # of each engine
    max_batch: int
    image_size: int
    classes: int
    width: int

    @property
    def slots(self) -> int:
        return self.workers * self.share


class Region(NamedTuple):
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * _SIZES[self.dtype]


def regions(shape: Shape) -> dict[str, Region]:
    """Each begins on a page of its own, so that no two writers share a cache line."""
    slots, side = shape.slots, shape.image_size
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "estimate_completion": ("<f8", (shape.engines, STREAMS + shape.streams + shape.max_batch)),
        "offered_load": (
            "<f8",
            (shape.workers, 3),
        ),  # demand.Asked; a HTTP worker that takes over from a dead one goes on with it
        "states": ("u1", (slots,)),
        "engines": ("u1", (slots,)),  # which engine has it, or NOWHERE
        "sequences": ("<u8", (slots,)),
        "sort_keys": ("<f8", (slots,)),  # the smaller, the sooner it runs; infinite where nothing waits to be run
        "pixels": ("u1", (slots, side, side, 3)),
        "logits": ("<f4", (slots, shape.classes)),
        "embedding": ("<f4", (slots, shape.width)),
    }
    found: dict[str, Region] = {}
    end = _HEADER.size
    for name, (dtype, extent) in wanted.items():
        found[name] = Region(-(-end // _PAGE) * _PAGE, dtype, extent)
        end = found[name].end
    return found


def create(shape: Shape, description: bytes) -> int:
    """Makes the memory, unnamed, and returns its descriptor. It can neither shrink nor grow afterwards."""
    start = regions(shape)["embedding"].end
    header = _HEADER.pack(_MAGIC, *dataclasses.astuple(shape), len(description))
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("vitserve-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, start + len(description))
    if hasattr(fcntl, "F_ADD_SEALS"):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    os.pwrite(descriptor, header, 0)
    os.pwrite(descriptor, description, start)
    for worker in range(shape.workers):
        clear_worker_slots(descriptor, worker)
    return descriptor


def read(memory: mmap.mmap) -> tuple[Shape, bytes]:
    """The shape and the description. Raises RingError."""
    if len(memory) < _HEADER.size:
        raise SlotTableError(f"the memory has {len(memory)} bytes; a slot table's header has {_HEADER.size}")
    magic, *extents, length = _HEADER.unpack_from(memory)
    if magic != _MAGIC:
        raise SlotTableError(f"the memory begins with {magic!r}; a slot table begins with {_MAGIC!r}")
    shape = Shape(*extents)
    start = regions(shape)["embedding"].end
    if len(memory) != start + length:
        raise SlotTableError(f"the memory has {len(memory)} bytes; its header asks for {start + length}")
    return shape, memory[start:]


def clear_worker_slots(descriptor: int, worker: int) -> None:
    """Frees the slots of a HTTP worker that has died. Nobody else may write them: its successor has not been started yet."""
    with mmap.mmap(descriptor, 0) as memory:
        shape, _ = read(memory)
        columns = regions(shape)
        for name, value in (
            ("states", bytes([FREE])),
            ("sequences", bytes(8)),
            ("sort_keys", struct.pack("<d", math.inf)),
        ):
            start = columns[name].offset + worker * shape.share * len(value)
            memory[start : start + shape.share * len(value)] = value * shape.share
