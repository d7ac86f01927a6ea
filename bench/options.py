"""The options of `vitserve bench`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BenchOptions:
    """The measurements, and the files for their results. The command's help text describes each option."""

    target: str = ""  # URL of a server, or directory of a bundle; empty: the default model
    images: Path | None = None
    connections: str = ""
    rate: str = ""
    deadline_ms: float = 0  # 0: none
    engine: str = "auto"
    precision: str = "auto"
    batch_sizes: str = "1,2,4,8"
    streams: int = 1
    threads: int = 0
    rounds: int = 3
    seconds: float = 0  # 0: 10 for a server, 1 for engines
    warm_up_seconds: float = 2
    csv: Path | None = None
    json: Path | None = None
    plot: Path | None = None

    @property
    def is_url(self) -> bool:
        return "://" in self.target

    def connection_counts(self) -> list[int]:
        """The closed loops. Raises ValueError."""
        return whole_numbers(self.connections or ("" if self.rate else "1,8"), "--connections")

    def rates(self) -> list[float]:
        """The open loops, in requests per second. Raises ValueError."""
        return numbers(self.rate, "--rate")

    def sizes(self) -> list[int]:
        """The batch sizes. Raises ValueError."""
        return whole_numbers(self.batch_sizes, "--batch-sizes")


def numbers(text: str, option: str) -> list[float]:
    """Parses "1,8,64". Raises ValueError, which names the option."""
    try:
        values = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{option} is {text!r}; it must be a comma-separated list of numbers, such as 1,8") from None
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"{option} is {text!r}; every number must be above 0")
    return values


def whole_numbers(text: str, option: str) -> list[int]:
    """As ``numbers``, for integers."""
    values = numbers(text, option)
    if not all(value.is_integer() for value in values):
        raise ValueError(f"{option} is {text!r}; every number must be an integer")
    return [int(value) for value in values]
