"""The clients with a real server: results, errors, overload, and a restart."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.http import metric
from tests.support.images import encoded, random_image
from tests.support.processes import HTTP_WORKER, kill
from tests.support.server import Server, start_server
from vitserve.client import (
    AsyncClient,
    Classification,
    Client,
    ConnectionFailedError,
    Embedding,
    ImageError,
    RequestError,
    VitserveError,
)
from vitserve.model.bundle.bundle import Bundle

IMAGES = [encoded(random_image(seed=seed)) for seed in range(150)]
PATIENT = 60.0  # seconds, for a machine that is busy


def test_results_are_those_of_the_routes(server: Server, client: httpx.Client, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(IMAGES[0])
    with Client(server.url, timeout_seconds=PATIENT, priority=9) as vitserve:
        for image in (IMAGES[0], path):
            classification = vitserve.classify(image, top_k=3, embedding=True)
            body = client.post("/v1/classify?top_k=3&embedding=true", content=IMAGES[0]).json()
            (result,) = body["results"]
            shown = [(item.label, item.index, item.probability) for item in classification.predictions]
            assert shown == [(item["label"], item["index"], item["probability"]) for item in result["predictions"]]
            assert (classification.model, classification.version) == (body["model"], body["version"])
            assert classification.embedding is not None
            np.testing.assert_allclose(classification.embedding.tolist(), result["embedding"], rtol=1e-6)
        embedding = vitserve.embed(IMAGES[0], normalize=True)
        assert np.linalg.norm(np.asarray(embedding)) == pytest.approx(1.0)
        assert np.asarray(embedding).tolist() == embedding.tolist()
        model = vitserve.model()
        assert (model.name, model.max_images, list(model.labels)) == (
            "tiny",
            64,
            client.get("/v1/model").json()["labels"],
        )


def test_more_images_than_a_request_may_have_stay_in_order(server: Server, client: httpx.Client) -> None:
    before = metric(client, "vitserve_requests_total", route="/v1/classify")
    images = [*IMAGES[:100], b"not an image", *IMAGES[100:]]
    with Client(server.url, timeout_seconds=PATIENT) as vitserve:
        outcomes = vitserve.classify_many(images, top_k=1)
        assert metric(client, "vitserve_requests_total", route="/v1/classify") == before + 3
        assert isinstance(outcomes.pop(100), ImageError)
        assert all(isinstance(outcome, Classification) for outcome in outcomes)
        assert vitserve.classify_many([]) == []

        async def embed() -> list[object]:
            async with AsyncClient(server.url, timeout_seconds=PATIENT) as asynchronous:
                single = [await asynchronous.embed(image) for image in (IMAGES[0], IMAGES[99])]
                several = await asynchronous.embed_many(IMAGES)
                assert len(several) == len(IMAGES)
                return [*single, several[0], several[99]]

        first, last, *in_batch = (item for item in asyncio.run(embed()) if isinstance(item, Embedding))
        for one, other in zip((first, last), in_batch, strict=True):
            np.testing.assert_allclose(one.tolist(), other.tolist(), rtol=1e-4, atol=1e-5)


def test_errors_have_the_problem(server: Server) -> None:
    with Client(server.url, timeout_seconds=PATIENT, headers={"X-Request-ID": "mine"}) as vitserve:
        with pytest.raises(ImageError) as unreadable:
            vitserve.classify(b"not an image")
        assert (unreadable.value.code, unreadable.value.request_id) == ("not_an_image", "mine")
        for call in (vitserve.classify, lambda image, top_k: vitserve.classify_many([image, image], top_k=top_k)):
            with pytest.raises(RequestError, match="top_k is 1000"):
                call(IMAGES[0], top_k=1000)


@pytest.fixture(scope="module")
def crowded(slow_bundle: Bundle) -> Iterator[Server]:
    """A server with four slots, which rejects all images beyond them."""
    slots = ("--slots", "4", "--max-images", "4", "--max-batch", "1", "--streams", "1")
    running = start_server("--bundle", str(slow_bundle.path), *slots)
    yield running
    assert running.stop() == 0


def test_rejected_images_are_admitted_later(crowded: Server) -> None:
    """Also those of a request whose other images were admitted."""

    async def classify() -> list[list[Classification | VitserveError]]:
        async with AsyncClient(crowded.url, timeout_seconds=PATIENT, deadline_seconds=PATIENT) as vitserve:
            return await asyncio.gather(*(vitserve.classify_many(IMAGES[:6]) for _ in range(4)))

    first, *others = asyncio.run(classify())
    assert all(isinstance(outcome, Classification) for outcome in first)
    assert all(labels(outcomes) == labels(first) for outcomes in others)
    with httpx.Client(base_url=crowded.url) as client:
        assert metric(client, "vitserve_images_shed_total", reason="full") > 0


def test_requests_survive_the_end_of_their_http_worker(crowded: Server) -> None:
    (worker,) = crowded.pids(HTTP_WORKER)
    busy = threading.Event()

    def classify(client: Client, image: bytes) -> Classification:
        busy.set()
        return client.classify(image)

    with (
        Client(crowded.url, timeout_seconds=PATIENT, deadline_seconds=PATIENT) as vitserve,
        ThreadPoolExecutor(4) as threads,
    ):
        expected = [vitserve.classify(image) for image in IMAGES[:2]]
        found = [threads.submit(classify, vitserve, image) for image in IMAGES[:2] * 4]
        busy.wait()
        kill(worker)
        assert [future.result().predictions[0].label for future in found] == labels(expected) * 4
    assert crowded.pids(HTTP_WORKER) != [worker]


def labels(outcomes: Sequence[Classification | VitserveError]) -> list[str]:
    return [outcome.predictions[0].label for outcome in outcomes if isinstance(outcome, Classification)]


@pytest.mark.slow
def test_a_restart_is_waited_for(bundle: Bundle) -> None:
    """Requests that are sent while the server does not run succeed once it runs."""
    running = start_server("--bundle", str(bundle.path))
    with Client(running.url, timeout_seconds=PATIENT, deadline_seconds=PATIENT) as vitserve:
        expected = vitserve.classify(IMAGES[0])
        assert running.stop() == 0
        with Client(running.url, deadline_seconds=0.2) as impatient, pytest.raises(ConnectionFailedError):
            impatient.classify(IMAGES[0])
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(vitserve.classify, IMAGES[0])
            again = start_server("--bundle", str(bundle.path), "--port", running.url.rpartition(":")[2])
            assert waiting.result() == expected
        assert again.stop() == 0


def test_httpx_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "vitserve.client.clients")
    with pytest.raises(ImportError, match=r'pip install "vitserve\[client\]"'):
        importlib.import_module("vitserve.client.clients")
