"""benchmarks.http: the figures of one turn, the tables, and a run against the real server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.http import __main__ as command
from benchmarks.http import figure, results, tables
from benchmarks.http.load.requests import json_request, multipart_request
from benchmarks.http.overload import Overload, summarize
from benchmarks.http.results import Results, Row
from benchmarks.http.throughput import Throughput
from benchmarks.processes import role_of
from tests.support.samples import sample
from vitserve.bench.load import LoadResult
from vitserve.bench.request import EncodedImage

TOOLS = shutil.which("wrk") and (shutil.which("gcc") or shutil.which("cc"))


@given(st.lists(st.floats(0, 3), max_size=200), st.floats(0.0, 2.0))
def test_late_responses_do_not_raise_goodput(latencies: list[float], lag: float) -> None:
    """Responses after the interval, and those beyond the timeout, count nothing, however late the generator sends."""
    samples = tuple(
        sample(lag + latency, planned=number / 100, sent=number / 100 + lag) for number, latency in enumerate(latencies)
    )
    turn = summarize(LoadResult("open", 0, 100.0, 2.0, samples, 0.0), [], timeout_seconds=0.5, capacity=50.0)
    ended = [request for request in samples if request.ended < 2.0]
    assert turn.goodput * 2.0 == pytest.approx(sum(request.ended - request.sent <= 0.5 for request in ended))
    assert turn.offered * 2.0 == pytest.approx(sum(request.sent < 2.0 for request in samples))


def test_a_turn_counts_what_was_admitted_and_in_time() -> None:
    samples = (
        *(sample(0.1) for _ in range(97)),
        sample(0.6),
        sample(0.2, "504"),
        sample(5.0, "gave up"),
        *(sample(number / 1000, "429") for number in range(1, 101)),
    )
    live = [sample(0.002), sample(5.0, "gave up")]
    turn = summarize(LoadResult("open", 0, 200.0, 1.0, samples, 0.05), live, timeout_seconds=0.5, capacity=100.0)
    assert (turn.admitted, turn.in_time, turn.in_time_share) == (100, 97, 0.97)
    assert turn.goodput_share == 0.97
    assert turn.rejected_p50_ms == pytest.approx(50)
    assert turn.rejected_p99_ms == pytest.approx(99)
    assert (turn.live_ms, turn.live_failures) == ([2.0, 5000.0], 1)
    cells = tables.cells([turn])
    assert (cells["5xx / lost"], cells["livez p50 / p99"]) == ("1 / 1", "2 / 5000, 1 failed")


def throughput(rate: float) -> Throughput:
    return Throughput(rate, 1.0, 2.0, {"http worker": 0.5, "engine worker": 0.25}, 0.1)


def some_results() -> Results:
    """Three rounds in which the machine becomes slower, and one overload without rejections."""
    rates = {"new": (200.0, 100.0, 50.0), "triton": (100.0, 40.0, 20.0)}
    rows = [
        Row("throughput", "1 KB, 1 connection", server, number + 1, throughput(rate))
        for server, by_round in rates.items()
        for number, rate in enumerate(by_round)
    ]
    turn = summarize(LoadResult("open", 0, 200.0, 1.0, (sample(0.1),), 0.0), [], 0.5, capacity=100.0)
    rows.append(Row("overload", "1 KB, kept, 1.2 ×", "new", 1, turn))
    return Results(["--rounds 3"], rows, {"new": "vitserve", "triton": "Triton"}, {"plain": "not installed\nat all"})


def test_tables_show_the_rounds_and_the_ratios_within_them() -> None:
    text = tables.as_markdown(some_results())
    columns = "1 | 2 | 0.75 | http worker 0.5, engine worker 0.25 | 0.1"
    ranged = (
        columns.replace("1 |", "1 (1 – 1) |", 1).replace("2 |", "2 (2 – 2) |").replace("0.75", "0.75 (0.75 – 0.75)")
    )
    assert f"| 1 KB, 1 connection | vitserve | 100 (50 – 200) | {ranged} |  |" in text
    assert f"| 1 KB, 1 connection | Triton | 40 (20 – 100) | {ranged} | 2.5 (2 – 2.5) |" in text
    assert "Skipped: plain: not installed\n" in text
    assert "median (min – max) of 1 to 3 rounds" in text


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path, found = tmp_path / "http.json", some_results()
    found.save(path)
    assert results.read(path) == found
    assert (found.next_round("throughput"), found.next_round("overload"), found.next_round("decode")) == (4, 2, 1)
    path.write_text(json.dumps({"rows": [{"kind": "Unknown", "measured": {}}]}))
    with pytest.raises(ValueError, match="not a result of this version of the benchmark"):
        results.read(path)


def test_the_plot_has_every_server(tmp_path: Path) -> None:
    found, path = some_results(), tmp_path / "http.svg"
    figure.draw(found, path)
    assert path.read_text().count("<svg") == 1
    figure.draw(Results([], found.rows[-1:], found.titles), path)
    figure.draw(Results([], found.rows[:1], found.titles), path)


def test_requests_with_several_images_have_the_stated_length() -> None:
    images = [EncodedImage(b"first", "image/jpeg"), EncodedImage(b"second", "image/png")]
    for request in (multipart_request("/", images), json_request("/", images)):
        head, _, body = request.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")


@pytest.mark.parametrize(
    ("words", "role"),
    [
        (["python", "-P", "-m", "vitserve.service.http_worker.main", "5"], "http worker"),
        (["python", "-m", "vitserve", "serve"], "supervisor"),
        (["/opt/bin/tritonserver", "--http-port", "1"], "tritonserver"),
        ([], "exited"),
    ],
)
def test_processes_are_named_by_their_role(words: list[str], role: str) -> None:
    assert role_of(words) == role


def test_an_unknown_scenario_ends_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["latency"])
    assert "unknown scenario latency; the scenarios are throughput, decode" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not TOOLS, reason="wrk or a C compiler is not installed")
def test_overload_and_rejections_of_the_real_server(tmp_path: Path) -> None:
    words = ["--servers", "new", "plain", "old", "--rounds", "1", "--seconds", "1", "--output", str(tmp_path)]
    words += ["--payloads", "1KB"]
    command.main(["rejections", *words, "--connections", "2"])
    command.main(["overload", *words, "--multiples", "2", "--arrivals", "new", "--capacity-seconds", "0.5", "--add"])
    found = results.read(tmp_path / "http.json")
    measured = {(row.scenario, row.load): row.measured for row in found.rows}
    rejected = measured["rejections", "1 KB, 2 connections"]
    assert isinstance(rejected, Throughput)
    assert rejected.per_second > 0
    assert set(rejected.cpu_ms) == {"supervisor", "http worker", "engine worker"}
    turn = measured["overload", "1 KB, new, 2 ×"]
    assert isinstance(turn, Overload)
    assert turn.capacity > 0
    assert sum(turn.outcomes.values()) == pytest.approx(turn.offered)
    assert len(turn.live_ms) == pytest.approx(10, abs=1)
    assert found.skipped == {"old": "no checkout was given (--old)"}
    assert len(found.commands) == 2
    assert (tmp_path / "http.svg").stat().st_size > 0
