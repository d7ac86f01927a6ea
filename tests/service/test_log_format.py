"""The log as JSON: one object per line, whichever process writes it, and whatever it says."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.images import encoded, random_image
from tests.support.processes import ENGINE_WORKER, HTTP_WORKER
from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.service.http_worker.dispatch import decode_process_main
from vitserve.service.http_worker.exchange.request_log import RequestLog
from vitserve.service.ipc import frames
from vitserve.service.ipc.control_messages import StartHttpWorker
from vitserve.service.log_format import FieldsMessage, JsonFormatter
from vitserve.service.settings import Settings
from vitserve.service.supervisor.child_process import ChildProcess
from vitserve.service.supervisor.child_stderr import MOST_LINE_BYTES

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")  # RFC 3339, UTC
ALWAYS = ("time", "level", "logger", "process", "message")
STAGES = {"images", "read_ms", "decode_ms", "queue_ms", "inference_ms"}


def members(line: str) -> dict[str, Any]:
    """The log line as an object, checked for the members that every line has."""
    parsed: dict[str, Any] = json.loads(line)
    assert tuple(parsed)[:5] == ALWAYS
    assert TIME.fullmatch(parsed["time"])
    assert parsed["level"] in ("debug", "info", "warning", "error", "critical")
    assert all(isinstance(parsed[name], str) for name in ALWAYS)
    return parsed


def formatted(message: object, *arguments: object, exc_info: Any = None) -> str:
    record = logging.LogRecord("vitserve.test", logging.ERROR, __file__, 1, message, arguments, exc_info)
    return JsonFormatter("http-worker-0").format(record)


@settings(max_examples=30)
@given(st.text(), st.text())
def test_any_text_is_one_line(message: str, field: str) -> None:
    plain, with_field = formatted("%s", message), formatted(FieldsMessage(message, {"path": field}))
    assert members(plain)["message"] == members(with_field)["message"] == message
    assert members(with_field)["path"] == field
    assert all(line.isascii() and line.isprintable() for line in (plain, with_field))


def test_an_exception_is_a_member_of_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = members(formatted("failed", exc_info=sys.exc_info()))
    assert (line["message"], line["level"], line["process"]) == ("failed", "error", "http-worker-0")
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("ValueError: two\nlines")


def test_the_text_of_a_request_and_its_members_say_the_same(caplog: pytest.LogCaptureFixture) -> None:
    about = b"1-2", ("::1", 1), "GET", '/a"\né', 404, "not_found", 0.01
    RequestLog("all", 1.0).write(*about, {"key": "7", "images": 1, "read_ms": 0.125})
    RequestLog("all", 1.0).write(b"3", None, "-", "", 200, "", 0.0)
    assert [record.getMessage() for record in caplog.records] == [
        r'id=1-2 client=::1 method=GET path="/a\"\n\u00e9" status=404 code=not_found ms=10.000 key=7 '
        "images=1 read_ms=0.125",
        'id=3 client=- method=- path="" status=200 code=- ms=0.000',
    ]
    first, second = (json.loads(JsonFormatter("http-worker-0").format(record)) for record in caplog.records)
    fields = {"id": "1-2", "client": "::1", "method": "GET", "path": '/a"\né', "status": 404, "code": "not_found"}
    assert fields | {"ms": 10.0, "key": "7", "images": 1, "read_ms": 0.125, "message": "request"} == {
        name: value for name, value in first.items() if name == "message" or name not in ALWAYS
    }
    assert (second["client"], second["code"]) == (None, None)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    arguments = ["--log-format", "json", "--request-log", "all", "--log-level", "debug"]
    running = start_server(*arguments, until='"message": "ready: ')
    yield running
    assert running.stop() == 0


def test_every_line_of_every_process_is_an_object(running: Server) -> None:
    """Also what native libraries write to standard error: here the test writes it into the pipe of the process."""
    secret = "c2VjcmV0"
    image = encoded(random_image(), "JPEG")
    responses = [
        httpx.post(f"{running.url}/v1/classify", params={"a": secret}, files=[("image", image), ("image", image)]),
        httpx.post(f"{running.url}/v1/classify", content=image, headers={"content-type": "image/jpeg"}),
        httpx.get(f"{running.url}/nothing"),
    ]
    (engine_worker,), (http_worker,) = running.pids(ENGINE_WORKER), running.pids(HTTP_WORKER)
    passed_on = json.dumps(dict.fromkeys(ALWAYS, "of a decode process"))
    Path(f"/proc/{engine_worker}/fd/2").write_text("native é\n\nsecond line\n")
    Path(f"/proc/{http_worker}/fd/2").write_text(f"{passed_on}\n")
    eventually(lambda: {"second line", "of a decode process"} <= set(messages(running)), "both are logged")
    eventually(lambda: messages(running).count("request") == 3, "all requests are logged")
    assert passed_on + "\n" in running.log
    lines = [members(line) for line in running.log if line != passed_on + "\n"]
    assert {"supervisor", "http-worker-0"} < {line["process"] for line in lines}
    assert [(line["process"], line["message"]) for line in lines if line["logger"] == "vitserve.stderr"] == [
        ("engine-worker-0-b", "native é"),
        ("engine-worker-0-b", "second line"),
    ]
    requests = [line for line in lines if line["logger"] == "vitserve.request"]
    logged = {line["id"]: (line["status"], line["code"], line.get("images")) for line in requests}
    ids = [response.headers["x-request-id"] for response in responses]
    expected = [(400, "bad_request", 0), (200, None, 1), (404, "not_found", None)]
    assert logged == dict(zip(ids, expected, strict=True))
    (classified,) = (line for line in requests if line["status"] == 200)
    assert classified.keys() >= {"client", "method", "path", "ms"} | STAGES
    assert secret not in "".join(running.log)


def messages(running: Server) -> list[str]:
    return [json.loads(line)["message"] for line in running.log]


def test_an_error_before_the_service_starts_is_an_object_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitserve", "serve", "--log-format", "json", "--bundle", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = map(members, ended.stderr.splitlines())
    assert (ended.returncode, line["level"]) == (2, "critical")
    assert "is not a bundle: it has no bundle.json" in line["message"]


def test_an_uncaught_exception_of_a_decode_process_is_an_object() -> None:
    ours, theirs = socket.socketpair()
    arguments = [str(theirs.fileno()), "http-worker-0-decoder", "info", "json"]
    command = [sys.executable, "-m", decode_process_main.__name__, *arguments]
    with (
        ours,
        theirs,
        subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True) as process,
    ):
        frames.receive(ours)
        frames.send(ours, [b"not JSON", b""])
        assert process.stderr is not None
        (line,) = map(members, process.stderr)
    assert (line["process"], line["level"], line["message"]) == (
        "http-worker-0-decoder",
        "critical",
        "uncaught exception",
    )
    assert "JSONDecodeError" in line["exception"]


def test_the_last_words_of_a_crashed_child_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Also a line without an end, and one that is longer than the limit."""
    start = StartHttpWorker("child", 1, Settings(log_format="json"), worker=0, decode_threads=1)

    async def crash() -> str:
        child = ChildProcess("tests.support.crashing_child", start, [], {})
        while await child.receive() is not None:
            pass
        return await child.reap()

    assert asyncio.run(crash()) == "SIGABRT"
    texts = [record.getMessage() for record in caplog.records if record.name == "vitserve.stderr"]
    assert "".join(texts) == "x" * (MOST_LINE_BYTES + 100) + "last words"
    assert max(map(len, texts)) <= MOST_LINE_BYTES
