"""benchmarks.before_after: two checkouts in one run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from benchmarks.before_after import Measurement, Pair, main, result_table
from benchmarks.processes import ServerFailedError
from benchmarks.servers import check_checkout, vitserve_server
from tests.support.paths import ROOT
from vitserve.bench.report import stdout_console
from vitserve.model.bundle.bundle import Bundle


@pytest.mark.slow
def test_a_checkout_compared_with_itself_has_every_round(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = shlex.split("--connections 1,2 --rounds 2 --seconds 0.2 --warm-up-seconds 0.1")
    output = tmp_path / "out.json"
    checkouts = ["--old", str(ROOT), "--new", str(ROOT), f"--serve=--bundle {bundle.path}"]
    main([*checkouts, *load, "--json", str(output)])
    rows = json.loads(output.read_text())["rows"]
    expected = {(side, number, count) for side in ("old", "new") for number in (1, 2) for count in (1, 2)}
    assert {(row["checkout"], row["round"], row["connections"]) for row in rows} == expected
    assert len(rows) == len(expected)
    assert all(row["requests_per_second"] > 0 and row["p50_ms"] > 0 for row in rows)
    assert any(row["cpu_ms"] > 0 for row in rows)
    printed = capsys.readouterr()
    assert "2 connections" in printed.out
    assert printed.err.count("ratio") == 4


def test_the_result_is_the_median_of_the_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    rates = [(100.0, 110.0), (200.0, 200.0), (50.0, 60.0)]
    pairs = [
        Pair(Measurement("old", number, 1, old, 10.0, 1.0), Measurement("new", number, 1, new, 10.0, 0.5))
        for number, (old, new) in enumerate(rates)
    ]
    stdout_console().print(result_table(pairs))
    line = capsys.readouterr().out.splitlines()[-1]
    assert "100 → 110  1.100 (1.000 – 1.200)" in line
    assert "1 → 0.5  0.500 (0.500 – 0.500)" in line


def test_a_checkout_that_is_not_imported_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "vitserve.py").write_text("")
    check_checkout(vitserve_server("old", tmp_path, []))
    (tmp_path / "vitserve.py").write_text("raise ImportError('broken checkout')")
    with pytest.raises(ServerFailedError, match=f"not imported from {tmp_path}"):
        check_checkout(vitserve_server("old", tmp_path, []))


def test_a_directory_without_vitserve_ends_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="before_after: vitserve is not imported from"):
        main(["--old", str(ROOT), "--new", str(tmp_path)])
