"""Comparisons: which servers are skipped and why, medians of the rounds, and the sections of the documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import document_sections
from benchmarks.comparison import Comparison, ServerResult, as_markdown
from benchmarks.document_sections import command_line
from benchmarks.servers import NAMES, PEERS, PEERS_DIR, ServerUnavailableError, Setup, server_under_test
from benchmarks.waterfall import steps
from tests.support.paths import ROOT
from tests.support.samples import sample
from vitserve.bench.engine import Timings
from vitserve.bench.load import LoadResult
from vitserve.bench.report import ServiceRow, summarize
from vitserve.model.bundle.bundle import Bundle


def test_the_published_command_has_no_paths() -> None:
    words = ["--bundle", "/a/b", "--source", "random:B/16", "--connections", "1", "8", "--output", "x"]
    assert command_line(words) == "--bundle BUNDLE --source random:B/16 --connections 1 8 --output OUTPUT"


def test_only_the_named_section_is_rewritten(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n")
    document_sections.rewrite(page, "a", "new \\1\n")
    document_sections.rewrite(page, "b", "too")
    expected = "before\n<!-- a -->\nnew \\1\n<!-- /a -->\nbetween\n<!-- b -->\ntoo\n<!-- /b -->\nafter\n"
    assert page.read_text() == expected
    (tmp_path / "drawn.svg").write_text("<svg/>")
    document_sections.publish(page, "a", "table", tmp_path / "drawn.svg")
    assert "<!-- a -->\n![a](page-a.svg)\n\ntable\n<!-- /a -->" in page.read_text()
    assert (tmp_path / "page-a.svg").read_text() == "<svg/>"
    with pytest.raises(ValueError, match="has 0 sections from <!-- c -->"):
        document_sections.rewrite(page, "c", "nothing")


def test_the_document_has_the_sections_of_the_commands() -> None:
    for name in ("b16", "one-block", "http", "waterfall"):
        document_sections.check(ROOT / "docs" / "benchmarks.md", name)


def service_row(rate: int, errors: int = 0) -> ServiceRow:
    samples = [sample(0.1)] * rate + [sample(0.1, "500")] * errors
    return summarize(LoadResult("closed", 8, 0.0, 1.0, tuple(samples), 0.1))


def test_a_comparison_shows_median_minimum_and_maximum() -> None:
    comparison = Comparison("tiny", "--rounds 3", 3, 1.0, expected_classes=[1, 2], skipped={"ray": "not installed"})
    rounds = [(30, 2), (10, 1), (20, 2)]  # requests per second and images with the expected class
    comparison.servers = [ServerResult("plain", "plain FastAPI", 3.0, same, service_row(rate)) for rate, same in rounds]
    comparison.servers += [ServerResult("lit", "LitServe", 9.0, 2, service_row(50, errors=2))]
    row = comparison.server_rows()[0]
    assert (row.rounds, row.per_second, row.min_per_second, row.max_per_second, row.errors) == (3, 20, 10, 30, 0)
    text = as_markdown(comparison)
    assert "| plain FastAPI | 20 (10 – 30) | 100 (100 – 100) | 3 s | 1 of 2 |" in text
    assert "50 (50 – 50) (2 errors)" in text
    assert "2 of 2" in text
    assert "Skipped: ray: not installed" in text


def test_gains_are_medians_of_the_ratios_of_each_round() -> None:
    # The machine becomes faster from round to round, which affects both steps alike.
    results = {(0, 1): Timings([10.0, 20.0, 40.0]), (1, 1): Timings([20.0, 30.0, 100.0])}
    first, second = steps(["plain", "more"], [1], results)
    assert (first.gain, first.total_gain) == (None, 1.0)
    assert (second.gain, second.min_gain, second.max_gain) == (2.0, 1.5, 2.5)


def test_a_server_that_is_not_installed_is_skipped_with_the_reason(bundle: Bundle, tmp_path: Path) -> None:
    setup = Setup(bundle, tmp_path / "plain.onnx", 16, 1, environments_dir=tmp_path)
    with pytest.raises(ServerUnavailableError, match="virtual environment not found: litserve"):
        server_under_test("litserve", setup)
    with pytest.raises(ServerUnavailableError, match="the bundle has no int8"):
        server_under_test("vitserve-int8", setup)
    with pytest.raises(ValueError, match="unknown server 'torchserve'"):
        server_under_test("torchserve", setup)
    assert server_under_test("vitserve-fp32", setup).title == "vitserve fp32"
    assert server_under_test("plain", setup).directory == PEERS_DIR


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_has_its_script_and_instructions(name: str, bundle: Bundle, tmp_path: Path) -> None:
    environment = tmp_path / PEERS[name].environment / "bin"
    environment.mkdir(parents=True)
    (environment / "python").touch()
    server = server_under_test(name, Setup(bundle, tmp_path / "plain.onnx", 16, 1, environments_dir=tmp_path))
    scripts = {"uvicorn": "plain_fastapi.py", "bentoml": "bento.py"}
    known = [word for word in server.command if word.endswith((".py", "/run"))]
    script = known[0] if known else scripts[PEERS[name].environment or "uvicorn"]
    assert (PEERS_DIR / script).is_file()
    readme = (PEERS_DIR / "README.md").read_text()
    assert f"{PEERS[name].port} |" in readme
    assert not PEERS[name].environment or f"runs/peers/{PEERS[name].environment}/bin/pip install" in readme
    assert all(name in NAMES for name in PEERS)
