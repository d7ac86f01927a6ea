"""The load generator against a server that stalls and against the real service; what `vitserve bench` writes, and says of what it cannot measure."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import math
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.support.images import encoded, random_image
from tests.support.server import Server
from vitserve.bench.client import Client, ConnectionGoneError, NoResponseError
from vitserve.bench.load import Run, arrivals, closed_loop, open_loop
from vitserve.bench.report import summary
from vitserve.bench.request import Picture, get, raw
from vitserve.cli.main import app
from vitserve.model.bundle.bundle import Bundle

JPEG = Picture(encoded(random_image(60, 45), "JPEG"), "image/jpeg")


# The client


@pytest.mark.parametrize("rate", [0.5, 40.0, 3000.0])
def test_arrivals_are_poisson_of_the_asked_rate(rate: float) -> None:
    count = 20_000
    moments = [0.0, *itertools.islice(arrivals(rate, seed=1), count)]
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    mean = sum(gaps) / count
    assert mean == pytest.approx(1 / rate, rel=5 / math.sqrt(count))  # five deviations of the mean
    assert sum((gap - mean) ** 2 for gap in gaps) / count == pytest.approx(
        mean**2, rel=0.1
    )  # an exponential's variance is its mean's square
    assert moments[1:] == list(itertools.islice(arrivals(rate, seed=1), count))


class Answering:
    """A real server that answers at once, unless it is told to stall; it says and does something at the requests of certain numbers."""

    def __init__(self, at: Mapping[int, Callable[[], None]] | None = None) -> None:
        self.answering = asyncio.Event()
        self.answering.set()
        self.at = at or {}
        self.asked = 0
        self.handlers: set[asyncio.Task[None]] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.handlers.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
                self.asked += 1
                self.at.get(self.asked, lambda: None)()
                await self.answering.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def listening(server: Answering) -> AsyncIterator[int]:
    opened = await asyncio.start_server(server, "127.0.0.1", 0)
    try:
        async with opened:
            yield opened.sockets[0].getsockname()[1]
    finally:
        server.answering.set()
        await asyncio.gather(*server.handlers)  # they end with their connections


def planned(rate: float, seconds: float) -> int:
    return len(list(itertools.takewhile(lambda moment: moment < seconds, arrivals(rate, 0))))


def test_an_open_loop_waits_for_nobody() -> None:
    """The server stalls at its 20th request until the 100th is there: whoever waited for answers would never send that."""

    async def scenario() -> Run:
        server = Answering()
        server.at = {20: server.answering.clear, 100: server.answering.set}
        async with listening(server) as port:
            client = Client("127.0.0.1", port)
            try:
                run = await asyncio.wait_for(open_loop(client, [raw("/", JPEG)], 300.0, 0.0, 0.5), 30)
            finally:
                client.close()
        assert server.asked == len(run.samples)
        return run

    run = asyncio.run(scenario())
    assert len(run.samples) == planned(300.0, 0.5) > 100
    assert all(each.outcome == "200" for each in run.samples)
    moment = sorted(each.sent for each in run.samples)[99]  # the server went on at this moment or later
    waited = [each for each in run.samples if each.sent < moment <= each.ended]
    assert len(waited) >= 80  # and not only the one that was there first
    longest = max(each.seconds for each in waited)
    row = summary(run, deadline_seconds=longest / 2)
    assert 0 < row.goodput_per_second < row.answered_per_second == len(run.samples) / 0.5


def test_latency_counts_from_the_planned_arrival() -> None:
    """At the fifth request the event loop stands still, and with it the generator: those that were to leave meanwhile have waited since."""

    async def scenario() -> Run:
        async with listening(Answering({5: lambda: time.sleep(0.2)})) as port:
            client = Client("127.0.0.1", port)
            run = await open_loop(client, [raw("/", JPEG)], 200.0, 0.0, 0.8)
            client.close()
            return run

    run = asyncio.run(scenario())
    assert len(run.samples) == planned(200.0, 0.8)
    late = [each for each in run.samples if each.sent - each.planned > 0.1]
    assert late
    assert all(each.seconds > 0.1 for each in late)
    assert (summary(run).client_late_ms or 0) > 100


def test_a_request_without_an_answer_is_an_error_and_not_the_end() -> None:
    async def scenario() -> tuple[str, Run]:
        server = Answering()
        server.answering.clear()
        async with listening(server) as port:
            client = Client("127.0.0.1", port, timeout_seconds=0.1)
            with pytest.raises(NoResponseError) as raised:
                await client.ask(raw("/", JPEG))
            run = await closed_loop(client, [raw("/", JPEG)], 2, 0.0, 0.3)
            client.close()
            return str(raised.value), run

    word, run = asyncio.run(scenario())
    assert word == "timeout"
    row = summary(run)
    assert row.errors == row.requests > 0
    assert row.p50_ms is None


# The real service


def counted_by(server: Server) -> dict[str, int]:
    """Requests to classify, by status, as the service's own metrics have them."""
    found = {}
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith("vitserve_requests_total{") and "/v1/classify" in line:
            found[line.partition('status="')[2].partition('"')[0]] = int(float(line.rpartition(" ")[2]))
    return found


def test_a_closed_loop_on_the_real_service_agrees_with_its_metrics(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    before = counted_by(server)

    async def scenario() -> tuple[Run, Run]:
        client = Client(host, int(port))
        closed = await closed_loop(client, [raw("/v1/classify", JPEG)], 4, 0.1, 0.6)
        opened = await open_loop(client, [raw("/v1/classify", JPEG)], 40.0, 0.0, 0.5)
        await client.ask(get("/livez"))
        client.close()
        return closed, opened

    runs = asyncio.run(scenario())
    assert all(each.outcome == "200" for run in runs for each in run.samples)
    assert counted_by(server)["200"] - before.get("200", 0) == sum(len(run.samples) for run in runs)
    assert summary(runs[0]).answered == len(runs[0].counted()) > 0


def test_the_command_measures_a_service_and_writes_what_it_shows(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "one.jpg").write_bytes(JPEG.content)
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "json", "svg")}
    written = ["--csv", str(files["csv"]), "--json", str(files["json"]), "--plot", str(files["svg"])]
    load = [
        "--connections",
        "1,2",
        "--rate",
        "30",
        "--seconds",
        "0.3",
        "--warm-up-seconds",
        "0.1",
        "--deadline-ms",
        "5000",
    ]
    result = CliRunner().invoke(
        app, ["bench", server.url, "--images", str(tmp_path), *load, *written], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(files["json"].read_text())["rows"]
    assert [(row["loop"], row["connections"]) for row in rows] == [("closed", 1), ("closed", 2), ("open", 0)]
    assert all(row["errors"] == 0 and row["answered"] == row["requests"] > 0 for row in rows)
    assert all(row["goodput_per_second"] == row["answered_per_second"] for row in rows)
    with files["csv"].open(newline="") as lines:
        assert [row["answered"] for row in csv.DictReader(lines)] == [str(row["answered"]) for row in rows]
    assert "2 connections" in result.output
    assert "<svg" in files["svg"].read_text()


def test_the_command_measures_engines_alone(bundle: Bundle, tmp_path: Path) -> None:
    asked = [
        "--engine",
        "onnxruntime",
        "--precision",
        "fp32",
        "--batch-sizes",
        "1,3",
        "--streams",
        "2",
        "--threads",
        "1",
        "--rounds",
        "2",
        "--seconds",
        "1e-9",
    ]  # one batch each
    result = CliRunner().invoke(
        app, ["bench", str(bundle.path), *asked, "--json", str(tmp_path / "out.json")], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["engine"], row["precision"], row["streams"], row["threads"], row["batch_size"]) for row in rows] == [
        ("onnxruntime", "fp32", 2, 1, 1),
        ("onnxruntime", "fp32", 2, 1, 3),
    ]
    assert all(0 < row["least_per_second"] <= row["images_per_second"] <= row["most_per_second"] for row in rows)


# What goes wrong


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["/nowhere/bundle"], "/nowhere/bundle is not a bundle"),
        (["http://127.0.0.1:{closed}"], "nobody listens at 127.0.0.1:{closed}: connection rejected"),
        (["http://127.0.0.1:{closed}", "--images", "{empty}"], "{empty} holds no images"),
        (["http://127.0.0.1:{closed}", "--images", "{empty}/no.jpg"], "there is no {empty}/no.jpg"),
        (["http://127.0.0.1:{closed}", "--connections", "1,x"], "--connections is '1,x'"),
        (["http://127.0.0.1:{closed}", "--rate", "0"], "--rate is '0'; each must be above 0"),
        (["https://127.0.0.1:{closed}"], "TLS is not spoken here"),
        (["{bundle}", "--precision", "int8"], "the bundle has no artifact for engine 'auto' in precision 'int8'"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    asked: list[str], message: str, bundle: Bundle, tmp_path: Path
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: rejected for sure
        values = {"closed": held.getsockname()[1], "empty": tmp_path, "bundle": bundle.path}
        result = CliRunner().invoke(app, ["bench", *(each.format(**values) for each in asked)])
    assert result.exit_code == 2, result.output
    assert message.format(**values) in result.output


def test_a_wrong_route_is_said_before_anything_is_measured(server: Server) -> None:
    result = CliRunner().invoke(app, ["bench", f"{server.url}/nothing/here"])
    assert result.exit_code == 2
    assert "answered the first image with 404" in result.output


def test_a_picture_without_matplotlib_is_refused_with_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(app, ["bench", "http://127.0.0.1:1", "--plot", str(tmp_path / "out.svg")])
    assert result.exit_code == 2
    assert "pip install 'vitserve[bench]'" in result.output


def test_a_service_that_goes_ends_the_measurement() -> None:
    async def scenario() -> None:
        server = Answering()
        async with listening(server) as port:
            pass
        await closed_loop(Client("127.0.0.1", port), [raw("/", JPEG)], 2, 0.0, 5.0)

    with pytest.raises(ConnectionGoneError, match="connection rejected"):
        asyncio.run(scenario())
