"""The request log: one line per request, without bodies and queries. The setting request_log selects requests."""

from __future__ import annotations

import json
import logging
import random

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
        details: str = "",
    ) -> None:
        """``code``: of the error, or of images that failed; empty without an error. ``details``: name=value …

        Writes only what the setting selects. Client text is quoted as JSON in ASCII, so it cannot begin a new line.
        """
        if self._level == "errors" and status < 400 and not code:
            return
        if self._sample < 1 and random.random() >= self._sample:
            return
        log.info(
            "id=%s client=%s method=%s path=%s status=%d code=%s ms=%.3f%s",
            request_id.decode(),
            client[0] if client else "-",
            method,
            json.dumps(path[:_MAX_PATH_CHARACTERS]),
            status,
            code or "-",
            seconds * 1000,
            details and f" {details}",
        )
