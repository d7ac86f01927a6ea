"""Comparisons: servers as foreign process trees, who is skipped and why, medians over rounds, and what is written into the documents."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from benchmarks import document_sections
from benchmarks.compare import asked
from benchmarks.comparison import Compared, Measured, as_markdown
from benchmarks.processes import ServerFailedError, free_port, process_tree
from benchmarks.servers import NAMES, Setup, server_under_test
from benchmarks.waterfall import steps
from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from vitserve.bench import plot
from vitserve.bench.load import Run, Sample
from vitserve.bench.report import EngineRow, ServiceRow, summary
from vitserve.model.bundle.bundle import Bundle

SERVER = """
import subprocess, sys, http.server
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
open(sys.argv[2], "w").write(str(child.pid))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def answers_get(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    return False


def test_a_server_is_ended_with_all_that_it_started_in_sessions_of_their_own_too(tmp_path: Path) -> None:
    port, note = free_port(), tmp_path / "child"
    with process_tree(
        [sys.executable, "-c", SERVER, str(port), str(note)], tmp_path, {}, port, lambda: answers_get(port)
    ):
        child = Path("/proc") / note.read_text() / "cmdline"
        assert b"time.sleep" in child.read_bytes()
        with (
            pytest.raises(ServerFailedError, match=f"somebody listens on port {port} already"),
            process_tree(["true"], tmp_path, {}, port, lambda: True),
        ):
            pass
    assert not child.exists() or b"time.sleep" not in child.read_bytes()
    assert not answers_get(port)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailedError, match="it ended: no such model"),
        process_tree(
            [sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path, {}, free_port(), lambda: False
        ),
    ):
        pass


def ended(seconds: float, outcome: str = "200") -> Sample:
    return Sample(0.0, 0.0, seconds, outcome, b"")


def test_the_command_in_the_documents_has_no_paths() -> None:
    said = asked(["--bundle", "/a/b", "--source", "random:B/16", "--connections", "1", "8", "--output", "x"])
    assert said == "--bundle BUNDLE --source random:B/16 --connections 1 8 --output OUTPUT"


def test_only_what_lies_between_the_marks_is_rewritten(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n")
    document_sections.rewrite(page, "a", "new \\1\n")
    document_sections.rewrite(page, "b", "too")
    assert (
        page.read_text() == "before\n<!-- a -->\nnew \\1\n<!-- /a -->\nbetween\n<!-- b -->\ntoo\n<!-- /b -->\nafter\n"
    )
    (tmp_path / "drawn.svg").write_text("<svg/>")
    document_sections.publish(page, "a", "table", tmp_path / "drawn.svg")
    assert "<!-- a -->\n![a](page-a.svg)\n\ntable\n<!-- /a -->" in page.read_text()
    assert (tmp_path / "page-a.svg").read_text() == "<svg/>"
    with pytest.raises(ValueError, match="has 0 parts between <!-- c -->"):
        document_sections.rewrite(page, "c", "nothing")


def test_the_documents_marks_are_those_that_the_commands_name() -> None:
    for name in ("b16", "one-block", "waterfall"):
        document_sections.check(ROOT / "docs" / "benchmarks.md", name)


def service_row(rate: float, errors: int = 0) -> ServiceRow:
    samples = [ended(0.1)] * int(rate) + [ended(0.1, "500")] * errors
    return summary(Run("closed", 8, 0.0, 1.0, tuple(samples), 0.1))


def test_a_comparison_gives_medians_between_the_least_and_the_most_and_says_who_was_left_out() -> None:
    found = Compared("tiny", "--rounds 3", 3, 1.0, right=[1, 2], skipped={"ray": "it has no virtual environment"})
    found.services = [Measured("plain", "plain FastAPI", 3.0, 2, service_row(rate)) for rate in (30, 10, 20)]
    found.services += [Measured("lit", "LitServe", 9.0, 1, service_row(50, errors=2))]
    row = found.rows()[0]
    assert (row.rounds, row.per_second, row.least_per_second, row.most_per_second, row.errors) == (3, 20, 10, 30, 0)
    text = as_markdown(found)
    assert "| plain FastAPI | 20 (10 – 30) | 100 (100 – 100) | 3 s | 2 of 2 |" in text
    assert "50 (50 – 50) (2 errors)" in text
    assert "1 of 2" in text
    assert "Left out: ray: it has no virtual environment" in text


def test_steps_gains_are_medians_of_the_rounds_own_ratios() -> None:
    from vitserve.bench.engine import Intervals

    results = {
        (0, 1): Intervals([10.0, 20.0, 40.0]),
        (1, 1): Intervals([20.0, 30.0, 80.0]),
    }  # a machine that speeds up gains nothing by it
    first, second = steps(["plain", "more"], [1], results)
    assert (first.gain, first.in_all, second.gain, second.least_gain, second.most_gain) == (None, 1.0, 2.0, 1.5, 2.0)


def test_a_server_without_its_environment_is_left_out_with_the_reason(bundle: Bundle, tmp_path: Path) -> None:
    setup = Setup(bundle, tmp_path / "plain.onnx", 16, tmp_path, tmp_path, 1)
    taken = {name: server_under_test(name, setup) for name in NAMES}
    assert taken["litserve"] == "it has no virtual environment: litserve in the directory of --work"
    assert taken["vitserve-int8"] == "the bundle has no int8"
    assert not isinstance(taken["vitserve-fp32"], str)
    assert not isinstance(taken["plain"], str)
    with pytest.raises(ValueError, match="there is no server 'torchserve'"):
        server_under_test("torchserve", setup)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    bars = [plot.Bar("vitserve", 2.0, 1.5, 2.5), plot.Bar("plain", 1.0, 1.0, 1.0)]
    plot.draw_bars({"8 connections": bars, "batch 8": bars[:1]}, "images/s", tmp_path / "bars.svg")
    plot.draw_waterfall(bars, "images/s", tmp_path / "waterfall.svg")
    rows = [EngineRow("openvino", "fp32", 1, 2, size, 10.0 * size, 9.0, 99.0, 1.0, None) for size in (1, 4)]
    plot.draw_engines(rows, tmp_path / "engines.svg")
    for name in ("bars", "waterfall", "engines"):
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_a_lone_caller_is_told_when_it_is_ready_what_memory_it_takes_and_where_time_goes(
    bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "picture.jpg").write_bytes(encoded(random_image()))
    command = [
        sys.executable,
        "-m",
        "benchmarks.single_client",
        "--images",
        str(tmp_path),
        "--starts",
        "1",
        "--requests",
        "5",
        f"--serve=--bundle {bundle.path}",
    ]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    figures = (
        r"ready after (#) s, (#) MB; p50 of 5 answers: (#) ms = engine (#) \+ decoding (#), and (#) between\n".replace(
            "#", r"[\d.]+"
        )
    )
    found = re.fullmatch(figures, said)
    assert found is not None, said
    ready, memory, whole, *parts = (float(each) for each in found.groups())
    assert ready > 0
    assert 100 < memory < 1000, "of three processes with numpy and an engine"
    assert whole > max(parts)
