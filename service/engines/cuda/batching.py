"""Batches on a GPU, for all GPU engines: fixed memory, padding to efficient batch sizes, transfer of the images.

Buffers    the memory of one stream, on the device and pinned on the host, with its CUDA stream
Program    a network that runs in the buffers of one stream: TensorRT's, ONNX Runtime's or torch's
GpuEngine  an Engine made of them
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.model.bundle.parity import compare
from vitserve.service.engines.cuda import runtime
from vitserve.service.engines.engine import EngineUnavailableError

log = logging.getLogger(__name__)


def candidate_sizes(max_batch: int) -> list[int]:
    """Batch sizes to measure where measuring all of them takes too long, ascending: 1 … 8, 16 … 64 by 8, then by 64."""
    sizes = [*range(1, 8), *range(8, 64, 8), *range(64, max_batch, 64)]
    return [*(size for size in sizes if size < max_batch), max_batch]


def efficient_sizes(seconds: Mapping[int, float]) -> list[int]:
    """The sizes that are faster than every larger one, ascending.

    Padding a batch of any other size to the next of them takes no longer.
    """
    sizes: list[int] = []
    for size in sorted(seconds, reverse=True):
        if not sizes or seconds[size] < seconds[sizes[-1]]:
            sizes.append(size)
    return sizes[::-1]


class Buffers:
    """The addresses never change, because captured graphs contain them."""

    def __init__(self, image_shape: tuple[int, ...], classes: int, width: int, max_batch: int) -> None:
        """``image_shape`` is H, W, C. Raises CudaError and frees everything if there is too little memory."""
        with ExitStack() as undo:
            self.image_shape = image_shape
            self.stream = runtime.Stream()
            undo.callback(self.stream.close)
            self.pixels = runtime.DeviceMemory(max_batch * int(np.prod(image_shape)))
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
        """Enqueues the copy of the outputs to the host."""
        for name, memory in self.device.items():
            memory.read_into(self.host[name].array[:size], self.stream)

    def outputs(self, count: int) -> Outputs:
        """A copy. Call it after the stream is synchronized."""
        return Outputs(*(self.host[name].array[:count].copy() for name in ("logits", "embedding")))

    def close(self) -> None:
        self._undo.close()


class Program(Protocol):
    """A network that runs in the buffers of one stream."""

    def prepare(self, size: int) -> None:
        """Makes later runs of this batch size fast, by capturing a graph. The outputs are undefined."""
        ...

    def enqueue(self, size: int) -> None:
        """Enqueues a run of a prepared batch size. After synchronization the outputs are in host memory."""
        ...

    def forget(self, size: int) -> None:
        """Releases a batch size."""
        ...

    def close(self) -> None: ...


class GpuEngine:
    """Pads each batch to the smallest prepared size that holds it. The sizes are measured and selected at start-up."""

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
        """``sizes`` are measured. Raises what ``buffers`` and ``program`` raise, and then frees all device memory."""
        self.precision, self.streams, self.max_batch = precision, streams, max_batch
        self._streams = list[tuple[Buffers, Program]]()
        self._shared: runtime.Pinned | None = None
        with ExitStack() as undo:
            undo.callback(self.close)
            for stream in range(streams):
                self._open_stream(buffers, program)
                if stream == 0:
                    self._sizes = self._select_sizes(sizes)
                else:
                    self._prepare(stream, self._sizes)
                self._check_sizes(stream)
            undo.pop_all()

    def share(self, pixels: Pixels) -> None:
        """Pins the slot table, so that the device reads it directly. If that fails, images are copied first."""
        try:
            self._shared = runtime.Pinned(pixels)
        except runtime.CudaError as error:
            log.warning("cannot pin the slot table, so images are copied before their transfer to the GPU: %s", error)

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        images = [pixels] if rows is None else [pixels[row] for row in rows]
        count = len(pixels) if rows is None else len(rows)
        buffers, program = self._streams[stream]
        try:
            buffers.fill(images)  # the padding keeps old pixels, and its outputs are ignored
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
        """Compares each size with the largest: the golden check uses only one. Raises EngineUnavailableError."""
        largest = self._sizes[-1]
        pixels = np.random.default_rng(0).integers(0, 256, (largest, *self._streams[stream][0].image_shape), np.uint8)
        expected = self.run(stream, pixels)
        for size in self._sizes[:-1]:
            parity = compare(self.run(stream, pixels[:size]), Outputs(*(array[:size] for array in expected)))
            failure = parity.failure(self.precision)
            if failure is not None:
                raise EngineUnavailableError(f"batches of {size} and of {largest} give different outputs: {failure}")

    def _select_sizes(self, sizes: Sequence[int]) -> list[int]:
        self._prepare(0, sizes)
        selected = efficient_sizes({size: self._seconds(size) for size in sizes})
        for size in set(sizes) - set(selected):
            self._streams[0][1].forget(size)
        return selected

    def _prepare(self, stream: int, sizes: Sequence[int]) -> None:
        for size in sorted(sizes, reverse=True):  # largest first: smaller sizes reuse its memory
            self._streams[stream][1].prepare(size)

    def _seconds(self, size: int) -> float:
        """The fastest of three runs, after one that is not counted."""
        (buffers, program), times = self._streams[0], list[float]()
        for _ in range(4):
            started = time.monotonic()
            program.enqueue(size)
            buffers.stream.synchronize()
            times.append(time.monotonic() - started)
        return min(times[1:])
