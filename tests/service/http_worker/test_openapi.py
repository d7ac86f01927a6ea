"""The OpenAPI document matches the responses of a real server and the tree of errors."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.support.http import classify
from tests.support.images import encoded, random_image
from tests.support.processes import ADMIN_KEY
from tests.support.server import start_server
from vitserve.model.bundle.bundle import MANIFEST, Bundle
from vitserve.service import errors
from vitserve.service.http_worker.app import problem_response
from vitserve.service.http_worker.openapi.examples import DETAILS

IMAGE = encoded(random_image())
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module")
def bundle_copy(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(bundle.path, tmp_path_factory.mktemp("openapi") / "bundle")


@pytest.fixture(scope="module")
def client(bundle_copy: Path) -> Iterator[httpx.Client]:
    running = start_server("--bundle", str(bundle_copy), environment={"VITSERVE_ADMIN_KEY": ADMIN_KEY})
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client
    assert running.stop() == 0


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    document: dict[str, Any] = client.get("/openapi.json").json()
    return document


def strict(schema: Any) -> Any:
    """The same schema without undocumented properties, except where it allows them explicitly."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if isinstance(schema, dict):
        closed = {"additionalProperties": False} if "properties" in schema else {}
        return closed | {name: strict(value) for name, value in schema.items()}
    return schema


def assert_documented(
    document: dict[str, Any], method: str, path: str, status: int, content_type: str, body: Any
) -> None:
    responses = document["paths"][path][method]["responses"]
    documented = responses[str(status)]["content"][content_type.partition(";")[0]]
    root = strict({"components": document["components"], **documented["schema"]})
    jsonschema.validate(body, root, jsonschema.Draft202012Validator)


def check(document: dict[str, Any], response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text
    request, content_type = response.request, response.headers["content-type"]
    body = response.text if content_type.startswith("text/") else response.json()
    assert_documented(document, request.method.lower(), request.url.path, status, content_type, body)
    documented = document["paths"][request.url.path][request.method.lower()]["responses"][str(status)]
    required = [name for name, header in documented["headers"].items() if header.get("required", True)]
    assert {name.lower() for name in required} <= set(response.headers)


def test_responses_match_their_schemas(client: httpx.Client, document: dict[str, Any]) -> None:
    check(document, classify(client, IMAGE), 200)
    several = {"images": [base64.b64encode(IMAGE).decode(), "%"]}
    check(document, client.post("/v1/classify", json=several), 200)
    check(document, classify(client, IMAGE, embedding="true"), 200)
    check(document, client.post("/v1/embed", json=several | {"encoding": "base64"}), 200)
    check(document, classify(client, b"not an image"), 422)
    check(document, classify(client, IMAGE, top_k=0), 400)
    check(document, client.post("/v1/classify", content=b"", headers={"content-type": "text/plain"}), 415)
    check(document, client.get("/v1/model"), 200)
    check(document, client.get("/livez"), 200)
    check(document, client.get("/readyz"), 200)
    check(document, client.get("/metrics"), 200)


def test_reload_responses_match_their_schemas(
    client: httpx.Client, document: dict[str, Any], bundle_copy: Path
) -> None:
    check(document, client.post("/v1/admin/reload"), 401)
    check(document, client.post("/v1/admin/reload", headers=ADMIN, params={"bundle": "/etc"}), 400)
    check(document, client.post("/v1/admin/reload", headers=ADMIN), 200)
    (bundle_copy / MANIFEST).rename(bundle_copy / "hidden")
    check(document, client.post("/v1/admin/reload", headers=ADMIN), 409)
    (bundle_copy / "hidden").rename(bundle_copy / MANIFEST)


def test_responses_of_a_server_that_is_not_ready_match(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    running = start_server("--bundle", str(tmp_path), until="the bundle cannot be served")
    with httpx.Client(base_url=running.url) as client:
        check(document, client.get("/readyz"), 503)
        check(document, client.get("/v1/model"), 503)
        check(document, classify(client, IMAGE), 503)
    assert running.stop() == 0


def sample(kind: type[errors.ServiceError]) -> errors.ServiceError:
    return kind("detail", "full", 1.5) if issubclass(kind, errors.OverloadedError) else kind("detail")


@pytest.mark.parametrize("kind", errors.error_types())
def test_every_error_is_documented(kind: type[errors.ServiceError], document: dict[str, Any]) -> None:
    response = problem_response(sample(kind))
    body, content_type = json.loads(bytes(response.body)), response.headers["content-type"]
    example = document["components"]["examples"][kind.code]
    assert (example["summary"], example["value"].keys()) == (kind.title, body.keys())
    assert kind in DETAILS
    if kind in (errors.NotFoundError, errors.MethodNotAllowedError):  # of requests that the document does not have
        return
    admin = kind in (errors.UnauthorizedError, errors.ForbiddenError, errors.ReloadRejectedError)
    path = "/v1/admin/reload" if admin or kind is errors.TooManyAttemptsError else "/v1/classify"
    path = "/v1/explain" if kind is errors.NotExplainableError else path
    assert_documented(document, "post", path, response.status_code, content_type, body)
    documented = document["paths"][path]["post"]["responses"][str(kind.status)]
    assert f"`{kind.code}`" in documented["description"]
    assert kind.code in documented["content"][content_type]["examples"]


def test_every_operation_has_a_name_a_tag_and_examples_that_are_valid(document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    for operation in operations:
        assert set(operation["tags"]) <= tags
        contents = [
            item
            for response in operation["responses"].values()
            for kind, item in response["content"].items()
            if kind != "image/png"
        ]
        for content in contents:
            values = [document["components"]["examples"][name]["value"] for name in content.get("examples", ())]
            values += [content["example"]] if "example" in content else []
            assert values
            for value in values:
                root = strict({"components": document["components"], **content["schema"]})
                jsonschema.validate(value, root, jsonschema.Draft202012Validator)


def test_the_document_has_the_limits_of_the_server(client: httpx.Client, document: dict[str, Any]) -> None:
    model = client.get("/v1/model").json()
    properties = document["components"]["schemas"]["ClassifyJson"]["properties"]
    assert properties["images"]["maxItems"] == model["limits"]["max_images"]
    assert properties["top_k"]["maximum"] == len(model["labels"])
    (top_k,) = [item for item in document["paths"]["/v1/classify"]["post"]["parameters"] if item["name"] == "top_k"]
    assert top_k["schema"]["maximum"] == len(model["labels"])


def test_exactly_the_existing_routes_are_documented(client: httpx.Client, document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method in ("get", "post"):
            status = client.request(method, path).status_code
            assert (status == 405) is (method not in operations), f"{method} {path}: {status}"
    assert client.get("/v1/unknown").status_code == 404
    assert client.get("/docs").status_code == 200
