"""Samples of a load, for tests of statistics."""

from __future__ import annotations

from vitserve.bench.load import Sample


def sample(latency: float, outcome: str = "200", planned: float = 0.0, sent: float | None = None) -> Sample:
    """A request with this latency in seconds. It is sent when planned by default."""
    return Sample(planned, planned if sent is None else sent, planned + latency, outcome, b"")
