"""The certificate of TLS and its private key, in files of PEM."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import NamedTuple

from vitserve.service.credentials.watched_file import WatchedFiles

log = logging.getLogger(__name__)


class CertificateError(ValueError):
    """The files cannot be read, or the key does not belong to the certificate."""


class Pem(NamedTuple):
    chain: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Pem()"  # without the key


class CertificateFiles:
    """Follows changes of the files. If they are not valid, the certificate stays as it is, and an error is logged."""

    def __init__(self, chain: Path, key: Path) -> None:
        """``chain``: the certificate, followed by those of intermediate authorities. Raises CertificateError."""
        self._chain, self._key = chain, key
        self._files = WatchedFiles(chain, key)
        self._files.changed()
        self.context = self._read()  # for the next connection
        # For servers that keep it. Beside a new certificate, they keep the old one of another type of key.
        self.first_context = self.context

    def refresh(self) -> bool:
        """Whether there is a new certificate. Call it about once a second."""
        if not self._files.changed():
            return False
        try:
            context = self._read()
            self.first_context.load_cert_chain(self._chain, self._key, password=_no_password)
        except (CertificateError, OSError) as error:
            log.error("the certificate stays as it is: %s", error)
            return False
        self.context = context
        log.info("the certificate has been read again from %s", self._chain)
        return True

    def pem(self) -> Pem:
        """The files' contents. Raises OSError."""
        return Pem(self._chain.read_bytes(), self._key.read_bytes())

    def _read(self) -> ssl.SSLContext:
        """TLS 1.2 or 1.3, with Python's choice of ciphers."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._chain, self._key, password=_no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise CertificateError(f"{self._chain} and {self._key} are no certificate and its key: {error}") from error
        return context


def _no_password() -> str:
    """OpenSSL would read the password of an encrypted key from the terminal."""
    raise ValueError("the key is encrypted; store it without a password")
