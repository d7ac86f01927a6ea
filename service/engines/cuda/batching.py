"""What the engines on a GPU have in common: memory that stays where it is, padding to sizes that are worth it, images that go from slots to the device.

Buffers   a stream's memory, on the device and pinned on the host, with its stream
Program   a network that runs on one stream's buffers; TensorRT's, ONNX Runtime's, torch's
GpuEngine an Engine (engine.py) made of them

"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.model.bundle.parity import compare
from vitserve.service.engines.cuda import runtime
from vitserve.service.engines.cuda.batch_sizes import worthwhile
from vitserve.service.engines.engine import EngineUnavailableError

log = logging.getLogger(__name__)


class Buffers:
    """Addresses are fixed for its life, because captured graphs hold them."""

    def __init__(self, image_shape: tuple[int, ...], classes: int, width: int, max_batch: int) -> None:
        """``image_shape`` is H, W, 3. Raises CudaError where there is too little memory; then none is kept."""
        with ExitStack() as undo:
            self.image_shape = image_shape
            self.stream = runtime.Stream()
            undo.callback(self.stream.close)
            height, breadth, channels = image_shape
            self.pixels = runtime.DeviceMemory(max_batch * height * breadth * channels)
            undo.callback(self.pixels.close)
            self.host, self.device = dict[str, runtime.Pinned](), dict[str, runtime.DeviceMemory]()
            for name, length in (("logits", classes), ("embedding", width)):
                self.host[name] = runtime.pinned_zeros(max_batch, length)
                undo.callback(self.host[name].close)
                self.device[name] = runtime.DeviceMemory(self.host[name].array.nbytes)
                undo.callback(self.device[name].close)
            self._undo = undo.pop_all()

    def fill(self, images: Iterable[Pixels]) -> None:
        offset = 0
        for image in images:
            self.pixels.fill(offset, image, self.stream)
            offset += image.nbytes

    def read(self, size: int) -> None:
        """Enqueues the outputs' way to the host."""
        for name, memory in self.device.items():
            memory.read_into(self.host[name].array[:size], self.stream)

    def outputs(self, count: int) -> Outputs:
        """The client's own, of a stream that has run."""
        return Outputs(*(self.host[name].array[:count].copy() for name in ("logits", "embedding")))

    def close(self) -> None:
        self._undo.close()


class Program(Protocol):
    """A network on one stream's buffers."""

    def prepare(self, size: int) -> None:
        """Whatever makes each later run of this batch size quick. What the outputs are then means nothing."""
        ...

    def enqueue(self, size: int) -> None:
        """Pixels to outputs, which are in the host's memory once the stream has run. The size was prepared."""
        ...

    def forget(self, size: int) -> None:
        """The size will not be run again."""
        ...

    def close(self) -> None: ...


class GpuEngine:
    """A batch runs at the smallest prepared size that holds it. Which sizes are worth it is found by measuring all that are asked for."""

    name: str

    def __init__(
        self,
        precision: Precision,
        streams: int,
        max_batch: int,
        sizes: Sequence[int],
        buffers: Callable[[], Buffers],
        program: Callable[[Buffers], Program],
    ) -> None:
        """Raises what ``buffers`` and ``program`` raise; then nothing is kept on the device."""
        self.precision, self.streams, self.max_batch = precision, streams, max_batch
        self._streams = list[tuple[Buffers, Program]]()
        self._shared: runtime.Pinned | None = None
        with ExitStack() as undo:
            undo.callback(self.close)
            for stream in range(streams):
                self._open_stream(buffers, program)
                if stream == 0:
                    self._sizes = self._worthwhile(sizes)
                else:
                    self._prepare(stream, self._sizes)
                self._check_sizes(stream)
            undo.pop_all()

    def share(self, pixels: Pixels) -> None:
        """From now on the device reads from the slots by itself, where their memory can be pinned; else it is given copies, which is slower."""
        try:
            self._shared = runtime.Pinned(pixels)
        except runtime.CudaError as error:
            log.warning(
                "images are copied to the GPU by way of the host, because the slots cannot be pinned: %s", error
            )

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        images = [pixels] if rows is None else [pixels[row] for row in rows]
        count = len(pixels) if rows is None else len(rows)
        buffers, program = self._streams[stream]
        try:
            buffers.fill(
                images
            )  # the rest, up to the prepared size, is whatever was there before, and is not looked at
            program.enqueue(next(size for size in self._sizes if size >= count))
            buffers.stream.synchronize()
        except Exception as error:
            runtime.raise_if_lost(error)
            raise
        return buffers.outputs(count)

    def close(self) -> None:
        for buffers, program in self._streams:
            program.close()
            buffers.close()
        self._streams.clear()
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _open_stream(self, buffers: Callable[[], Buffers], program: Callable[[Buffers], Program]) -> None:
        memory = buffers()
        with ExitStack() as undo:
            undo.callback(memory.close)
            self._streams.append((memory, program(memory)))
            undo.pop_all()

    def _check_sizes(self, stream: int) -> None:
        """Each prepared size computes what the largest does: the golden check sees only one of them. Raises EngineUnavailable."""
        largest = self._sizes[-1]
        pixels = np.random.default_rng(0).integers(0, 256, (largest, *self._streams[stream][0].image_shape), np.uint8)
        expected = self.run(stream, pixels)
        for size in self._sizes[:-1]:
            parity = compare(self.run(stream, pixels[:size]), Outputs(*(each[:size] for each in expected)))
            failure = parity.failure(self.precision)
            if failure is not None:
                raise EngineUnavailableError(f"batches of {size} come out otherwise than those of {largest}: {failure}")

    def _worthwhile(self, sizes: Sequence[int]) -> list[int]:
        self._prepare(0, sizes)
        kept = worthwhile({size: self._seconds(size) for size in sizes})
        for size in set(sizes) - set(kept):
            self._streams[0][1].forget(size)
        return kept

    def _prepare(self, stream: int, sizes: Sequence[int]) -> None:
        for size in sorted(sizes, reverse=True):  # largest first: the memory that it takes is there for the smaller
            self._streams[stream][1].prepare(size)

    def _seconds(self, size: int) -> float:
        """Of a run, the best of three after one that does not count."""
        (buffers, program), times = self._streams[0], list[float]()
        for _ in range(4):
            began = time.monotonic()
            program.enqueue(size)
            buffers.stream.synchronize()
            times.append(time.monotonic() - began)
        return min(times[1:])
