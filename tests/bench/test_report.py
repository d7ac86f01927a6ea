"""Percentiles, throughput and goodput of known samples, and the files that are written."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.samples import sample
from vitserve.bench.load import LoadResult
from vitserve.bench.report import (
    EngineRow,
    engine_table,
    percentile,
    service_table,
    stdout_console,
    summarize,
    throughput,
    write_csv,
    write_json,
)

Times = st.lists(st.floats(0, 100), min_size=1, max_size=300)


@given(Times, st.sampled_from([0.5, 0.9, 0.99, 0.999]))
def test_a_percentile_is_the_smallest_value_above_the_share(values: list[float], share: float) -> None:
    result = percentile(values, share)
    if result is None:
        assert len(values) < round(1 / (1 - share))
    else:
        assert sum(value <= result for value in values) >= share * len(values) - 1e-6
        assert sum(value < result for value in values) < share * len(values)


def test_percentiles_of_a_thousand_numbers() -> None:
    values = [float(number) for number in range(1000, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 0.999)] == [500, 900, 990, 999]
    assert percentile(values[1:], 0.999) is None
    assert percentile([], 0.5) is None


@given(Times, st.floats(0, 100), st.floats(0.1, 100))
def test_goodput_counts_responses_within_the_deadline(latencies: list[float], deadline: float, seconds: float) -> None:
    result = LoadResult("open", 0, 1.0, seconds, tuple(sample(latency) for latency in latencies), 0.0)
    in_time = sum(latency <= deadline for latency in latencies)
    assert throughput(result, deadline) * seconds == pytest.approx(in_time)
    assert throughput(result) * seconds == pytest.approx(len(latencies))


@given(st.floats(0.01, 3), st.integers(1, 9), st.floats(0, 1), st.floats(0.1, 5))
def test_closed_loop_throughput_does_not_depend_on_the_start(
    latency: float, connections: int, phase: float, seconds: float
) -> None:
    """Responses of constant latency give the same throughput, however few lie entirely within the measured time."""
    first = -latency * (1 + phase)
    moments = [first + number * latency for number in range(int(seconds / latency) + 4)]
    samples = tuple(sample(latency, planned=moment) for moment in moments for _ in range(connections))
    result = LoadResult("closed", connections, 0.0, seconds, samples, 0.0)
    assert throughput(result) == pytest.approx(connections / latency)
    assert throughput(result, latency / 2) == 0


def test_rejections_and_errors_are_counted_separately() -> None:
    samples = [sample(0.01), sample(0.03), sample(9.0, "429"), sample(9.0, "504"), sample(9.0, "timeout")]
    row = summarize(LoadResult("open", 0, 5.0, 1.0, tuple(samples), 0.0), deadline_seconds=0.02)
    assert (row.requests, row.successful, row.rejected, row.errors) == (5, 2, 1, 2)
    assert row.statuses == "200: 2, 429: 1, 504: 1, timeout: 1"
    assert (row.throughput_per_second, row.goodput_per_second) == (2, 1)
    assert (row.p50_ms, row.p99_ms) == (10, None)


def test_only_the_measured_time_is_counted() -> None:
    samples = tuple(sample(0.5, planned=planned) for planned in (-1.0, -0.4, 0.2, 0.8))
    closed, opened = (LoadResult(loop, 0, 0.0, 1.0, samples, 0.0) for loop in ("closed", "open"))
    assert [measured.planned for measured in closed.measured()] == [-0.4, 0.2]  # ended within the second
    assert [measured.planned for measured in opened.measured()] == [0.2, 0.8]  # planned within the second


def test_tables_show_errors_and_missing_percentiles(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        summarize(LoadResult("closed", 1, 0.0, 1.0, (sample(0.5), sample(0.5), sample(0.1, "500")), 0.25)),
        summarize(LoadResult("open", 0, 20.0, 1.0, (sample(0.5, sent=0.1),), 0.0), deadline_seconds=0.1),
    ]
    stdout_console().print(service_table(rows, 100))
    stdout_console().print(engine_table([EngineRow("openvino", "int8", 2, 1, 8, 20.0, 19.0, 21.0, 123.4, None)]))
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    header, closed, opened, _, engine = ([cell.strip() for cell in line if cell.strip()] for line in lines)
    assert header[3] == "200/s in 100 ms"
    assert closed == ["1 connection", "3", "2.0", "2.0", "500", "–", "–", "–", "0", "1 (500: 1)", "–", "0.25"]
    assert opened == ["20 requests/s", "1", "1.0", "0.0", "–", "–", "–", "–", "0", "0", "–", "0.00"]
    assert engine == ["openvino", "int8", "2 × 1", "8", "20.0", "19.0 – 21.0", "123", "–"]


FLOATS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
ENGINE_ROWS = st.builds(
    EngineRow, p99_ms=FLOATS, engine=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]))
)


@given(rows=st.lists(ENGINE_ROWS, min_size=1, max_size=5))
def test_csv_and_json_contain_every_value(rows: Sequence[EngineRow], tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("written")
    write_csv(directory / "rows.csv", rows)
    with (directory / "rows.csv").open(newline="", encoding="utf-8") as lines:
        for row, line in zip(rows, csv.DictReader(lines), strict=True):
            assert line["engine"] == row.engine
            assert int(line["batch_size"]) == row.batch_size
            assert repr(float(line["images_per_second"])) == repr(row.images_per_second)
            assert (float(line["p99_ms"]) if line["p99_ms"] else None) == row.p99_ms
    finite = [
        row for row in rows if all(not isinstance(value, float) or math.isfinite(value) for value in vars(row).values())
    ]
    write_json(directory / "rows.json", {"vitserve": "0"}, finite)
    written = json.loads((directory / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert [EngineRow(**row) for row in written] == finite
