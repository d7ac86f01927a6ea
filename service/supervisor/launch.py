"""serve(): resolves the settings that depend on the machine, opens the port, and runs the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import os
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from vitserve.service import machine
from vitserve.service.credentials.api_keys import ApiKeysError, read_api_keys
from vitserve.service.credentials.certificate import CertificateError, CertificateFiles
from vitserve.service.engines.catalog import wants_gpu_workers
from vitserve.service.ipc import metrics_directory
from vitserve.service.ipc.child_runtime import BACKLOG
from vitserve.service.ipc.control_channel import METRICS_DIR
from vitserve.service.log_format import set_up_logging
from vitserve.service.settings import LEAST_IMAGE_MEMORY_BYTES, Settings, SettingsError
from vitserve.service.supervisor.children import SupervisorGaveUpError
from vitserve.service.supervisor.supervisor import Supervisor

log = logging.getLogger("vitserve.supervisor")

GPU_DECODE_THREADS = (
    32  # per HTTP worker; they wait for the GPU, which decodes the images of all waiting threads together
)
MOST_IMAGE_MEMORY_BYTES = 4 * 2**30  # unless a setting allows more


def serve(settings: Settings) -> int:
    """Blocks until SIGTERM or SIGINT. Returns the exit status: 0 if every admitted request was answered.

    Raises SettingsError, and OSError if it cannot listen on the address or has no room for the metrics files.
    """
    set_up_logging("supervisor", settings.log_level, settings.log_format)
    raise_open_files_limit()
    check_api_keys(settings)
    check_certificate(settings)
    if settings.otlp_endpoint:
        check_installed("otlp_endpoint", "otel", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    light_workers = settings.workers or _most_workers(settings, machine.cores())
    settings = for_this_machine(settings, machine.cores())
    names = metrics_directory.process_names(max(light_workers, settings.workers), settings.engines)
    directory = metrics_directory.create(list(names))
    os.environ[METRICS_DIR] = directory  # inherited by the child processes
    scheme = "https" if settings.tls_certificate else "http"
    try:
        with (
            _listen(settings.host, settings.port, f"running on {scheme}") as listener,
            _listen_also(settings.host, settings.admin_port, f"metrics and administration on {scheme}") as admin,
            _listen_also(settings.host, settings.probe_port, "liveness probes on http") as probes,
            reserved_grpc_port(settings),
        ):
            return asyncio.run(Supervisor(settings, listener, light_workers, admin, probes).run())
    except SupervisorGaveUpError as error:
        log.critical("giving up: %s", error)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_api_keys(settings: Settings) -> None:
    """Raises SettingsError if the file of API keys is not valid."""
    if settings.api_keys:
        try:
            count = len(read_api_keys(Path(settings.api_keys)))
        except ApiKeysError as error:
            raise SettingsError(f"api_keys: {error}") from error
        log.info("requests need one of %d API keys", count)


def check_certificate(settings: Settings) -> None:
    """Raises SettingsError if the files are not valid."""
    if settings.tls_certificate:
        try:
            CertificateFiles(Path(settings.tls_certificate), Path(settings.tls_key))
        except CertificateError as error:
            raise SettingsError(f"tls_certificate and tls_key: {error}") from error


@contextlib.contextmanager
def reserved_grpc_port(settings: Settings) -> Iterator[None]:
    """Keeps grpc_port for the HTTP workers, each of which listens on it with a socket of its own.

    Raises SettingsError if a package is missing, and OSError if the port is in use.
    """
    if not settings.grpc_port:
        yield
        return
    check_installed("grpc_port", "grpc", "grpc", "google.protobuf")
    family, address = _family(settings.host), (settings.host, settings.grpc_port)
    socket.create_server(address, family=family).close()  # fails if another service has it, even with SO_REUSEPORT
    with socket.socket(family, socket.SOCK_STREAM) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(address)
        log.info("gRPC on %s:%d", f"[{settings.host}]" if ":" in settings.host else settings.host, settings.grpc_port)
        yield


def check_installed(setting: str, extra: str, *modules: str) -> None:
    """Raises SettingsError if a module is missing."""
    missing = [module for module in modules if not _is_installed(module)]
    if missing:
        raise SettingsError(f"{setting} needs {' and '.join(missing)}: pip install 'vitserve[{extra}]'")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def raise_open_files_limit() -> None:
    """Raises the limit of open files to its hard limit, for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # macOS has a lower limit than the one that it reports
        log.info("the limit of open files stays %d: %s", soft, error)


def for_this_machine(settings: Settings, cores: int) -> Settings:
    """Replaces the settings that are 0 (automatic) by values for this machine. Raises SettingsError."""
    workers = settings.workers or _most_workers(settings, cores // 4)
    engines = settings.engines or (max(1, len(machine.gpus())) if wants_gpu_workers(settings.engine) else 1)
    threads = settings.decode_threads or (GPU_DECODE_THREADS if settings.decode == "gpu" else max(1, cores // workers))
    automatic = min(MOST_IMAGE_MEMORY_BYTES, max(LEAST_IMAGE_MEMORY_BYTES, machine.memory_limit() // 2))
    memory = settings.image_memory_bytes or automatic
    return dataclasses.replace(
        settings, workers=workers, engines=engines, decode_threads=threads, image_memory_bytes=memory
    )


def _most_workers(settings: Settings, cores: int) -> int:
    """The number of HTTP workers if they may use so many cores."""
    return max(1, min(8, cores, settings.slots // settings.max_images))


def _listen(host: str, port: int, purpose: str) -> socket.socket:
    listener = socket.create_server((host, port), family=_family(host), backlog=BACKLOG)
    log.info("%s://%s:%d", purpose, f"[{host}]" if ":" in host else host, listener.getsockname()[1])
    return listener


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _listen_also(host: str, port: int, purpose: str) -> contextlib.AbstractContextManager[socket.socket | None]:
    """``port``: 0 for none."""
    return _listen(host, port, purpose) if port else contextlib.nullcontext()
