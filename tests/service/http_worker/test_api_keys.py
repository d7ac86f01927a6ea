"""API keys: the file, and the requests of clients with and without a key on a real server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest

from benchmarks.processes import free_port
from tests.support.http import metric
from tests.support.images import encoded, random_image
from tests.support.rpc import INFER, method, rejection
from tests.support.server import Server, start_server
from tests.support.waiting import eventually, eventually_async
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.credentials.api_keys import ApiKeysError, read_api_keys
from vitserve.service.http_worker.exchange.clients import Activity, Allowance, Client, Clients
from vitserve.service.settings import Settings

IMAGE = encoded(random_image())
MOBILE, BATCH = "mobile-0123456789abcdef", "batch-0123456789abcdef"
HASH = hashlib.sha256(BATCH.encode()).hexdigest()
FILE = f"# clients\n\nmobile  {MOBILE}\nbatch sha256:{HASH}\n"


def is_logged(server: Server, text: str) -> bool:
    return text in "".join(server.log)


def replace_file(path: Path, text: str) -> None:
    """As editors and Kubernetes do."""
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys"


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(slow_bundle: Bundle, key_file: Path, grpc_port: int) -> Iterator[Server]:
    """With a network that takes tens of milliseconds, so that images are in flight."""
    key_file.write_text(FILE)
    options = "--api-keys", str(key_file), "--key-share", "0.25", "--slots", "32", "--max-images", "32"
    grpc_options = "--grpc-port", str(grpc_port), "--workers", "1"
    running = start_server("--bundle", str(slow_bundle.path), *options, *grpc_options, "--request-log", "all")
    yield running
    assert running.stop() == 0


@pytest.fixture
def client(server: Server, key_file: Path) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [bearer(MOBILE), {"X-API-Key": BATCH}, {"authorization": f"bearer  {BATCH}"}])
def test_a_known_key_is_accepted(client: httpx.Client, headers: dict[str, str]) -> None:
    assert client.post("/v1/classify", content=IMAGE, headers=headers).status_code == 200
    assert client.get("/v1/model", headers=headers).status_code == 200
    assert client.get("/v2", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        ({}, 'Bearer realm="vitserve"'),
        ({"Authorization": "Basic bW9iaWxl"}, 'Bearer realm="vitserve"'),
        (bearer(MOBILE[:-1]), 'Bearer realm="vitserve", error="invalid_token"'),
        (bearer(HASH), 'Bearer realm="vitserve", error="invalid_token"'),
        (bearer("mobile"), 'Bearer realm="vitserve", error="invalid_token"'),
    ],
    ids=["no key", "no bearer", "wrong key", "hash of a key", "name of a key"],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/classify"),
        ("POST", "/v1/embed"),
        ("GET", "/v1/model"),
        ("GET", "/v2"),
        ("POST", "/v2/models/x/infer"),
    ],
)
def test_others_are_rejected(
    client: httpx.Client, method: str, path: str, headers: dict[str, str], challenge: str
) -> None:
    response = client.request(method, path, headers=headers)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, challenge)
    assert "0123456789" not in response.text


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready"])
def test_probes_need_no_key(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200


def test_methods_of_grpc_need_a_key_except_probes(server: Server, key_file: Path, grpc_port: int) -> None:
    service, metadata = INFER.rpartition("/")[0], (("authorization", f"Bearer {BATCH}"),)
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        for path in (f"{service}/ServerLive", f"{service}/ServerReady", "/grpc.health.v1.Health/Check"):
            assert method(channel, path)(b"", timeout=60)
        for path in (INFER, f"{service}/ServerMetadata", f"{service}/ModelMetadata", f"{service}/RepositoryIndex"):
            failure = rejection(channel, path, b"")
            assert failure.code == "UNAUTHENTICATED"
            assert failure.trailers["www-authenticate"] == 'Bearer realm="vitserve"'
            assert rejection(channel, path, b"", metadata=(("x-api-key", "x" * 20),)).code == "UNAUTHENTICATED"
        assert method(channel, f"{service}/ServerMetadata")(b"", timeout=60, metadata=metadata)
        assert rejection(channel, INFER, b"", metadata=metadata).code == "NOT_FOUND"  # no model name, but a valid key


def test_the_file_is_read_again_when_it_changes(server: Server, client: httpx.Client, key_file: Path) -> None:
    def status(key: str) -> int:
        return client.get("/v1/model", headers=bearer(key)).status_code

    replace_file(key_file, FILE.replace(MOBILE, "another-0123456789abcdef"))
    try:
        eventually(lambda: status(MOBILE) == 401, "the key is revoked")
        assert status("another-0123456789abcdef") == status(BATCH) == 200
        replace_file(key_file, "mobile\n")  # damaged: the keys stay
        message = "the API keys stay as they are: line 1 of"
        eventually(lambda: status(BATCH) == 200 and is_logged(server, message), message)
    finally:
        replace_file(key_file, FILE)
    eventually(lambda: status(MOBILE) == 200, "the key is valid again")


def test_one_key_cannot_take_all_slots(server: Server, client: httpx.Client) -> None:
    """Other keys are served while one has as many images in flight as it may."""

    def send(key: str) -> httpx.Response:
        with httpx.Client(base_url=server.url, timeout=60) as own:
            return own.post("/v1/classify", content=IMAGE, headers=bearer(key))

    with ThreadPoolExecutor(25) as pool:
        flood = [pool.submit(send, BATCH) for _ in range(24)]
        eventually(lambda: metric(client, "vitserve_images_shed_total", reason="key") > 0, "an image is rejected")
        assert send(MOBILE).status_code == 200
        responses = [each.result() for each in flood]
    rejected = [response for response in responses if response.status_code == 429]
    assert 0 < len(rejected) < 24
    assert all(response.status_code in (200, 429) for response in responses)
    assert "the API key 'batch' has" in rejected[0].json()["detail"]
    assert "retry-after" in rejected[0].headers


def test_a_key_leaves_room_while_another_is_active() -> None:
    """Alone it has 8 of 32 slots. Beside another key it has as many images as run at once: here two."""
    shape = SimpleNamespace(slots_per_worker=32, workers=1)
    table: Any = SimpleNamespace(shape=shape, images_at_once=lambda *_: 2, image_seconds=lambda: 0.01)
    dispatcher: Any = SimpleNamespace(slot_table=table)
    activity, one, other = Activity(), Client("one"), Client("other")
    now = time.monotonic()
    activity.record(one, now)
    one.images = 7
    assert Allowance(one, 0.25, activity).rejection(1, dispatcher) is None
    assert Allowance(one, 0.25, activity).rejection(2, dispatcher) is not None
    activity.record(other, now)
    rejection = Allowance(one, 0.25, activity).rejection(1, dispatcher)
    assert rejection is not None
    assert "the API key 'one' has 7 images in flight; the limit is 2" in rejection.detail
    assert Allowance(other, 0.25, activity).rejection(9, dispatcher) is None  # a request alone is never too large
    activity.record(one, now)
    other.latest = now - 11  # seconds
    assert Allowance(one, 0.25, activity).rejection(1, dispatcher) is None


def test_few_rejections_are_delayed_at_a_time() -> None:
    """Connections that wait cannot be closed for those of others."""

    async def count() -> tuple[int, list[int]]:
        clients, answered = Clients(Settings()), list[int]()
        delayed = sum(clients.delay(partial(answered.append, number)) for number in range(100))
        await eventually_async(lambda: len(answered) == delayed, "all are answered")
        assert clients.delay(lambda: None)
        return delayed, answered

    delayed, answered = asyncio.run(count())
    assert delayed == 64
    assert sorted(answered) == list(range(64))


def test_a_request_with_more_images_than_the_share_is_not_rejected_alone(client: httpx.Client) -> None:
    body = {"images": [base64.b64encode(IMAGE).decode()] * 12}
    response = client.post("/v1/classify", json=body, headers=bearer(BATCH))
    assert [result.keys() for result in response.json()["results"]] == [{"predictions"}] * 12


def test_the_request_log_names_the_key_and_never_shows_it(server: Server, client: httpx.Client) -> None:
    client.post("/v1/classify", content=IMAGE, headers=bearer(MOBILE) | {"X-Request-ID": "named"})
    eventually(lambda: is_logged(server, "id=named"), "the request is logged")
    (line,) = (line for line in server.log if "id=named" in line)
    assert "key=mobile images=1" in line
    assert not is_logged(server, MOBILE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mobile", "line 1"),
        (f"a {MOBILE}\nb short", "line 2"),
        (f"a {MOBILE} c", "line 1"),
        ("a sha256:12", "line 1"),
        (f"a {MOBILE}\nb {MOBILE}", "line 2 .* has the key of 'a' again"),
        ("schlüssel 0123456789abcdef", "cannot be read"),
    ],
)
def test_an_invalid_file_is_rejected_without_showing_a_key(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ApiKeysError, match=reason) as raised:
        read_api_keys(path)
    assert MOBILE not in str(raised.value)


def test_the_service_does_not_start_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="api_keys: the API keys cannot be read from"):
        start_server("--api-keys", str(tmp_path / "missing"))
