"""The control protocol: every message between the supervisor and the processes that it starts.

The messages are rare and small. Each is sent as one JSON object, together with the file descriptors named in its
docstring, and their number. Images are not sent this way: see wire_format.py.

    supervisor → HTTP worker     StartHttpWorker, ConnectEngine, Status, Reloaded, Drain
    HTTP worker → supervisor     Heartbeat, Reload
    supervisor → engine worker   StartEngineWorker, ConnectWorker, Retire
    engine worker → supervisor   Progress, then Opened or Rejected; Heartbeat, Built
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from vitserve.service.settings import Settings

T = TypeVar("T")


class ControlMessageError(ValueError):
    """The bytes are not a control message."""


# Supervisor to HTTP worker


@dataclass(frozen=True)
class StartHttpWorker:
    """The first message. Descriptors: the listening socket, and that of the admin port if there is one."""

    process: str  # unique among the running processes; used in log lines and as the name of the metrics files
    incarnation: int  # unique among all processes that this supervisor has started
    settings: Settings
    worker: int
    decode_threads: int


@dataclass(frozen=True)
class ConnectEngine:
    """An engine worker is ready. Descriptors: the generation's slot table, the connection to the engine worker."""

    generation: int  # a higher number is a newer bundle
    engine: int
    incarnation: int  # of the engine worker


@dataclass(frozen=True)
class Status:
    """Sent at start and after every change. HTTP workers report it at /readyz and /metrics."""

    failure: str | None = None  # why the configured bundle cannot be served
    progress: str | None = None  # what the engine worker that is starting does now
    restarts: dict[str, dict[str, int]] = field(default_factory=dict)  # by process and cause
    reloads: dict[str, int] = field(default_factory=dict)  # by result


@dataclass(frozen=True)
class Reloaded:
    """The response to a Reload message."""

    id: int
    result: str  # "ok", or as in Rejected, or "exited" if the engine worker exited
    reason: str


@dataclass(frozen=True)
class Drain:
    """Answer the requests in flight, then exit."""


# HTTP worker to supervisor


@dataclass(frozen=True)
class Reload:
    """Load the bundle again. Answered with Reloaded and the same id."""

    id: int


# Supervisor to engine worker


@dataclass(frozen=True)
class StartEngineWorker:
    """The first message. Descriptors: the generation's slot table, if an earlier engine worker has created it."""

    process: str  # as in StartHttpWorker
    incarnation: int
    settings: Settings
    engine: int
    workers: int  # number of HTTP workers
    light_workers: int  # the same, if this engine worker creates the slot table and the network is light
    engines: int  # number of engine workers
    skipped: list[str]  # engines and precisions that crashed and must not be tried: "openvino in bf16"


@dataclass(frozen=True)
class ConnectWorker:
    """An HTTP worker has started. Descriptors: the connection to it."""

    worker: int
    incarnation: int  # of the HTTP worker


@dataclass(frozen=True)
class Retire:
    """Exit as soon as no HTTP worker is connected."""


# Engine worker to supervisor


@dataclass(frozen=True)
class Progress:
    """The current step of an engine worker that is starting. Resets the supervisor's start timeout."""

    step: str
    trying: str | None  # the engine and precision that is being loaded; skipped later if the process crashes now


@dataclass(frozen=True)
class Opened:
    """The engine is warmed up and verified. Descriptors: the slot table, if this engine worker created it."""

    workers: int  # number of HTTP workers in the slot table


@dataclass(frozen=True)
class Rejected:
    """The bundle cannot be served; the process exits."""

    result: Literal["bad_bundle", "no_engine", "changed"]  # changed: the bundle differs from the one being served
    reason: str


@dataclass(frozen=True)
class Built:
    """A faster engine than the one that serves has been built. The supervisor reloads the bundle."""


# Both kinds of process to the supervisor


@dataclass(frozen=True)
class Heartbeat:
    """The process is running. A process that sends none for ``hang_seconds`` is killed."""


StartMessage = StartHttpWorker | StartEngineWorker
ToHttpWorker = StartHttpWorker | ConnectEngine | Status | Reloaded | Drain
ToEngineWorker = StartEngineWorker | ConnectWorker | Retire
ToSupervisor = Heartbeat | Reload | Progress | Opened | Rejected | Built
Message = ToHttpWorker | ToEngineWorker | ToSupervisor

_CLASSES: dict[str, type[Message]] = {message.__name__: message for message in get_args(Message)}


def encode(message: Message, descriptors: int = 0) -> bytes:
    """``descriptors``: the number of file descriptors that are sent with the message."""
    fields = dataclasses.asdict(message)
    return json.dumps({"kind": type(message).__name__, "descriptors": descriptors, **fields}).encode()


def decode(data: bytes) -> tuple[Message, int]:
    """Returns the message and the number of file descriptors that were sent with it.

    Raises ControlMessageError for text that is not JSON, an unknown kind, and an unknown or missing field. The error
    does not contain the message, which may hold the admin key.
    """
    try:
        values = json.loads(data)
    except ValueError:
        raise ControlMessageError(f"not a JSON message, of {len(data)} bytes") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ControlMessageError(f"unknown kind of control message: {kind!r}")
    descriptors = values.pop("descriptors", None)
    if not isinstance(descriptors, int):
        raise ControlMessageError(f"{kind} lacks the field descriptors")
    if "settings" in values:
        values["settings"] = _construct(Settings, values["settings"])
    return _construct(_CLASSES[kind], values), descriptors


def _construct(cls: type[T], values: Mapping[str, Any]) -> T:
    expected = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := values.keys() - expected:
        raise ControlMessageError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    if missing := expected - values.keys():
        raise ControlMessageError(f"{cls.__name__} lacks the field {', '.join(sorted(missing))}")
    return cls(**values)
