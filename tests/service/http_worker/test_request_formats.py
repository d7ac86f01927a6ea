"""The ways in which clients encode the same image. Every one gets the response that the raw image gets."""

from __future__ import annotations

import base64
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.http import classify
from tests.support.images import encoded, random_image

IMAGE = encoded(random_image(), "JPEG")
TEXT = base64.b64encode(IMAGE).decode()
URL_SAFE = base64.urlsafe_b64encode(IMAGE).decode()
LINES = base64.encodebytes(IMAGE).decode()
UNPADDED = base64.b64encode(IMAGE + b"\0" * (1 - len(IMAGE) % 3)).decode().rstrip("=")
JSON, FORM = "application/json", "multipart/form-data; boundary=B"

Request = tuple[bytes, str, dict[str, str]]  # body, content type, other headers


def json_body(text: str) -> bytes:
    return json.dumps({"images": [text]}).encode()


def form(disposition: str, content: bytes = IMAGE, headers: str = "Content-Type: image/jpeg\r\n") -> bytes:
    head = f"--B\r\nContent-Disposition: form-data; {disposition}\r\n{headers}\r\n"
    return head.encode() + content + b"\r\n--B--\r\n"


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


FILE = 'name="image"; filename="a.jpg"'
UTF_8_NAME = "filename*=UTF-8''%D1%84%D0%BE%D1%82%D0%BE.jpg"
GZIP, DEFLATE = {"content-encoding": "gzip"}, {"content-encoding": "deflate"}
REQUESTS: dict[str, Request] = {
    "form: file name": (form(FILE), FORM, {}),
    "form: filename* alone": (form(f'name="image"; {UTF_8_NAME}'), FORM, {}),
    "form: filename* in parts": (form("name=\"image\"; filename*0*=UTF-8''a; filename*1=.jpg"), FORM, {}),
    "form: file name with quotes": (form('name="image"; filename="a\\"b;name=\\"top_k.jpg"'), FORM, {}),
    "form: path of Windows": (form('filename="C:\\photos\\a.jpg"; name="image"'), FORM, {}),
    "form: type without a file name": (form('name="image"'), FORM, {}),
    "form: type without quotes": (form("name=image"), FORM, {}),
    "form: over a megabyte": (form('name="image"', IMAGE + bytes(2**21)), FORM, {}),
    "form: text file": (form(FILE, headers="Content-Type: text/plain\r\n"), FORM, {}),
    "form: no type": (form(FILE, headers=""), FORM, {}),
    "form: names in lower case": (form(FILE).replace(b"Content-Disposition", b"content-disposition"), FORM, {}),
    "form: base64": (form(FILE, LINES.encode(), "Content-Transfer-Encoding: base64\r\n"), FORM, {}),
    "form: binary": (form(FILE, headers="Content-Transfer-Encoding: binary\r\n"), FORM, {}),
    "form: preamble and epilogue": (b"preamble\r\n" + form(FILE) + b"epilogue", FORM, {}),
    "form: padded boundary": (form(FILE).replace(b"--B\r\n", b"--B \t\r\n", 1), FORM, {}),
    "form: quoted boundary": (form(FILE), 'multipart/form-data; charset=utf-8; Boundary="B"', {}),
    "form: similar lines": (form(FILE, IMAGE + b"\r\n--A\r\n--\r\n\r\n-B\r\n" + os.urandom(99)), FORM, {}),
    "form: option with a type": (
        form('name="top_k"', b"5", "Content-Type: text/plain; charset=utf-8\r\n").removesuffix(b"--\r\n")
        + b"\r\n"
        + form(FILE),
        FORM,
        {},
    ),
    "JSON: data URL": (json_body("data:image/jpeg;base64," + TEXT), JSON, {}),
    "JSON: data URL with parameters": (json_body('DATA:image/jpeg;name="a.jpg";Base64,' + TEXT), JSON, {}),
    "JSON: data URL without a type": (json_body("data:;base64," + TEXT), JSON, {}),
    "JSON: data URL of another type": (json_body("data:text/html;base64," + TEXT), JSON, {}),
    "JSON: lines": (json_body(LINES), JSON, {}),
    "JSON: lines of Windows": (json_body(LINES.replace("\n", "\r\n")), JSON, {}),
    "JSON: lines that are not escaped": (json_body(LINES).replace(b"\\n", b"\n"), JSON, {}),
    "JSON: URL-safe": (json_body(URL_SAFE), JSON, {}),
    "JSON: no padding": (json_body(UNPADDED), JSON, {}),
    "JSON: URL-safe, no padding": (json_body(UNPADDED.replace("+", "-").replace("/", "_")), JSON, {}),
    "JSON: spaces around": (json_body(f" {TEXT}\n"), JSON, {}),
    "JSON: escaped slashes": (json_body(TEXT).replace(b"/", b"\\/"), JSON, {}),
    "JSON: escaped plus signs": (json_body(TEXT).replace(b"+", b"\\u002B"), JSON, {}),
    "JSON: indented": (json.dumps({"top_k": 5, "images": [TEXT]}, indent=8).encode(), JSON, {}),
    "JSON: byte order mark": (b"\xef\xbb\xbf" + json_body(TEXT), "application/json; charset=utf-8", {}),
    "gzip: image": (gzip.compress(IMAGE), "image/jpeg", GZIP),
    "gzip: old name": (gzip.compress(IMAGE), "image/jpeg", {"content-encoding": "X-GZip"}),
    "gzip: form": (gzip.compress(form(FILE)), FORM, GZIP),
    "gzip: JSON": (gzip.compress(json_body(TEXT)), JSON, GZIP),
    "gzip: more than a megabyte": (gzip.compress(IMAGE + bytes(2**21)), "image/jpeg", GZIP),
    "gzip: stored": (gzip.compress(IMAGE + os.urandom(2**17), 0), "image/jpeg", GZIP),
    "deflate: zlib": (zlib.compress(IMAGE), "image/jpeg", DEFLATE),
    "deflate: raw": (raw_deflate(IMAGE), "image/jpeg", DEFLATE),
    "no encoding": (IMAGE, "image/jpeg", {"content-encoding": "identity"}),
    "raw: default type of curl": (IMAGE, "application/x-www-form-urlencoded", {}),
    "raw: default type of object stores": (IMAGE, "binary/octet-stream", {}),
    "raw: type in capitals": (IMAGE, "Image/JPEG ; q=1", {}),
}


@pytest.fixture(scope="module")
def expected(client: httpx.Client) -> list[Any]:
    results: list[Any] = classify(client, IMAGE, top_k=5).json()["results"]
    return results


@pytest.mark.parametrize(("body", "content_type", "headers"), REQUESTS.values(), ids=REQUESTS.keys())
@pytest.mark.parametrize("chunked", [False, True])
def test_all_encodings_of_an_image_have_the_same_result(
    client: httpx.Client, expected: list[Any], body: bytes, content_type: str, headers: dict[str, str], chunked: bool
) -> None:
    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 300_000):
            yield body[start : start + 300_000]

    headers = {"content-type": content_type, **headers}
    response = client.post("/v1/classify", content=chunks() if chunked else body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["results"] == expected


def test_a_trailing_slash_is_ignored(client: httpx.Client, expected: list[Any]) -> None:
    headers = {"content-type": "image/jpeg", "x-forwarded-proto": "https"}
    response = client.post("/v1/classify/", content=IMAGE, headers=headers)
    assert response.json()["results"] == expected
    assert client.get("/readyz/").json()["status"] == "ready"


def test_a_body_without_a_type_is_an_image(client: httpx.Client, expected: list[Any]) -> None:
    request = client.build_request("POST", "/v1/classify", content=IMAGE)
    assert "content-type" not in request.headers
    assert client.send(request).json()["results"] == expected
