"""gRPC while images wait: cancellation, overload, reload, and the end of the service. And how it starts."""

from __future__ import annotations

import importlib.util
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from benchmarks.processes import free_port
from tests.support.http import metric
from tests.support.images import encoded, random_image
from tests.support.processes import reload, serving
from tests.support.rpc import INFER, NAME, RpcService, failure_of, image_input, method
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.http_settings import SettingsError
from vitserve.service.settings import Settings
from vitserve.service.supervisor import launch

IMAGE = encoded(random_image(), "JPEG")


@pytest.fixture(scope="module")
def slow(slow_bundle: Bundle) -> Iterator[RpcService]:
    """Its network takes tens of milliseconds for an image."""
    port = free_port()
    options = ("--grpc-port", str(port), "--timeout-ms", "60000", "--max-connections", "8")
    with serving("--bundle", str(slow_bundle.path), *options) as running:
        yield RpcService(running, f"127.0.0.1:{port}")


@pytest.fixture(scope="module")
def http(slow: RpcService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=slow.running.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def waiting(slow: RpcService) -> Iterator[Any]:
    """Begins a request of 40 images, and returns once they wait."""
    with grpc.insecure_channel(slow.address) as channel, httpx.Client(base_url=slow.running.url, timeout=60) as http:

        def begin() -> Any:
            tensor = image_input([IMAGE] * 40)
            fields = {"model_name": "slow", "inputs": [tensor._get_tensor()]}
            message = triton.service_pb2.ModelInferRequest(**fields, raw_input_contents=[tensor._get_content()])
            infer: Any = channel.unary_unary(INFER)
            call = infer.future(message.SerializeToString())
            eventually(lambda: metric(http, "vitserve_images_in_flight") >= 16, "the images wait")
            return call

        yield begin


def test_a_cancelled_request_withdraws_its_images(waiting: Any, http: httpx.Client) -> None:
    labels = {"route": INFER, "status": "499"}
    call = waiting()
    completed = metric(http, "vitserve_images_total", outcome="ok")
    call.cancel()
    eventually(lambda: metric(http, "vitserve_requests_total", **labels) == 1, "the request ends")
    eventually(lambda: metric(http, "vitserve_images_in_flight") == 0, "the slots are free")
    assert metric(http, "vitserve_images_total", outcome="ok") == completed


def test_overload_is_rejected_with_the_time_of_a_retry(slow: RpcService) -> None:
    with grpc.insecure_channel(slow.address) as channel:
        tensor = image_input([IMAGE])
        message = triton.service_pb2.ModelInferRequest(
            model_name="slow",
            inputs=[tensor._get_tensor()],
            raw_input_contents=[tensor._get_content()],
            parameters={"timeout": {"int64_param": 1000}},
        )
        with pytest.raises(grpc.RpcError) as raised:
            method(channel, INFER)(message.SerializeToString(), timeout=60)
    failure = failure_of(raised.value)
    assert (failure.code, failure.details.partition(":")[0]) == ("RESOURCE_EXHAUSTED", "overloaded")
    assert int(failure.trailers["grpc-retry-pushback-ms"]) >= 1
    assert failure.trailers["retry-after"] == "1"


def is_live(channel: grpc.Channel) -> bool:
    try:
        return method(channel, "/inference.GRPCInferenceService/ServerLive")(b"", timeout=60) == b"\x08\x01"
    except grpc.RpcError as error:
        if failure_of(error).code != "UNAVAILABLE":
            raise
        return False


def own_connection(slow: RpcService, number: int) -> grpc.Channel:
    options = [("grpc.use_local_subchannel_pool", 1), ("number", number)]
    return grpc.insecure_channel(slow.address, options=options)


def test_the_number_of_connections_is_bounded(slow: RpcService) -> None:
    with ExitStack() as stack:
        channels = [stack.enter_context(own_connection(slow, number)) for number in range(9)]
        live = [is_live(channel) for channel in channels]
        assert live[0]
        assert not live[-1]

    def connects_again() -> bool:
        with own_connection(slow, 9) as channel:
            return is_live(channel)

    eventually(connects_again, "a connection is free")


@pytest.mark.slow
def test_a_stop_answers_admitted_requests_and_ends_idle_connections(slow: RpcService, waiting: Any) -> None:
    """The last test of this server."""
    with triton.InferenceServerClient(slow.address) as idle:
        assert idle.is_server_live()
        calls = [waiting() for _ in range(2)]
        slow.running.process.send_signal(signal.SIGTERM)
        slow.running.wait_for("supervisor: draining")
        for call in calls:
            answer = triton.service_pb2.ModelInferResponse.FromString(call.result(timeout=60))
            assert answer.outputs[0].shape[0] == 40
        assert slow.running.process.wait(60) == 0


@pytest.mark.slow
def test_reloads_under_load_lose_nothing(rpc: RpcService) -> None:
    failures, counts, stop = list[Exception](), [0] * 4, threading.Event()

    def send(index: int) -> None:
        with triton.InferenceServerClient(rpc.address) as client:
            first = client.infer(NAME, [image_input([IMAGE])]).as_numpy("logits")
            while not stop.is_set() and not failures:
                try:
                    result = client.infer(NAME, [image_input([IMAGE])]).as_numpy("logits")
                    np.testing.assert_allclose(result, first, atol=1e-4)
                except (InferenceServerException, AssertionError) as error:
                    failures.append(error)
                counts[index] += 1

    threads = [threading.Thread(target=send, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    try:
        with httpx.Client(base_url=rpc.running.url, timeout=60) as http:
            for _ in range(2):
                more = min(counts) + 5
                eventually(lambda: failures or min(counts) > more, "requests between reloads")  # noqa: B023
                assert reload(http).status_code == 200
        eventually(lambda: failures or min(counts) > more + 10, "requests to the last model")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures


def test_a_port_that_is_in_use_is_an_error(rpc: RpcService) -> None:
    """Although the sockets of the HTTP workers would share it."""
    settings = Settings(grpc_port=int(rpc.address.partition(":")[2]))
    with pytest.raises(OSError, match="Address already in use"), launch.reserved_grpc_port(settings):
        pass


@pytest.mark.parametrize("missing", ["grpc", "google.protobuf"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    message = r"grpc_port needs .*: pip install 'vitserve\[grpc\]'"
    with pytest.raises(SettingsError, match=message), launch.reserved_grpc_port(Settings(grpc_port=1)):
        pass
