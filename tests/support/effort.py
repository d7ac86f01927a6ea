"""The effort of a function: executed lines and allocated memory, which do not depend on the machine's speed."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class Effort:
    lines: int = 0  # of Python that were executed
    peak_bytes: int = 0  # of allocated memory


def effort_of(function: Callable[[], object]) -> Effort:
    """Runs the function. Its exceptions are passed on."""
    effort, previous = Effort(), sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        effort.lines += event == "line"
        return trace

    tracemalloc.start()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(previous)
        effort.peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return effort
