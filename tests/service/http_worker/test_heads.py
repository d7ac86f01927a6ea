"""Heads: further classifiers on the embeddings of one network, added while the service runs."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.http import metric
from tests.support.images import encoded, random_image
from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.model.bundle.head import Head, backbone_of, write_head

IMAGES = [encoded(random_image(seed=seed), "JPEG") for seed in range(4)]
FORM = [("image", ("name", image)) for image in IMAGES]
COLORS = ("red", "green", "blue")


def head_of(bundle: Bundle, name: str, labels: tuple[str, ...] = COLORS, seed: int = 0, **fields: Any) -> Head:
    random, width = np.random.default_rng(seed), bundle.golden().reference.embedding.shape[1]
    weight = random.standard_normal((len(labels), width)).astype(np.float32)
    bias = random.standard_normal(len(labels)).astype(np.float32)
    return Head(name, labels, weight, bias, backbone_of(bundle.manifest.files), **fields)


@pytest.fixture(scope="module")
def own_bundle(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy, which the tests change."""
    return open_bundle(Path(shutil.copytree(bundle.path, tmp_path_factory.mktemp("heads") / "tiny")))


@pytest.fixture(scope="module")
def server(own_bundle: Bundle) -> Iterator[Server]:
    running = start_server("--bundle", str(own_bundle.path), "--precision", "fp32")
    yield running
    assert running.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def serve_head(client: httpx.Client, bundle: Bundle, head: Head) -> None:
    write_head(bundle.path, head)
    served = {"name": head.name, "version": head.version}
    eventually(
        lambda: any(served.items() <= each.items() for each in client.get("/v1/model").json()["heads"]),
        "the head is served",
    )


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_head_classifies_the_embedding(client: httpx.Client, own_bundle: Bundle, activation: Any) -> None:
    head = head_of(own_bundle, "colors", seed=len(activation), activation=activation)
    serve_head(client, own_bundle, head)
    response = client.post("/v1/classify", params={"head": "colors", "top_k": 3, "embedding": "true"}, files=FORM)
    assert response.status_code == 200
    for result in response.json()["results"]:
        embedding = np.array(result["embedding"], np.float32)
        expected = dict(zip(COLORS, head.probabilities(embedding).tolist(), strict=True))
        found = {each["label"]: each["probability"] for each in result["predictions"]}
        assert found == pytest.approx(expected, abs=1e-6)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_other_requests_are_not_changed_by_a_head(client: httpx.Client, own_bundle: Bundle) -> None:
    serve_head(client, own_bundle, head_of(own_bundle, "unused"))
    [result] = client.post("/v1/classify", content=IMAGES[0]).json()["results"]
    assert result.keys() == {"predictions"}
    assert {each["label"] for each in result["predictions"]} <= set(own_bundle.labels)


def test_the_network_runs_once_for_an_image_however_many_heads_there_are(
    client: httpx.Client, own_bundle: Bundle
) -> None:
    for number in range(3):
        serve_head(client, own_bundle, head_of(own_bundle, f"head-{number}", seed=number))
    before = metric(client, "vitserve_batch_size_sum")
    for name in ("head-0", "head-1", "none"):
        body = {"images": [base64.b64encode(image).decode() for image in IMAGES], "head": name}
        assert client.post("/v1/classify", json=body).status_code == 200
    expected = before + 3 * len(IMAGES)
    eventually(lambda: metric(client, "vitserve_batch_size_sum") == expected, "each image has run once")


def test_none_returns_the_embedding_only(client: httpx.Client) -> None:
    [result] = client.post("/v1/classify", params={"head": "none"}, content=IMAGES[0]).json()["results"]
    assert result["predictions"] == []
    [embedded] = client.post("/v1/embed", content=IMAGES[0]).json()["results"]
    assert result["embedding"] == embedded["embedding"]


@pytest.mark.parametrize(
    ("options", "detail"),
    [
        ({"head": "unknown"}, "unknown head 'unknown'; allowed: none"),
        ({"head": ""}, "unknown head ''; allowed: none"),
        ({"head": 3}, "head must be a text"),
        ({"head": "none", "top_k": 1}, "top_k has no effect with head=none"),
        ({"head": "two", "top_k": 3}, "top_k is 3; it must be from 1 to 2"),
    ],
)
def test_wrong_options_are_explained(
    client: httpx.Client, own_bundle: Bundle, options: dict[str, Any], detail: str
) -> None:
    serve_head(client, own_bundle, head_of(own_bundle, "two", ("a", "b")))
    body = {"images": [base64.b64encode(IMAGES[0]).decode()], **options}
    response = client.post("/v1/classify", json=body)
    assert response.status_code == 400
    assert detail in response.json()["detail"]


def test_a_removed_head_is_no_longer_served(client: httpx.Client, own_bundle: Bundle) -> None:
    serve_head(client, own_bundle, head_of(own_bundle, "removed"))
    (own_bundle.path / "heads/removed.npz").unlink()
    parameters = {"head": "removed"}
    eventually(
        lambda: client.post("/v1/classify", params=parameters, content=IMAGES[0]).status_code == 400, "it is removed"
    )


@pytest.mark.parametrize("kind", ["damaged", "another network", "another width"])
def test_a_head_that_does_not_fit_is_not_served_and_named(
    server: Server, client: httpx.Client, own_bundle: Bundle, kind: str
) -> None:
    name = kind.replace(" ", "-")
    path = own_bundle.path / f"heads/{name}.npz"
    if kind == "damaged":
        write_head(own_bundle.path, head_of(own_bundle, name))
        content = path.read_bytes()
        path.unlink()
        path.with_suffix(".tmp").write_bytes(content[: len(content) // 2])
        path.with_suffix(".tmp").replace(path)
    else:
        head = head_of(own_bundle, name)
        backbone = "0" * 64 if kind == "another network" else head.backbone
        write_head(own_bundle.path, Head(name, COLORS, head.weight[:, 1:], head.bias, backbone))
    parameters = {"head": name}
    eventually(
        lambda: (
            client.post("/v1/classify", params=parameters, content=IMAGES[0]).status_code == 400
            and any("a head is not served" in line and name in line for line in server.log)
        ),
        "the log has the reason",
    )
    path.unlink()


def test_predictions_and_confidences_are_counted(client: httpx.Client, own_bundle: Bundle) -> None:
    serve_head(client, own_bundle, head_of(own_bundle, "counted"))

    def counts(head: str) -> float:
        return metric(client, "vitserve_confidence_count", head=head)

    before = counts("")
    found = client.post("/v1/classify", params={"head": "counted"}, files=FORM).json()["results"]
    client.post("/v1/classify", files=FORM)
    client.post("/v1/embed", files=FORM)
    assert (counts("counted"), counts("")) == (len(IMAGES), before + len(IMAGES))
    label = found[0]["predictions"][0]["label"]
    expected = sum(result["predictions"][0]["label"] == label for result in found)
    assert metric(client, "vitserve_predictions_total", head="counted", label=label) == expected
    assert (own_bundle.path / "heads/counted.npz").stat().st_mode & 0o777 == 0o644
