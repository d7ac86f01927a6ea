"""examples/ray_data.py: its rows are those of `vitserve predict`. Needs Ray, which make test-slow installs."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from typer.testing import CliRunner

from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from vitserve.cli.main import app

COUNT = 300


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_the_rows_are_those_of_predict(tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "predictions"
    images.mkdir()
    for number in range(COUNT):
        (images / f"{number:03}.png").write_bytes(encoded(random_image(20 + number % 30, 24, seed=number)))
    (images / "damaged.jpg").write_bytes(b"no image")
    command = [sys.executable, ROOT / "examples" / "ray_data.py", images, output, "--cores", "1", "--block", "64"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"images: {COUNT + 1}" in done.stdout
    expected = tmp_path / "expected.csv"
    assert CliRunner().invoke(app, ["predict", str(images), "-o", str(expected)]).exit_code == 0
    rows = {Path(row["path"]).name: row for row in parquet.read_table(output).to_pylist()}
    assert len(rows) == COUNT + 1
    for other in csv.DictReader(expected.read_text().splitlines()):
        row = rows[Path(other["path"]).name]
        assert (row["label"], row["error"]) == (other["label"], other["error"])
        if other["probability"]:
            assert row["probability"] == pytest.approx(float(other["probability"]), abs=1e-6)
