"""The classes of a model or of one of its heads: their JSON, which is encoded once, and counts of their predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from prometheus_client import Counter
from pydantic_core import to_json

from vitserve.model.arrays import Floats
from vitserve.service.http_worker.metric_buffer import MetricBuffer

_MAX_SELECTED = 16  # for so few of a thousand classes, repeated argmax is faster than sorting
_COUNTED_LABELS = 50  # have a series of their own, for each HTTP worker the first that it predicts
_OTHER_LABELS = "_other"


class Classes:
    def __init__(self, labels: Sequence[str], metrics: MetricBuffer | None = None, head: str = "") -> None:
        """``metrics``: None if predictions are not counted. ``head``: the name of the head in the metrics."""
        self.labels = labels
        self._encoded = [
            to_json({"label": label, "index": index}).removesuffix(b"}") + b',"probability":'
            for index, label in enumerate(labels)
        ]
        self._metrics, self._head = metrics, head
        self._counters: dict[int, Counter] = {}  # by index
        self._confidence = None if metrics is None else metrics.all.confidence.labels(head)

    def predictions(self, probabilities: Floats, top_k: int) -> bytes:
        """The items of a JSON list. The prediction is counted."""
        indices = most_probable(probabilities, top_k)
        values = probabilities[indices].tolist()
        self._count(indices[0], values[0])
        return b",".join(
            [b"%b%a}" % (self._encoded[index], probability) for index, probability in zip(indices, values, strict=True)]
        )

    def count(self, probabilities: Floats) -> None:
        """Of a response that has not been encoded by predictions()."""
        index = int(probabilities.argmax())
        self._count(index, float(probabilities[index]))

    def _count(self, index: int, probability: float) -> None:
        if self._metrics is None:
            return
        counter = self._counters.get(index)
        if counter is None:
            known = self._metrics.counted_labels.setdefault(self._head, set())
            if len(known) < _COUNTED_LABELS:
                known.add(self.labels[index])
            label = self.labels[index] if self.labels[index] in known else _OTHER_LABELS
            counter = self._metrics.all.predictions.labels(self._head, label)
            self._counters[index] = counter
        assert self._confidence is not None
        self._metrics.inc(counter)
        self._metrics.observe(self._confidence, probability)


def most_probable(values: Floats, count: int) -> list[int]:
    """Indices of the ``count`` largest values, largest first. Ties go to the lower index."""
    if count > _MAX_SELECTED or len(values) <= 4 * _MAX_SELECTED:
        order: list[int] = (-values).argsort(kind="stable")[:count].tolist()
        return order
    remaining, indices = values.copy(), []
    for _ in range(count):
        indices.append(int(remaining.argmax()))
        remaining[indices[-1]] = -np.inf
    return indices
