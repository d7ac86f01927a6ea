"""TensorRT's log: forwarded to ours, and read where TensorRT reports a result only there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vitserve.service.engines.tensorrt.plan_report import LAYERS
from vitserve.service.engines.tensorrt.provider import choose

if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = choose().load()

log = logging.getLogger(__name__)


@dataclass
class Messages:
    """The messages that TensorRT logged during some calls."""

    errors: list[str] = field(default_factory=list)  # a failed call returns only None or False
    layers: str = ""  # of the last plan that was built


class TensorRtLogger(trt.ILogger):  # type: ignore[misc, unused-ignore]  # untyped unless TensorRT is installed
    def __init__(self) -> None:
        super().__init__()
        self._collecting: list[Messages] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
            for messages in self._collecting:
                messages.errors.append(msg)
            log.error("TensorRT: %s", msg)
        elif msg.startswith(LAYERS):
            for messages in self._collecting:
                messages.layers = msg
        else:
            log.log(logging.WARNING if severity == trt.ILogger.Severity.WARNING else logging.DEBUG, "TensorRT: %s", msg)

    @contextmanager
    def collected(self) -> Iterator[Messages]:
        """The messages that are logged inside the ``with`` block, by any thread."""
        messages = Messages()
        self._collecting.append(messages)
        try:
            yield messages
        finally:
            self._collecting.remove(messages)


# One for the process: TensorRT keeps the first logger that it receives, and ignores every other one.
LOGGER = TensorRtLogger()
