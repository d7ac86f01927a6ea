"""The log of every process: text, or one JSON object per line. The setting log_format chooses."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType

log = logging.getLogger("vitserve.process")

# Of the process that set_up_logging() was called in: name, level, format.
_current = ("process", "warning", "text")


class FieldsMessage:
    """A log message with fields. str() is its text; in JSON, the fields are members of the object."""

    def __init__(self, message: str, fields: Mapping[str, object]) -> None:
        """``message``: in JSON. A field may replace a member that every line has, such as ``process``."""
        self.message, self.fields = message, fields

    def __str__(self) -> str:
        return self.message


class JsonFormatter(logging.Formatter):
    """Writes time (RFC 3339 in UTC), level, logger, process, message, and the exception and fields if there are any.

    All characters are ASCII, so that no text from outside can end a line or change its encoding.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        members: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
        }
        if isinstance(record.msg, FieldsMessage):
            members |= {"message": record.msg.message, **record.msg.fields}
        else:
            members["message"] = record.getMessage()
        exception = [self.formatException(record.exc_info)] if record.exc_info else []
        exception += [record.stack_info] if record.stack_info else []
        if exception:
            members["exception"] = "\n".join(exception)
        return json.dumps(members, default=str)


def set_up_logging(process: str, level: str, log_format: str, descriptor: int | None = None) -> None:
    """``level`` and ``log_format``: as in the settings. ``descriptor``: of the log; standard error without it."""
    global _current
    _current = (process, level, log_format)
    if log_format == "text":
        logging.basicConfig(level=level.upper(), format=f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")
        return
    handler = logging.StreamHandler(None if descriptor is None else os.fdopen(descriptor, "w", encoding="ascii"))
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    _log_what_python_prints()


def arguments_of(role: str) -> list[str]:
    """Arguments of set_up_logging() for a process of this one: it logs in the same way, under its own name."""
    process, level, log_format = _current
    return [f"{process}-{role}", level, log_format]


def is_json() -> bool:
    """Whether set_up_logging() was called with format json."""
    return _current[2] == "json"


def is_json_line(line: bytes) -> bool:
    """Whether another process has written this line with JsonFormatter."""
    try:
        members = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return (
        line.isascii()
        and isinstance(members, dict)
        and {"time", "level", "logger", "process", "message"} <= members.keys()
    )


def _log_what_python_prints() -> None:
    """Warnings and uncaught exceptions, which Python prints to standard error."""
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING)  # whatever the setting log_level is
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    log.critical("uncaught exception", exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(uncaught: threading.ExceptHookArgs) -> None:
    if uncaught.exc_type is not SystemExit:
        name = "" if uncaught.thread is None else f" {uncaught.thread.name}"
        log.critical("uncaught exception in thread%s", name, exc_info=uncaught.exc_value)


def _log_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    message = unraisable.err_msg or "exception ignored in"
    log.error("%s %r", message, unraisable.object, exc_info=unraisable.exc_value)
