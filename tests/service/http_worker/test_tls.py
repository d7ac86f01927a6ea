"""TLS with certificate files: HTTP and gRPC, a new certificate, unfinished handshakes, and the end of the service."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from benchmarks.processes import free_port
from tests.support.http import metric
from tests.support.images import encoded, random_image
from tests.support.rpc import INFER, method
from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.settings import Settings, SettingsError
from vitserve.service.supervisor.launch import check_certificate

IMAGE = encoded(random_image())
HANDSHAKES = 4  # a quarter of max_connections may be unfinished


class Service(NamedTuple):
    running: Server
    authority: trustme.CA
    directory: Path
    grpc_address: str
    admin_url: str

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.running.url.rpartition(":")[2])

    @property
    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.running.url, verify=self.trust, timeout=60)

    def serial_number(self, address: tuple[str, int]) -> object:
        """Of the certificate that a new connection gets."""
        with (
            socket.create_connection(address) as plain,
            self.trust.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            return (tls.getpeercert() or {})["serialNumber"]


def write_certificate(authority: trustme.CA, directory: Path) -> None:
    """Replaces each file at once, as cert-manager does."""
    certificate = authority.issue_cert("127.0.0.1")
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    for name, content in (("key.pem", certificate.private_key_pem.bytes()), ("chain.pem", chain)):
        (directory / "new").write_bytes(content)
        (directory / "new").replace(directory / name)


def options(directory: Path) -> tuple[str, ...]:
    return "--tls-certificate", str(directory / "chain.pem"), "--tls-key", str(directory / "key.pem")


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def service(
    request: pytest.FixtureRequest, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    directory, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    write_certificate(authority, directory)
    port, admin = free_port(), free_port()
    ports = "--grpc-port", str(port), "--admin-port", str(admin), "--max-connections", str(4 * HANDSHAKES)
    model = "--bundle", str(bundle.path), "--workers", str(request.param), "--max-body-bytes", "300000"
    running = start_server(*model, *options(directory), *ports)
    yield Service(running, authority, directory, f"127.0.0.1:{port}", f"https://127.0.0.1:{admin}")
    assert running.stop() == 0


def test_requests_are_answered(service: Service) -> None:
    assert service.running.url.startswith("https://")
    with service.client() as client:
        assert client.post("/v1/classify", content=IMAGE).status_code == 200
        assert client.post("/v1/embed", content=IMAGE).status_code == 200
        assert client.get("/readyz").status_code == 200
        rejected = client.post("/v1/classify", content=b"x" * 400_000)
        assert (rejected.status_code, rejected.json()["code"]) == (413, "body_too_large")
    with httpx.Client(base_url=service.admin_url, verify=service.trust) as admin:
        assert metric(admin, "vitserve_ready") == 1


def test_grpc_uses_the_certificate(service: Service) -> None:
    pem = service.authority.cert_pem.bytes()
    with grpc.secure_channel(service.grpc_address, grpc.ssl_channel_credentials(pem)) as channel:
        assert method(channel, f"{INFER.rpartition('/')[0]}/ServerLive")(b"", timeout=60)


@pytest.mark.parametrize("first", [b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01", b""])
def test_a_client_without_tls_gets_no_answer_of_http(service: Service, first: bytes) -> None:
    with socket.create_connection(service.address, 60) as connection:
        connection.sendall(first)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert b"HTTP/" not in connection.recv(65536)


def test_unfinished_handshakes_take_no_connection_from_others(service: Service) -> None:
    with ExitStack() as stack, service.client() as kept:
        assert kept.get("/livez").status_code == 200
        silent = [stack.enter_context(socket.create_connection(service.address, 60)) for _ in range(12 * HANDSHAKES)]
        with service.client() as client:
            assert client.post("/v1/classify", content=IMAGE).status_code == 200
        silent[0].settimeout(10)  # shorter than first_request_seconds
        with suppress(ConnectionResetError):
            assert silent[0].recv(1) == b""  # closed: it has waited longest
        assert kept.get("/livez").status_code == 200


def test_a_new_certificate_is_used_and_a_damaged_one_is_not(service: Service) -> None:
    host, port = service.grpc_address.split(":")
    addresses = service.address, (host, int(port)), (host, int(service.admin_url.rpartition(":")[2]))
    before = [service.serial_number(address) for address in addresses]
    with service.client() as kept:
        assert kept.get("/livez").status_code == 200
        (service.directory / "chain.pem").write_text("damaged")
        log = service.running.log
        eventually(lambda: "the certificate stays as it is" in "".join(log), "the error is logged")
        assert [service.serial_number(address) for address in addresses] == before
        write_certificate(service.authority, service.directory)
        for address, serial_number in zip(addresses, before, strict=True):
            eventually(lambda: service.serial_number(address) != serial_number, "the new certificate")  # noqa: B023
        assert kept.get("/livez").status_code == 200  # of a connection with the previous certificate
    assert "PRIVATE KEY" not in "".join(log)


def test_a_handshake_that_does_not_end_does_not_hold_up_a_stop(bundle: Bundle, tmp_path: Path) -> None:
    write_certificate(trustme.CA(), tmp_path)
    running = start_server("--bundle", str(bundle.path), *options(tmp_path), "--drain-seconds", "10")
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))):
        assert running.stop() == 0
    assert "forced shutdown" not in "".join(running.log)


def test_files_that_cannot_be_used_are_named_at_the_start(tmp_path: Path) -> None:
    authority = trustme.CA()
    write_certificate(authority, tmp_path)
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    check_certificate(Settings(tls_certificate=str(chain), tls_key=str(key)))
    with pytest.raises(SettingsError, match="need each other"):
        Settings(tls_certificate=str(chain))
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    encrypted = private.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"password"))
    other = authority.issue_cert("127.0.0.1").private_key_pem.bytes()
    for content in (encrypted, other, b"", chain.read_bytes()):
        key.write_bytes(content)
        with pytest.raises(SettingsError, match=r"tls_certificate and tls_key: .*chain\.pem and .*key\.pem are no"):
            check_certificate(Settings(tls_certificate=str(chain), tls_key=str(key)))
