"""The gRPC server of an HTTP worker, on its event loop.

Every HTTP worker listens on the same port with a socket of its own (SO_REUSEPORT), because the library does not take
over a socket. The kernel spreads connections over them.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from vitserve.service.credentials.certificate import CertificateFiles
from vitserve.service.http_worker.connections.limits import LINGER_SECONDS, ConnectionLimits
from vitserve.service.http_worker.gauges import gauges
from vitserve.service.http_worker.rpc.methods import Methods
from vitserve.service.http_worker.rpc.reading import MessageReader
from vitserve.service.http_worker.state import State
from vitserve.service.metrics import Exposition
from vitserve.service.settings import Settings

MOST_STREAMS = 256  # of a connection at a time; a client waits before it sends more
_LEAST_PING_MS = 10_000  # clients that ping more often are disconnected
_PING_TIMEOUT_MS = 20_000


class RpcServer:
    def __init__(self, state: State, limits: ConnectionLimits, host: str) -> None:
        """``host``: a numeric address. Raises RuntimeError if the port is in use."""
        settings = state.settings
        self._state = state
        self._server = grpc.aio.server(
            options=_options(state, limits),
            maximum_concurrent_rpcs=limits.connections,
        )
        reader = MessageReader(state.body_memory.capacity, settings.max_body_bytes, settings.body_seconds)
        exposition = Exposition(lambda: gauges(state), state.stored_metrics)
        for service, methods in Methods(state, exposition, reader).handlers().items():
            handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
            handlers = {name: grpc.stream_unary_rpc_method_handler(handler) for name, handler in methods.items()}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        address = f"{f'[{host}]' if ':' in host else host}:{settings.grpc_port}"
        if settings.tls_certificate:
            self._server.add_secure_port(address, _credentials(settings))
        else:
            self._server.add_insecure_port(address)

    async def start(self) -> None:
        await self._server.start()

    async def drain(self) -> None:
        """Ends when every request has its response. New ones are answered for another moment."""
        await asyncio.sleep(LINGER_SECONDS)
        await self._server.stop(self._state.settings.drain_seconds)


def _credentials(settings: Settings) -> grpc.ServerCredentials:
    """The library looks for a new certificate at every handshake."""
    files = CertificateFiles(Path(settings.tls_certificate), Path(settings.tls_key))
    pem = files.pem()

    def latest() -> grpc.ServerCertificateConfiguration:
        nonlocal pem
        if files.refresh():
            pem = files.pem()
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)])

    return grpc.dynamic_ssl_server_credentials(latest(), latest)


def _options(state: State, limits: ConnectionLimits) -> list[tuple[str, int]]:
    settings = state.settings
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", MOST_STREAMS),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_metadata_size", settings.max_header_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_header_bytes),
        ("grpc.server_handshake_timeout_ms", round(settings.first_request_seconds * 1000)),
        ("grpc.http2.settings_timeout", round(settings.first_request_seconds * 1000)),
        ("grpc.max_connection_idle_ms", round(settings.keep_alive_seconds * 1000)),
        ("grpc.keepalive_time_ms", round(settings.keep_alive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_MS),
    ]
