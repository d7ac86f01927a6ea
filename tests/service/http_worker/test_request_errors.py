"""Bodies that cannot be read: the status, the code, and a message that names the part and the reason."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json

import httpx
import psutil
import pytest

from tests.support.http import connect
from tests.support.images import encoded, random_image
from tests.support.server import Server

IMAGE = encoded(random_image(), "JPEG")
TEXT = base64.b64encode(IMAGE).decode()
JSON, FORM, RAW = "application/json", "multipart/form-data; boundary=B", "image/jpeg"
LIMIT = 33_554_432  # of the body, the default
PART = b'--B\r\nContent-Disposition: form-data; name="image"\r\n'
GZIP = gzip.compress(IMAGE)

BASE64 = {
    "character": (f"{TEXT[:8]}%{TEXT[9:]}", "images[1] is not valid base64: it contains '%'"),
    "plus as a space": (f"{TEXT[:8]} {TEXT[9:]}", "images[1] is not valid base64: it contains ' '; was a + decoded"),
    "padding within": (f"{TEXT[:8]}={TEXT[9:]}", "images[1] is not valid base64: it contains '='"),
    "truncated": (TEXT.rstrip("=")[: len(TEXT) // 4 * 4 - 3], "characters are not a whole number of bytes, so it may"),
    "data URL in text": (f"data:image/jpeg,{TEXT}", "images[1] is a data: URL that is not in base64"),
    "quotes": ('"' * 20, "images[1] is not valid base64: it contains quotes"),
    "number": (7, "images[1] is 7; an image must be a base64 string"),
    "null": (None, "images[1] is null; an image must be a base64 string"),
    "list": ([TEXT], "images[1] must be a base64 string, not a list"),
    "object": ({"b64": TEXT}, "images[1] must be a base64 string, not an object"),
}


@pytest.mark.parametrize(("text", "message"), BASE64.values(), ids=BASE64.keys())
def test_errors_in_base64_name_the_image_and_the_reason(client: httpx.Client, text: object, message: str) -> None:
    response = client.post("/v1/classify", json={"images": [TEXT, text]})
    error = response.json() if response.status_code == 400 else response.json()["results"][1]["error"]
    assert error["code"] == "bad_request"
    assert message in error["detail"]


# Body, content type, content encoding, status, code, message.
Case = tuple[bytes, str, str, int, str, str]
BODIES: dict[str, Case] = {
    "truncated gzip": (GZIP[:-9], RAW, "gzip", 400, "bad_request", "its gzip data does not end"),
    "no gzip": (IMAGE, RAW, "gzip", 400, "bad_request", "the body is not valid gzip"),
    "damaged gzip": (GZIP[:-8] + bytes(8), RAW, "gzip", 400, "bad_request", "the body is not valid gzip"),
    "empty gzip": (b"", RAW, "gzip", 400, "bad_request", "its gzip data does not end"),
    "two gzip members": (GZIP * 2, RAW, "gzip", 400, "bad_request", "data after the end of its gzip data"),
    "deflate of gzip": (GZIP, RAW, "deflate", 400, "bad_request", "the body is not valid deflate"),
    "decoded size": (gzip.compress(bytes(LIMIT + 1)), RAW, "gzip", 413, "body_too_large", "more than 33,554,432 bytes"),
    "brotli": (IMAGE, RAW, "br", 415, "unsupported_coding", "the Content-Encoding is 'br'; send gzip, deflate"),
    "two codings": (gzip.compress(GZIP), RAW, "gzip, gzip", 415, "unsupported_coding", "and only one"),
    "gzip of broken JSON": (gzip.compress(b"{"), JSON, "gzip", 400, "bad_request", "not valid JSON"),
    "URL-encoded form": (
        b"a=b",
        "application/x-www-form-urlencoded",
        "",
        415,
        "unsupported_media_type",
        "send image/*",
    ),
    "text field": (
        PART + b"\r\nx\r\n--B--\r\n",
        FORM,
        "",
        400,
        "bad_request",
        "images, which need a file name or a Content-Type",
    ),
    "similar boundary": (PART + b"\r\n\r\n--B-\r\n--B--", FORM, "", 400, "bad_request", "followed by other characters"),
    "other boundary": (PART.replace(b"--B", b"--C"), FORM, "", 400, "bad_request", "the boundary 'B' of the content"),
    "truncated form": (PART + b"\r\nx", FORM, "", 400, "bad_request", "closing boundary is missing"),
    "no disposition": (b"--B\r\n\r\nx\r\n--B--", FORM, "", 400, "bad_request", "no Content-Disposition"),
    "endless part headers": (PART + b"a: b\r\n" * 9999, FORM, "", 400, "bad_request", "more than 8,192 bytes of head"),
    "transfer encoding": (
        PART + b"Content-Transfer-Encoding: quoted-printable\r\n\r\nx\r\n--B--",
        FORM,
        "",
        400,
        "bad_request",
        "the part 'image' has the Content-Transfer-Encoding 'quoted-printable'",
    ),
    "too many parts": ((PART + b"\r\nx\r\n") * 72 + b"--B--", FORM, "", 400, "bad_request", "more than 71 parts"),
    "too many numbers": (
        b'{"images": [' + b"1," * 99 + b"1]}",
        JSON,
        "",
        400,
        "bad_request",
        "more than 64 images; the allowed number is 1 to 64",
    ),
    "field twice": (b'{"top_k": 1, "top_k": 2}', JSON, "", 400, "bad_request", "the field 'top_k' occurs twice"),
    "one image": (
        json.dumps({"images": TEXT}).encode(),
        JSON,
        "",
        400,
        "bad_request",
        "'images' must be a list",
    ),
    "list": (json.dumps([TEXT]).encode(), JSON, "", 400, "bad_request", 'the body must be {"images"'),
    "UTF-16": (
        json.dumps({"images": []}).encode("utf-16"),
        JSON,
        "",
        400,
        "bad_request",
        "JSON must be encoded in UTF",
    ),
    "comma": (b'{"images": [],}', JSON, "", 400, "bad_request", "unexpected '}' at byte 14"),
    "tail": (b'{"images": []} {', JSON, "", 400, "bad_request", "unexpected '{' at byte 15"),
    "nested option": (b'{"top_k": [1]}', JSON, "", 400, "bad_request", "top_k must be a single value, not a list"),
    "long option": (b'{"top_k": %b}' % (b"1" * 4000), JSON, "", 400, "bad_request", "unexpected '1' at byte 10"),
}


@pytest.mark.parametrize(
    ("body", "content_type", "coding", "status", "code", "message"), BODIES.values(), ids=BODIES.keys()
)
def test_bodies_that_cannot_be_read(
    client: httpx.Client, body: bytes, content_type: str, coding: str, status: int, code: str, message: str
) -> None:
    headers = {"content-type": content_type} | ({"content-encoding": coding} if coding else {})
    response = client.post("/v1/classify", content=body, headers=headers)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert message in problem["detail"]
    assert ("accept-encoding" in response.headers) == (code == "unsupported_coding")


def test_others_are_answered_while_a_large_body_is_parsed(server: Server) -> None:
    """Escaped line breaks take the longest of all bodies. Another request that is sent later is answered earlier."""
    body = b'{"images": ["' + b"\\n" * (LIMIT // 2 - 10) + b'"]}'
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
    with connect(server) as large, connect(server) as other:
        large.sendall(head.encode() + body)
        other.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert other.recv(65536).startswith(b"HTTP/1.1 200")
        large.setblocking(False)
        with pytest.raises(BlockingIOError):
            large.recv(65536)
        large.settimeout(60)
        assert large.recv(65536).startswith(b"HTTP/1.1 422")


@pytest.mark.parametrize("content_type", [RAW, JSON, FORM])
def test_connections_keep_no_memory_of_their_last_bodies(server: Server, content_type: str) -> None:
    """Sixteen connections, each of which sends 8 MB that are rejected, and stays open."""
    (pid,) = server.pids("vitserve.service.http_worker.main")
    before = psutil.Process(pid).memory_info().rss
    body = {
        RAW: b"%" * 2**23,
        JSON: b'{"images": ["%b"]}' % (b"AAAA" * 2**21),
        FORM: PART + b"Content-Type: image/png\r\n\r\n" + b"%" * 2**23 + b"\r\n--B--",
    }[content_type]
    head = (
        f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with contextlib.ExitStack() as connections:
        for _ in range(16):
            connection = connections.enter_context(connect(server))
            connection.sendall(head.encode() + body)
            assert connection.recv(65536).startswith(b"HTTP/1.1 422")
        assert psutil.Process(pid).memory_info().rss - before < 64 * 2**20
