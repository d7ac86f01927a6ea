"""A server that answers gRPC too, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import grpc
import pytest
import tritonclient.grpc as triton

from benchmarks.processes import free_port
from tests.support.processes import ADMIN_KEY, serving, wait_for_lines
from tests.support.rpc import MAX_BODY_BYTES, RpcService
from vitserve.model.bundle.bundle import Bundle


@pytest.fixture(scope="package")
def rpc(bundle: Bundle) -> Iterator[RpcService]:
    """With two HTTP workers, which share the port."""
    port = free_port()
    options = ("--workers", "2", "--admin-key", ADMIN_KEY, "--timeout-ms", "60000", "--request-log", "all")
    limits = ("--max-body-bytes", str(MAX_BODY_BYTES))
    model = ("--bundle", str(bundle.path), "--precision", "fp32")
    with serving(*model, "--grpc-port", str(port), *options, *limits) as running:
        wait_for_lines(running, "vitserve.http_worker: ready", 2)
        yield RpcService(running, f"127.0.0.1:{port}")


@pytest.fixture(scope="package")
def client_of_triton(rpc: RpcService) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(rpc.address) as client:
        yield client


@pytest.fixture(scope="package")
def channel(rpc: RpcService) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(rpc.address) as channel:
        yield channel


@pytest.fixture
def model(bundle: Bundle) -> SimpleNamespace:
    """The part of the description of a model that parsing reads."""
    manifest = bundle.manifest
    return SimpleNamespace(
        name=manifest.name, version=manifest.version, preprocessing=manifest.preprocessing, labels=bundle.labels
    )
