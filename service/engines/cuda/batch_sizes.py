"""Which batch sizes deserve kernels of their own."""

from __future__ import annotations

from collections.abc import Mapping


def candidates(max_batch: int) -> list[int]:
    """Sizes of which each is a little more than the one before, ascending, where trying every size would take too long: 1 … 8, 16 … 64 by 8, and so on."""
    sizes = [*range(1, 8), *range(8, 64, 8), *range(64, max_batch, 64)]
    return [*(size for size in sizes if size < max_batch), max_batch]


def worthwhile(seconds: Mapping[int, float]) -> list[int]:
    """The sizes that are quicker than every larger one, ascending: any other batch is padded to the next of these and loses nothing by it."""
    kept: list[int] = []
    for size in sorted(seconds, reverse=True):
        if not kept or seconds[size] < seconds[kept[-1]]:
            kept.append(size)
    return kept[::-1]
