"""`vitserve bench`: what it measures, prints and writes, and its error messages."""

from __future__ import annotations

import csv
import json
import shlex
import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.images import encoded, random_image
from tests.support.server import Server
from vitserve.cli.main import app
from vitserve.model.bundle.bundle import Bundle

WIDE = {"COLUMNS": "200"}


def test_a_server_is_measured_and_the_files_are_written(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "one.jpg").write_bytes(encoded(random_image(60, 45), "JPEG"))
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "json", "svg")}
    output = ["--csv", str(files["csv"]), "--json", str(files["json"]), "--plot", str(files["svg"])]
    load = shlex.split("--connections 1,2 --rate 30 --seconds 0.3 --warm-up-seconds 0.1 --deadline-ms 5000")
    command = ["bench", server.url, "--images", str(tmp_path), *load, *output]
    result = CliRunner().invoke(app, command, env=WIDE)
    assert result.exit_code == 0, result.output
    document = json.loads(files["json"].read_text())
    rows = document["rows"]
    assert document["options"]["connections"] == "1,2"
    assert [(row["loop"], row["connections"]) for row in rows] == [("closed", 1), ("closed", 2), ("open", 0)]
    assert all(row["errors"] == 0 and row["successful"] == row["requests"] > 0 for row in rows)
    assert all(row["goodput_per_second"] == row["throughput_per_second"] for row in rows)
    with files["csv"].open(newline="") as lines:
        assert [row["successful"] for row in csv.DictReader(lines)] == [str(row["successful"]) for row in rows]
    assert "2 connections" in result.output
    assert "<svg" in files["svg"].read_text()


def test_engines_are_measured(bundle: Bundle, tmp_path: Path) -> None:
    engine = shlex.split("--engine onnxruntime --precision fp32 --streams 2 --threads 1")
    load = shlex.split("--batch-sizes 1,3 --rounds 2 --seconds 1e-9")  # one batch in each round
    command = ["bench", str(bundle.path), *engine, *load, "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, command, env=WIDE)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["engine"], row["precision"], row["streams"], row["threads"], row["batch_size"]) for row in rows] == [
        ("onnxruntime", "fp32", 2, 1, 1),
        ("onnxruntime", "fp32", 2, 1, 3),
    ]
    for row in rows:
        assert 0 < row["min_images_per_second"] <= row["images_per_second"] <= row["max_images_per_second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/bundle"], "/nowhere/bundle is not a bundle"),
        (["http://127.0.0.1:{unused}"], "no server is listening on 127.0.0.1:{unused}"),
        (["http://127.0.0.1:{unused}", "--images", "{empty}"], "{empty} contains no images"),
        (
            ["http://127.0.0.1:{unused}", "--images", "{empty}/no.jpg"],
            "{empty}/no.jpg is neither a file nor a directory",
        ),
        (["http://127.0.0.1:{unused}", "--connections", "1,x"], "--connections is '1,x'"),
        (
            ["http://127.0.0.1:{unused}", "--connections", "1.5"],
            "--connections is '1.5'; every number must be an integer",
        ),
        (["http://127.0.0.1:{unused}", "--connections", ","], "no load is specified"),
        (["http://127.0.0.1:{unused}", "--rate", "0"], "--rate is '0'; every number must be above 0"),
        (["https://127.0.0.1:{unused}"], "TLS is not supported"),
        (["{bundle}", "--precision", "int8"], "the bundle has no artifact for engine 'auto' with precision 'int8'"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, bundle: Bundle, tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # but not listening
        values = {"unused": bound.getsockname()[1], "empty": tmp_path, "bundle": bundle.path}
        result = CliRunner().invoke(app, ["bench", *(argument.format(**values) for argument in arguments)])
    assert result.exit_code == 2, result.output
    assert message.format(**values) in result.output


def test_a_wrong_route_is_reported_before_the_load(server: Server) -> None:
    result = CliRunner().invoke(app, ["bench", f"{server.url}/no/route"])
    assert result.exit_code == 2
    assert "responded to the first image with status 404" in result.output


def test_a_plot_without_matplotlib_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(app, ["bench", "http://127.0.0.1:1", "--plot", str(tmp_path / "out.svg")])
    assert result.exit_code == 2
    assert "pip install 'vitserve[bench]'" in result.output
