"""POST /v1/explain on a real server: formats, options, and a process that fails."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support.images import encoded, random_image
from tests.support.processes import HTTP_WORKER, has_exited, kill, serving
from tests.support.server import Server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.http_worker.explain.explainer import MOST_WAITING

IMAGE = encoded(random_image(60, 50), "JPEG")
EXPLAIN_WORKER = "vitserve.service.explain_worker"


def explain_workers(server: Server) -> list[psutil.Process]:
    [worker] = server.pids(HTTP_WORKER)
    return [child for child in psutil.Process(worker).children() if EXPLAIN_WORKER in child.cmdline()]


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Server]:
    with serving("--bundle", str(bundle.path), "--precision", "fp32") as running:
        yield running
        children = explain_workers(running)
        assert running.stop() == 0
        assert all(has_exited(child.pid) for child in children)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def explained(client: httpx.Client, **parameters: Any) -> dict[str, Any]:
    response = client.post("/v1/explain", params=parameters, content=IMAGE)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


@pytest.mark.parametrize("method", ["auto", "rollout", "attention", "occlusion"])
def test_a_map_has_values_from_0_to_1(client: httpx.Client, method: str) -> None:
    body = explained(client, method=method)
    grid = np.array(body["grid"])
    assert grid.ndim == 2
    assert 0 <= grid.min() <= grid.max() <= 1
    assert body["method"] == ("rollout" if method == "auto" else method)
    assert body["model"] == "tiny"


def test_layers_and_heads_differ(client: httpx.Client) -> None:
    layers = explained(client)["layers"]
    grids = [explained(client, method="rollout", layer=layer)["grid"] for layer in range(1, layers + 1)]
    assert all(one != other for one, other in itertools.pairwise(grids))
    heads = explained(client, method="attention", layer=1)["heads"]
    assert heads >= 2
    one, two = (explained(client, method="attention", layer=1, head_index=head)["grid"] for head in (1, 2))
    assert one != two


@pytest.mark.parametrize("form", ["heatmap", "overlay"])
def test_heat_maps_are_png(client: httpx.Client, form: str) -> None:
    response = client.post("/v1/explain", params={"format": form}, content=IMAGE)
    assert response.headers["content-type"] == "image/png"
    shown = Image.open(io.BytesIO(response.content))
    assert min(shown.size) >= 256


@pytest.mark.parametrize(
    ("parameters", "detail"),
    [
        ({"method": "x"}, "method is 'x'; it must be auto or rollout or attention or occlusion"),
        ({"layer": 1}, "layer has no effect with method=auto; it needs rollout or attention"),
        ({"method": "rollout", "head_index": 1}, "head_index has no effect with method=rollout"),
        ({"method": "rollout", "layer": 99}, "layer is 99; the network has layers 1 to"),
        ({"method": "attention", "head_index": 99}, "head_index is 99; the layer has heads 1 to"),
        ({"method": "occlusion", "class": 99}, "class is 99; the model has classes 0 to"),
        ({"top_k": 1}, "unknown query parameter 'top_k'"),
    ],
)
def test_wrong_options_are_explained(client: httpx.Client, parameters: dict[str, Any], detail: str) -> None:
    response = client.post("/v1/explain", params=parameters, content=IMAGE)
    assert response.status_code == 400
    assert detail in response.json()["detail"]


@pytest.mark.parametrize(("content", "code"), [(b"text", "not_an_image"), (IMAGE[:200], "damaged_image")])
def test_images_that_cannot_be_decoded_are_rejected(client: httpx.Client, content: bytes, code: str) -> None:
    response = client.post("/v1/explain", content=content)
    assert (response.status_code, response.json()["code"]) == (422, code)


def test_a_process_that_was_killed_is_replaced(server: Server, client: httpx.Client) -> None:
    explained(client)
    [child] = explain_workers(server)
    kill(child.pid)
    eventually(lambda: client.post("/v1/explain", content=IMAGE).status_code == 200, "another process explains")
    assert client.post("/v1/classify", content=IMAGE).status_code == 200


def send(server: Server) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/explain", content=IMAGE, timeout=60)


def fill(server: Server, pool: ThreadPoolExecutor) -> list[Future[httpx.Response]]:
    """Sends one image more than may wait, and returns the others once it has been rejected."""
    sent = [pool.submit(send, server) for _ in range(MOST_WAITING + 1)]
    rejected = next(as_completed(sent))
    assert rejected.result().status_code == 429
    return [each for each in sent if each is not rejected]


def test_further_images_are_rejected_while_others_wait(server: Server, client: httpx.Client) -> None:
    explained(client)
    [child] = explain_workers(server)
    with ThreadPoolExecutor(MOST_WAITING + 1) as pool:
        child.suspend()
        waiting = fill(server, pool)
        child.resume()
        assert [each.result().status_code for each in waiting] == [200] * MOST_WAITING
    assert explained(client)


def test_explanations_do_not_hold_up_a_stop(bundle: Bundle) -> None:
    with (
        serving("--bundle", str(bundle.path), "--precision", "fp32") as running,
        ThreadPoolExecutor(MOST_WAITING + 1) as pool,
    ):
        assert send(running).status_code == 200
        [child] = explain_workers(running)
        child.suspend()  # the image that is being explained never ends
        waiting = fill(running, pool)
        assert running.stop() == 0
        assert [each.result().status_code for each in waiting] == [503] * MOST_WAITING
        assert "forced shutdown" not in "".join(running.log)


def test_the_route_and_the_page_can_be_disabled(bundle: Bundle) -> None:
    with (
        serving("--bundle", str(bundle.path), "--no-explanations", "--no-page") as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        assert client.post("/v1/explain", content=IMAGE).status_code == 404
        assert client.get("/").status_code == 404
