"""Images through decoder and engine, as fast as the machine allows, and rows in the order of the images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vitserve.model.arrays import Floats, Outputs, Pixels, to_probabilities
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.calibration import temperature_of
from vitserve.model.bundle.head import Head
from vitserve.model.bundle.preprocess import Decoder, ImageError
from vitserve.predict.items import Item
from vitserve.predict.output import Embeddings, Output, OutputError, Row
from vitserve.service import machine
from vitserve.service.engines.engine import Engine

_BATCHES_AHEAD = 4  # decoded or being decoded, for each stream


@dataclass(frozen=True)
class Decoded:
    item: Item
    pixels: Pixels | None
    error: str = ""


class Result(NamedTuple):
    row: Row
    embedding: Floats | None  # None if there is no prediction


@dataclass(frozen=True)
class Predictor:
    bundle: Bundle
    engine: Engine
    top_k: int = 5
    head: Head | None = None
    threads: int = field(default_factory=machine.cores)  # that decode

    def run(
        self, items: Sequence[Item], output: Output, embeddings: Embeddings | None, progress: Callable[[int], None]
    ) -> None:
        """Continues after the rows that ``output`` has. ``progress`` receives the number of new rows.

        Raises OutputError if these rows are of other images.
        """
        done = len(output.rows)
        if [row.path for row in output.rows] != [item.name for item in items[:done]]:
            raise OutputError("the output has rows of other images, or in another order; choose another file")
        for results in self.results(items[done:]):
            if embeddings is not None:
                for index, result in enumerate(results, start=done):
                    if result.embedding is not None:
                        embeddings.write(index, result.embedding)
            output.append([result.row for result in results])
            done += len(results)
            progress(len(results))

    def results(self, items: Iterable[Item]) -> Iterator[list[Result]]:
        """The results in the order of the items, in batches."""
        with (
            ThreadPoolExecutor(self.threads, "decode") as decoders,
            ThreadPoolExecutor(self.engine.streams, "run") as runners,
        ):
            streams = deque(range(self.engine.streams))
            pending = deque[tuple[list[Decoded], Future[Outputs], int]]()

            def oldest() -> list[Result]:
                batch, future, stream = pending.popleft()
                outputs = future.result()
                streams.append(stream)
                return self._of_batch(batch, outputs)

            for batch in self._batches(items, decoders):
                if not streams:
                    yield oldest()
                stream = streams.popleft()
                pixels = [each.pixels for each in batch if each.pixels is not None]
                stacked = np.stack(pixels) if pixels else None
                pending.append((batch, runners.submit(self._run, stream, stacked), stream))
            while pending:
                yield oldest()

    def _run(self, stream: int, pixels: Pixels | None) -> Outputs:
        if pixels is None:  # none of them can be decoded
            return Outputs(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))
        return self.engine.run(stream, pixels)

    def _batches(self, items: Iterable[Item], decoders: ThreadPoolExecutor) -> Iterator[list[Decoded]]:
        decoder = Decoder(self.bundle.manifest.preprocessing)
        ahead = deque[Future[Decoded]]()
        waiting, size = iter(items), self.engine.max_batch
        most = _BATCHES_AHEAD * size * max(1, self.engine.streams)
        batch = list[Decoded]()
        while True:
            while len(ahead) < most and (item := next(waiting, None)) is not None:
                ahead.append(decoders.submit(_decode, decoder, item))
            if not ahead:
                break
            batch.append(ahead.popleft().result())
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _of_batch(self, batch: Sequence[Decoded], outputs: Outputs) -> list[Result]:
        results, position = list[Result](), 0
        for each in batch:
            if each.pixels is None:
                results.append(Result(Row(each.item.name, error=each.error), None))
                continue
            embedding = outputs.embedding[position]
            results.append(Result(self._row(each.item.name, outputs.logits[position], embedding), embedding))
            position += 1
        return results

    def _row(self, name: str, logits: Floats, embedding: Floats) -> Row:
        labels = self.bundle.labels if self.head is None else self.head.labels
        if not labels:
            return Row(name)
        if self.head is None:
            manifest = self.bundle.manifest
            temperature = temperature_of(manifest.probability_calibration)
            probabilities = to_probabilities(logits, manifest.activation, temperature)
        else:
            probabilities = self.head.probabilities(embedding)
        order = (-probabilities).argsort(kind="stable")[: self.top_k]
        best = [(labels[index], float(probabilities[index])) for index in order]
        return Row(name, best[0][0], best[0][1], best)


def _decode(decoder: Decoder, item: Item) -> Decoded:
    try:
        return Decoded(item, decoder.decode(item.read()))
    except (ImageError, OSError) as error:
        return Decoded(item, None, f"{type(error).__name__.removesuffix('Error')}: {error}")
