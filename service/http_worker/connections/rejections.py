"""Counts and logs the requests that are rejected before they reach a route: malformed, too large, or too slow."""

from __future__ import annotations

import logging
from collections import Counter

from vitserve.service import errors
from vitserve.service.http_worker.metric_buffer import MetricBuffer
from vitserve.service.metrics import OTHER_ROUTE

log = logging.getLogger(__name__)


class Rejections:
    """Any client can send thousands of such requests per second. They become one line of the log."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()  # by status, since the last line
        self._latest = ""

    def record(self, error: errors.ServiceError, client: tuple[str, int] | None, metrics: MetricBuffer | None) -> None:
        """``metrics``: None if the route counts the request."""
        self._counts[error.status] += 1
        self._latest = f"{error.detail} (from {client[0] if client else 'an unknown address'})"
        if metrics is not None:
            metrics.inc(metrics.all.requests.labels(OTHER_ROUTE, str(error.status)))

    def log(self) -> None:
        """Call it about once a second."""
        if self._counts:
            counts = ", ".join(f"{count} × {status}" for status, count in sorted(self._counts.items()))
            log.warning("rejected requests: %s; the latest: %s", counts, self._latest)
            self._counts.clear()
