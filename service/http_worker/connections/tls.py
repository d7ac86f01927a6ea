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
        # For connect_accepted_socket() and create_server()
        self.options: dict[str, Any] = {
            "ssl": self.certificate.context,
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
        await loop.connect_accepted_socket(create_protocol, connection, **self.options)
