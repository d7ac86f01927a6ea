"""What measurements come to: percentiles, goodput and gains of known numbers, and what is written of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.overload import Turn
from vitserve.bench.load import Run, Sample
from vitserve.bench.report import EngineRow, percentile, rate, summary, write_csv, write_json

Times = st.lists(st.floats(0, 100), min_size=1, max_size=300)


def ended(seconds: float, outcome: str = "200", at: float = 0.0, sent: float | None = None) -> Sample:
    return Sample(at, at if sent is None else sent, at + seconds, outcome, b"")


# Arithmetic


@given(Times, st.sampled_from([0.5, 0.9, 0.99, 0.999]))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    if found is None:
        assert len(values) < round(1 / (1 - share))
    else:
        assert sum(each <= found for each in values) >= share * len(values) - 1e-6
        assert sum(each < found for each in values) < share * len(values)


def test_percentiles_of_a_thousand_known_numbers() -> None:
    values = [float(each) for each in range(1000, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 0.999)] == [500, 900, 990, 999]
    assert percentile(values[1:], 0.999) is None
    assert percentile([], 0.5) is None


@given(Times, st.floats(0, 100), st.floats(0.1, 100))
def test_goodput_is_what_came_in_time_and_no_more_than_what_came(
    latencies: list[float], deadline: float, seconds: float
) -> None:
    run = Run("open", 0, 1.0, seconds, tuple(ended(each) for each in latencies), 0.0)
    assert rate(run, deadline) * seconds == pytest.approx(sum(each <= deadline for each in latencies))
    assert rate(run) * seconds == pytest.approx(len(latencies))


@given(st.floats(0.01, 3), st.integers(1, 9), st.floats(0, 1), st.floats(0.1, 5))
def test_a_closed_loops_rate_does_not_hang_on_where_its_seconds_begin(
    each_takes: float, callers: int, phase: float, seconds: float
) -> None:
    """Callers whose answers always take as long have them at that rate, however few are whole within the measurement."""
    first = -each_takes * (1 + phase)
    moments = [first + number * each_takes for number in range(int(seconds / each_takes) + 4)]
    samples = tuple(ended(each_takes, at=moment) for moment in moments for _ in range(callers))
    run = Run("closed", callers, 0.0, seconds, samples, 0.0)
    assert rate(run) == pytest.approx(callers / each_takes)
    assert rate(run, each_takes / 2) == 0


def test_refusals_and_errors_are_counted_apart_and_have_no_latency() -> None:
    samples = [ended(0.01), ended(0.03), ended(9.0, "429"), ended(9.0, "504"), ended(9.0, "timeout")]
    row = summary(Run("open", 0, 5.0, 1.0, tuple(samples), 0.0), deadline_seconds=0.02)
    assert (row.requests, row.answered, row.rejected, row.errors) == (5, 2, 1, 2)
    assert row.statuses == "200: 2, 429: 1, 504: 1, timeout: 1"
    assert (row.answered_per_second, row.goodput_per_second) == (2, 1)
    assert (row.p50_ms, row.p99_ms) == (10, None)


def test_the_warm_up_is_not_counted_and_neither_is_what_ends_later() -> None:
    samples = tuple(ended(0.5, at=at) for at in (-1.0, -0.4, 0.2, 0.8))
    assert [each.planned for each in Run("closed", 1, 0.0, 1.0, samples, 0.0).counted()] == [
        -0.4,
        0.2,
    ]  # what ended in the second
    assert [each.planned for each in Run("open", 0, 4.0, 1.0, samples, 0.0).counted()] == [
        0.2,
        0.8,
    ]  # what was planned in it


@given(st.lists(st.floats(0, 3), max_size=200), st.floats(0.0, 2.0))
def test_overloads_goodput_never_exceeds_what_came_within_the_turn(delays: list[float], behind: float) -> None:
    """However late the client is: answers after the turn, or out of time, raise nothing."""
    samples = tuple(
        ended(behind + delay, at=place / 100, sent=place / 100 + behind) for place, delay in enumerate(delays)
    )
    turn = Turn(Run("open", 0, 100.0, 2.0, samples, 0.0), timeout_seconds=0.5, capacity=50.0)
    came = [each for each in samples if each.ended < 2.0]
    assert turn.goodput * 2.0 == pytest.approx(sum(each.ended - each.sent <= 0.5 for each in came))
    assert turn.offered * 2.0 == pytest.approx(sum(each.sent < 2.0 for each in samples))


# What is written


FLOATS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
ENGINE_ROWS = st.builds(
    EngineRow, p99_ms=FLOATS, engine=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]))
)


@given(rows=st.lists(ENGINE_ROWS, min_size=1, max_size=5))
def test_csv_and_json_read_back_equal(rows: Sequence[EngineRow], tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("written")
    write_csv(directory / "rows.csv", rows)
    with (directory / "rows.csv").open(newline="", encoding="utf-8") as lines:
        for row, line in zip(rows, csv.DictReader(lines), strict=True):
            assert line["engine"] == row.engine
            assert int(line["batch_size"]) == row.batch_size
            assert repr(float(line["images_per_second"])) == repr(row.images_per_second)
            assert (float(line["p99_ms"]) if line["p99_ms"] else None) == row.p99_ms
    numbers = [
        row
        for row in rows
        if all(each is None or not isinstance(each, float) or math.isfinite(each) for each in vars(row).values())
    ]
    write_json(directory / "rows.json", {"vitserve": "0"}, numbers)
    assert [
        EngineRow(**each) for each in json.loads((directory / "rows.json").read_text(encoding="utf-8"))["rows"]
    ] == numbers
