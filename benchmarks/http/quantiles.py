"""Quantiles and summaries over rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def quantile_ms(seconds: Sequence[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of the values do not exceed, in ms. None if there are none."""
    return 1000 * quantile(seconds, share) if seconds else None


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median (minimum – maximum), with ``digits`` significant digits."""
    if not values:
        return "–"
    median = short(statistics.median(values), digits)
    return median if len(values) == 1 else f"{median} ({short(min(values), digits)} – {short(max(values), digits)})"


def short(value: float, digits: int = 3) -> str:
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
