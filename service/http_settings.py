"""The settings of HTTP: addresses, requests, connections, and logs of requests. See settings.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

LEAST_ADMIN_KEY_CHARACTERS = 16
_LEAST = {
    "timeout_ms": 1,
    "max_body_bytes": 1,
    "max_images": 1,
    "max_header_bytes": 1024,
    "max_headers": 16,
    "max_connections": 1,
    "response_cache_bytes": 0,
}


class SettingsError(ValueError):
    """A setting is invalid, or settings contradict each other or the machine. The service does not start."""


class Secret(str):
    """Text that no repr, and so no traceback and no log line of an object that holds it, shows."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'" if self else "''"


def setting(default: Any, help_text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class HttpSettings:
    host: str = setting(
        "127.0.0.1",
        "Address to listen on. 0.0.0.0 accepts connections from the network: set `api_keys` unless a proxy "
        "authenticates clients.",
    )
    port: int = setting(8000, "Port to listen on. 0: a free port, which is logged.")
    admin_port: int = setting(
        0,
        "Another port for /metrics and /v1/admin, which `port` then does not answer. It answers all other routes too. "
        "0: everything is on `port`.",
    )
    probe_port: int = setting(
        0,
        "Additional port for liveness probes. The supervisor answers GET /livez there, so that no load on the HTTP "
        "workers delays it. 0: none.",
    )
    grpc_port: int = setting(
        0,
        "Additional port for the Open Inference Protocol over gRPC. It requires vitserve[grpc]. 0: none.",
    )
    timeout_ms: int = setting(
        10_000,
        "Default request deadline in milliseconds. A request may override it with `timeout_ms`. Images that cannot "
        "meet their deadline are rejected with 429.",
    )
    max_body_bytes: int = setting(33_554_432, "Maximum size of a request body, checked while it is received.")
    max_images: int = setting(64, "Maximum number of images per request.")
    max_header_bytes: int = setting(
        65_536,
        "Maximum size of a request without its content: request line, header fields, chunk sizes and trailers. Counted "
        "while they are received.",
    )
    max_headers: int = setting(200, "Maximum number of header fields of a request.")
    max_connections: int = setting(
        4096,
        "Maximum number of connections of an HTTP worker, less if the limit of open files is lower. For a new "
        "connection beyond it, the one that has waited longest for a request is closed.",
    )
    first_request_seconds: float = setting(
        30.0, "How long a new connection may stay open without a byte of its first request."
    )
    header_seconds: float = setting(
        10.0, "How long the headers of a request may take, from its first byte. Then the response is 408."
    )
    body_gap_seconds: float = setting(
        10.0,
        "How long a client may pause while it sends a body, or while it reads a response. A shorter `timeout_ms` in "
        "the query shortens it, to one second at least. Then the response is 408.",
    )
    body_seconds: float = setting(
        120.0, "How long a request may take to arrive, from its first byte to its last. Then the response is 408."
    )
    keep_alive_seconds: float = setting(
        75.0,
        "How long a connection may stay open between two requests. It should be longer than the idle timeout of the "
        "load balancer, which is often 60 seconds.",
    )
    response_cache_bytes: int = setting(
        0,
        "Memory for results of images that are sent again, of all HTTP workers together. Identical images in flight "
        "then run once. A reload empties it. 0: no cache.",
    )
    explanations: bool = setting(
        True, "Answer POST /v1/explain. The first image starts a process, which exits after a minute without images."
    )
    page: bool = setting(True, "Serve the page at /.")
    cors_origins: str = setting(
        "",
        "Origins of web pages that may use the API, separated by commas, for example https://app.example. *: all. "
        "Empty: none.",
    )
    root_path: str = setting(
        "", "Prefix of all paths at the reverse proxy, for example /vision, so that /docs works behind it."
    )
    request_log: str = setting(
        "off",
        "off, errors or all: which requests are logged, one line each with id, status, error code and stage times.",
        ("off", "errors", "all"),
    )
    request_log_sample: float = setting(1.0, "Share of these requests that is logged, chosen at random, from 0 to 1.")
    otlp_endpoint: str = setting(
        "",
        "URL of an OpenTelemetry collector that takes OTLP over HTTP, for example http://collector:4318. Requests with "
        "images then have spans. It requires vitserve[otel]. Empty: no traces.",
    )
    trace_share: float = setting(
        1.0, "Share of the requests that is traced, from 0 to 1. The header traceparent decides for those that have it."
    )
    tls_certificate: str = setting(
        "",
        "File with the certificate of TLS and those of intermediate authorities, in PEM. `port`, `admin_port` and "
        "`grpc_port` then answer TLS only. It is read again when it changes. Empty: no TLS.",
    )
    tls_key: str = setting("", "File with the private key of `tls_certificate`, in PEM without a password.")
    api_keys: str = setting(
        "",
        "File with the API keys of clients, one name and key per line. It is read again when it changes. Empty: "
        "requests need no key.",
    )
    key_share: float = setting(
        0.5, "Largest share of the slots that images of one API key may have. Further ones are rejected with 429."
    )
    admin_key: str = setting(
        "",
        "Bearer token for POST /v1/admin/reload, of at least 16 characters. Empty: that route is disabled. Reloading "
        "with SIGHUP needs no token.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "admin_key", Secret(self.admin_key))
        check_least(self, _LEAST)
        for name in (name for name in self.__dataclass_fields__ if name.endswith("_seconds")):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        for name, value in self.__dataclass_fields__.items():
            choices = value.metadata["choices"]
            if choices and getattr(self, name) not in choices:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        self._check_ports()
        self._check_web()
        if self.admin_key and len(self.admin_key) < LEAST_ADMIN_KEY_CHARACTERS:
            raise SettingsError(
                f"admin_key has {len(self.admin_key)} characters; it must have at least {LEAST_ADMIN_KEY_CHARACTERS}"
            )

    def _check_ports(self) -> None:
        ports = {name: getattr(self, name) for name in ("port", "admin_port", "probe_port", "grpc_port")}
        for name, port in ports.items():
            if not 0 <= port <= 65535:
                raise SettingsError(f"{name} is {port}; it must be from 0 to 65535")
        for name, *others in (("admin_port", "port"), ("probe_port", "port", "admin_port"), ("grpc_port", *ports)):
            for other in others:
                if ports[name] and name != other and ports[name] == ports[other]:
                    raise SettingsError(
                        f"{name} and {other} are both {ports[name]}; they must differ (0: no port of its own)"
                    )

    def _check_web(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise SettingsError("tls_certificate and tls_key need each other: set both or none")
        if not 0 < self.key_share <= 1:
            raise SettingsError(f"key_share is {self.key_share}; it must be greater than 0 and at most 1")
        for name in ("request_log_sample", "trace_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not re.fullmatch(r"(https?://[^\s?#]+)?", self.otlp_endpoint):
            raise SettingsError(f"otlp_endpoint is {self.otlp_endpoint!r}; it must be like http://collector:4318")
        if not re.fullmatch(r"((/[\w.~-]+)+)?", self.root_path, re.ASCII):
            raise SettingsError(f"root_path is {self.root_path!r}; it must be like /vision, without a / at the end")
        for origin in filter(None, map(str.strip, self.cors_origins.split(","))):
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^\s/?#]+", origin):
                raise SettingsError(f"cors_origins has {origin!r}; an origin is like https://app.example:8443, or *")


def check_least(settings: object, least: dict[str, int], note: str = "") -> None:
    """Raises SettingsError for a setting below its least value."""
    for name, value in least.items():
        if getattr(settings, name) < value:
            raise SettingsError(f"{name} is {getattr(settings, name)}; it must be at least {value}{note}")
