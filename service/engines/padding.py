"""Which batch sizes deserve kernels of their own, by measurement. Imported by tensorrt_engine.py."""

from __future__ import annotations

from collections.abc import Mapping


def worthwhile(seconds: Mapping[int, float]) -> list[int]:
    """The sizes that are quicker than every larger one, ascending: any other batch is padded to the next of these and loses nothing by it."""
    kept: list[int] = []
    for size in sorted(seconds, reverse=True):
        if not kept or seconds[size] < seconds[kept[-1]]:
            kept.append(size)
    return kept[::-1]
