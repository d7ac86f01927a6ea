"""The common parts of all responses: problem bodies, request ids, CORS, a prefix of the paths, and the request log."""

from __future__ import annotations

import gzip
import json
import random
import re
import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.support.http import connect, metric
from tests.support.images import encoded, random_image
from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.http_worker.exchange.request_log import RequestLog

IMAGE = encoded(random_image(), "JPEG")
PAGE, OTHER_PAGE = "https://app.example", "https://other.example"
# A line of the request log: everything that clients control is restricted or quoted.
LINE = re.compile(
    r"\S+ \S+ INFO http-worker-0 vitserve\.request: id=([\w.~:/+=@-]{1,128}) client=127\.0\.0\.1 method=([A-Z]+|-) "
    r'path="((?:[^"\\\n]|\\.)*)" status=(\d+) code=([a-z_,]+|-) ms=[\d.]+( images=\d+( [a-z]+_ms=[\d.]+)+)?\n'
)


@pytest.fixture(scope="module")
def running(bundle: Bundle) -> Iterator[Server]:
    arguments = ["--cors-origins", f"{PAGE}, http://localhost:3000", "--root-path", "/vision", "--request-log", "all"]
    running = start_server("--bundle", str(bundle.path), *arguments)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def web(running: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def raw_response(server: Server, request: bytes) -> httpx.Response:
    """Status, headers and body of the response to a request that httpx does not send."""
    with connect(server) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


# Method, path, status, code, Allow.
PROBLEMS = [
    ("GET", "/nothing", 404, "not_found", None),
    ("POST", "/v1/classify/more", 404, "not_found", None),
    ("GET", "//v1/classify", 404, "not_found", None),
    ("GET", "/%0a%22%C3%A9", 404, "not_found", None),
    ("GET", "/v1/classify", 405, "method_not_allowed", "POST"),
    ("DELETE", "/v1/classify/", 405, "method_not_allowed", "POST"),
    ("OPTIONS", "/v1/classify", 405, "method_not_allowed", "POST"),
    ("POST", "/livez", 405, "method_not_allowed", "GET, HEAD"),
    ("PUT", "/docs", 405, "method_not_allowed", "GET, HEAD"),
    ("BREW", "/", 400, "bad_request", None),
    ("GET", "/livez HTTP/3.0\r\nx:", 400, "bad_request", None),
    ("CONNECT", "x:80", 400, "bad_request", None),
]


@pytest.mark.parametrize(("method", "path", "status", "code", "allow"), PROBLEMS)
def test_all_errors_are_problems(
    running: Server, method: str, path: str, status: int, code: str, allow: str | None
) -> None:
    response = raw_response(running, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    problem = response.json()
    assert (response.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers.get("allow") == allow
    assert response.headers["x-request-id"]


def test_unknown_paths_are_counted(web: httpx.Client) -> None:
    before = metric(web, "vitserve_requests_total", route="other", status="404")
    web.get("/a")
    web.post("/b")
    assert metric(web, "vitserve_requests_total", route="other", status="404") == before + 2


ROUTES = [
    ("POST", "/v1/classify"),
    ("POST", "/v1/%63lassify"),
    ("GET", "/livez"),
    ("GET", "/nothing"),
    ("GET", "/openapi.json"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("identifier", ["a", "Root=1-67891233-abcdef012345678912345678", "7f/+:@~.=" * 14])
def test_the_id_of_the_client_is_returned(web: httpx.Client, method: str, path: str, identifier: str) -> None:
    headers = {"x-request-id": identifier}
    assert web.request(method, path, headers=headers).headers["x-request-id"] == identifier


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("identifier", [None, "", "a b", 'a"', "a\tb", "é", "a" * 129, "%0a"])
def test_a_missing_or_unsuitable_id_is_replaced(
    web: httpx.Client, method: str, path: str, identifier: str | None
) -> None:
    headers = {} if identifier is None else {b"x-request-id": identifier.encode("latin-1")}
    returned = [web.request(method, path, headers=headers).headers["x-request-id"] for _ in range(2)]
    assert len(set(returned)) == 2
    assert all(re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]+", new) for new in returned)


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000"])
def test_pages_of_allowed_origins_may_read_responses(web: httpx.Client, method: str, path: str, origin: str) -> None:
    preflight = {"origin": origin, "access-control-request-method": method, "access-control-request-headers": "x"}
    allowed = web.options(path, headers=preflight)
    assert (allowed.status_code, allowed.content) == (204, b"")
    assert method in allowed.headers["access-control-allow-methods"]
    assert "Content-Type" in allowed.headers["access-control-allow-headers"]
    for response in (allowed, web.request(method, path, headers={"origin": origin})):
        assert response.headers["access-control-allow-origin"] == origin
        assert response.headers["access-control-expose-headers"] == "Retry-After, Server-Timing, X-Request-ID"
        assert response.headers["vary"] == "Origin"


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("origin", [OTHER_PAGE, "null", f"{PAGE}.evil.example", PAGE.upper(), None])
def test_other_pages_may_not(web: httpx.Client, method: str, path: str, origin: str | None) -> None:
    headers = {"access-control-request-method": method} | ({} if origin is None else {"origin": origin})
    for response in (web.options(path, headers=headers), web.request(method, path, headers=headers)):
        assert not [name for name in response.headers if name.startswith("access-control-")]
        assert response.status_code != 204
        assert response.headers["vary"] == "Origin"


def test_by_default_no_page_may(client: httpx.Client) -> None:
    headers = {"origin": PAGE, "access-control-request-method": "POST"}
    for response in (client.options("/v1/classify", headers=headers), client.post("/v1/classify", headers=headers)):
        assert not [name for name in response.headers if name.startswith("access-control-") or name == "vary"]


@pytest.mark.parametrize("prefix", ["", "/vision"], ids=["removed by the proxy", "kept by the proxy"])
def test_paths_are_accepted_with_and_without_the_prefix(web: httpx.Client, prefix: str) -> None:
    headers = {"content-type": "image/jpeg"}
    for path in ("/v1/classify", "/v1/classify/"):
        assert web.post(prefix + path, content=IMAGE, headers=headers).status_code == 200
    assert web.get(f"{prefix}/livez/").status_code == 200
    assert "/vision/openapi.json" in web.get(f"{prefix}/docs").text
    document = web.get(f"{prefix}/openapi.json").json()
    assert document["servers"] == [{"url": "/vision"}]
    assert "/v1/classify" in document["paths"]
    missing = web.get(f"{prefix}/nothing")
    assert (missing.status_code, "'/nothing'" in missing.json()["detail"]) == (404, True)
    assert metric(web, "vitserve_requests_total", route="/v1/classify", status="200") > 0


def test_every_request_is_one_line_of_the_log(running: Server, web: httpx.Client) -> None:
    """With the id of the response. No line has anything of a body or of a query."""
    secret = "c2VjcmV0"
    form = [("image", IMAGE), ("image", b"not an image")]
    responses = [
        web.post("/v1/classify?top_k=1", content=IMAGE, headers={"content-type": "image/jpeg"}),
        web.post("/v1/classify", content=gzip.compress(IMAGE), headers={"content-encoding": "gzip"}),
        web.post("/v1/classify", files=form),
        web.post("/v1/classify", json={"images": [secret]}),
        web.post("/v1/classify", params={secret: 1}),
        web.get("/livez", params={"a": secret}),
        web.get('/a"%0a%22 id=1 status=200'),
        web.get("/" + "%C3%A9" * 500),
        raw_response(running, b"BREW / HTTP/1.1\r\n\r\n"),
    ]
    ids = [response.headers["x-request-id"] for response in responses]
    eventually(lambda: ids[-1] in "".join(running.log), "the last request is logged")
    lines = [line for line in running.log if "vitserve.request" in line]
    matches = [match for match in map(LINE.fullmatch, lines) if match is not None]
    assert len(matches) == len(lines)
    found = {match[1]: match for match in matches}
    logged = [(int(found[name][4]), found[name][5]) for name in ids]
    unreadable = ["not_an_image", "not_an_image", "bad_request"]
    codes = ["-", "-", *unreadable, "-", "not_found", "not_found", "bad_request"]
    assert logged == [(response.status_code, code) for response, code in zip(responses, codes, strict=True)]
    assert found[ids[0]][6].startswith(" images=1 read_ms=")
    assert "inference_ms" in found[ids[2]][6]
    assert json.loads(f'"{found[ids[6]][3]}"') == '/a"\n" id=1 status=200'
    assert secret not in "".join(lines)
    assert max(map(len, lines)) < 2000


@pytest.mark.parametrize(
    ("level", "sample", "logged"), [("off", 1.0, 0), ("errors", 1.0, 200), ("all", 1.0, 400), ("all", 0.0, 0)]
)
def test_the_level_and_the_sample_select_requests(
    caplog: pytest.LogCaptureFixture, level: str, sample: float, logged: int
) -> None:
    log = RequestLog(level, sample)
    for code in ("", "overloaded") * 200 if log.on else ():
        log.write(b"1", ("::1", 1), "GET", "/", 200, code, 0.1)
    assert len(caplog.records) == logged


def test_half_of_the_requests_are_chosen_at_random(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", iter([0.2, 0.7, 0.49, 0.5]).__next__)
    for number in range(4):
        RequestLog("all", 0.5).write(b"%d" % number, None, "GET", "/", 404, "", 0.1)
    assert [record.getMessage()[:4] for record in caplog.records] == ["id=0", "id=2"]
