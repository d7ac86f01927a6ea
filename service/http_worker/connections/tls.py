"""TLS on accepted connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitserve.service.credentials.certificate import CertificateFiles
from vitserve.service.http_worker.connections.limits import LINGER_SECONDS, ConnectionLimits
from vitserve.service.settings import Settings

_HANDSHAKE_SHARE = 4  # at most one of so many connections may be in its handshake


class Tls:
    def __init__(self, settings: Settings, limits: ConnectionLimits) -> None:
        self.certificate = CertificateFiles(Path(settings.tls_certificate), Path(settings.tls_key))
        self.most_handshakes = max(1, limits.connections // _HANDSHAKE_SHARE)
        self.options: dict[str, Any] = {  # for create_server()
            "ssl": self.certificate.first_context,
            "ssl_handshake_timeout": limits.first_request_seconds,
            "ssl_shutdown_timeout": LINGER_SECONDS,
        }

    async def connect(
        self,
        loop: asyncio.AbstractEventLoop,
        create_protocol: Callable[[], asyncio.Protocol],
        connection: socket.socket,
    ) -> None:
        """Ends after the handshake. The connection is closed if it fails, takes too long, or is cancelled."""
        options = {**self.options, "ssl": self.certificate.context}
        await loop.connect_accepted_socket(create_protocol, connection, **options)
