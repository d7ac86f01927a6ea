"""The heads of the served bundle. Files that are added, replaced or removed are noticed within a second."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitserve.model.bundle.bundle import HEADS
from vitserve.model.bundle.head import Head, HeadError, backbone_of, check_fits, head_files, read_head
from vitserve.service import errors
from vitserve.service.credentials.watched_file import WatchedFiles
from vitserve.service.http_worker.classifiers.classes import Classes
from vitserve.service.http_worker.metric_buffer import MetricBuffer
from vitserve.service.ipc.model_info import ModelInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedHead:
    head: Head
    classes: Classes


class Heads:
    """All methods run on the event loop, or on the thread that parses requests."""

    def __init__(self, bundle: Path, model_info: ModelInfo, width: int, metrics: MetricBuffer | None = None) -> None:
        """``width``: of an embedding."""
        self._bundle, self._width, self._metrics = bundle, width, metrics
        self._backbone = backbone_of(model_info.details.get("files", {}))
        self._directory = WatchedFiles(bundle / HEADS)
        self._heads: dict[str, ServedHead] = {}
        self._lock = threading.Lock()
        self._refresh()

    def find(self, name: str) -> ServedHead:
        """Raises BadRequestError."""
        self._refresh()
        found = self._heads.get(name)
        if found is None:
            known = ", ".join(["none", *sorted(self._heads)])
            raise errors.BadRequestError(f"unknown head {name[:100]!r}; allowed: {known}")
        return found

    def describe(self) -> list[dict[str, Any]]:
        """For GET /v1/model."""
        self._refresh()
        heads = [self._heads[name].head for name in sorted(self._heads)]
        return [
            {
                "name": head.name,
                "version": head.version,
                "labels": head.labels,
                "activation": head.activation,
                "accuracy": head.accuracy,
            }
            for head in heads
        ]

    def _refresh(self) -> None:
        """A file is replaced by renaming, which changes the directory."""
        with self._lock:
            if self._directory.changed():
                self._read()

    def _read(self) -> None:
        heads = dict[str, ServedHead]()
        for name, path in head_files(self._bundle).items():
            try:
                head = read_head(path)
                check_fits(head, self._backbone, self._width)
            except HeadError as error:
                log.error("a head is not served: %s", error)
                continue
            previous = self._heads.get(name)
            if previous is not None and previous.head.version == head.version:
                heads[name] = previous
            else:
                heads[name] = ServedHead(head, Classes(head.labels, self._metrics, name))
        if heads.keys() | self._heads.keys():
            log.info("heads: %s", ", ".join(sorted(heads)) or "none")
        self._heads = heads
