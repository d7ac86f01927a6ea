"""Options of a request with images: in the query, in the body, or in both."""

from __future__ import annotations

import base64

import httpx
import pytest

from tests.support.images import encoded, random_image

IMAGE = encoded(random_image())
BODY = {"images": [base64.b64encode(IMAGE).decode()]}
CLASSIFY, EMBED = "/v1/classify", "/v1/embed"


@pytest.mark.parametrize(
    ("path", "query", "body"),
    [
        (CLASSIFY, {"top_k": 1000}, {"top_k": 1}),
        (CLASSIFY, {"embedding": "perhaps"}, {"embedding": False}),
        (CLASSIFY, {"timeout_ms": 0}, {"timeout_ms": 60_000}),
        (EMBED, {"normalize": "2"}, {"normalize": True}),
        (EMBED, {"encoding": "hex"}, {"encoding": "list"}),
        (EMBED, {"dtype": "float8"}, {"dtype": "float32"}),
    ],
)
def test_a_value_that_the_body_overrides_must_be_valid(
    client: httpx.Client, path: str, query: dict[str, str], body: dict[str, object]
) -> None:
    (name,) = query
    assert client.post(path, json=BODY | body).status_code == 200
    response = client.post(path, params=query, json=BODY | body)
    assert (response.status_code, name in response.json()["detail"]) == (400, True)


def test_the_body_overrides_the_query(client: httpx.Client) -> None:
    (result,) = client.post(CLASSIFY, params={"top_k": 3}, json=BODY | {"top_k": 1}).json()["results"]
    assert len(result["predictions"]) == 1


@pytest.mark.parametrize(("value", "status"), [("2", 200), ("2.0", 200), ("2e0", 200), ("2.5", 400), ("1e999", 400)])
def test_integers_in_json_may_have_a_fraction_of_zero(client: httpx.Client, value: str, status: int) -> None:
    body = f'{{"images": ["{BODY["images"][0]}"], "top_k": {value}}}'
    response = client.post(CLASSIFY, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert status != 200 or len(response.json()["results"][0]["predictions"]) == 2
