"""The request log: one line per request, without bodies and queries. The setting request_log selects requests."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from types import MappingProxyType

from vitserve.service.log_format import FieldsMessage

log = logging.getLogger("vitserve.request")
log.setLevel(logging.INFO)  # whatever the setting log_level is

_MAX_PATH_CHARACTERS = 200


class RequestLog:
    def __init__(self, level: str, sample: float) -> None:
        """As in the settings request_log and request_log_sample."""
        self._level, self._sample = level, sample
        self.on = level != "off" and sample > 0

    def write(
        self,
        request_id: bytes,
        client: tuple[str, int] | None,
        method: str,
        path: str,
        status: int,
        code: str,
        seconds: float,
        details: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """``code``: of the error, or of images that failed; empty without an error. ``details``: more fields.

        Writes only what the setting selects. Client text is quoted as JSON in ASCII, so it cannot begin a new line.
        """
        if self._level == "errors" and status < 400 and not code:
            return
        if self._sample < 1 and random.random() >= self._sample:
            return
        fields: dict[str, object] = {
            "id": request_id.decode(),
            "client": client[0] if client else None,
            "method": method,
            "path": path[:_MAX_PATH_CHARACTERS],
            "status": status,
            "code": code or None,
            "ms": seconds * 1000,
            **details,
        }
        for name, value in fields.items():
            if isinstance(value, float):
                fields[name] = round(value, 3)
        log.info(_RequestMessage("request", fields))


class _RequestMessage(FieldsMessage):
    def __str__(self) -> str:
        return " ".join(f"{name}={_text(name, value)}" for name, value in self.fields.items())


def _text(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return json.dumps(value) if name == "path" else str(value)
