"""``vitserve predict``: every image once and in order, also after kill -9, from all kinds of sources."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from typer.testing import CliRunner

from tests.support.images import encoded, random_image
from tests.support.waiting import eventually
from vitserve.cli.main import app
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Decoder
from vitserve.predict.items import SourceError, items_of
from vitserve.predict.output import Output, OutputError, Row
from vitserve.predict.report import report_of
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine

COUNT = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images in two directories, and one that cannot be read."""
    directory = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        path = directory / ("a" if number % 2 else "b") / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(random_image(20, 20, seed=number)))
    (directory / "a" / "damaged.jpg").write_bytes(b"no image")
    return directory


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_are_the_predictions_of_the_engine_in_order(
    images: Path, bundle: Bundle, tmp_path: Path, suffix: str
) -> None:
    output, embeddings = tmp_path / f"out{suffix}", tmp_path / "out.npy"
    text = run(images, "-o", output, "--bundle", bundle.path, "--precision", "fp32", "--embeddings", embeddings)
    assert f"images: {COUNT + 1}, without prediction: 1" in text
    rows, files = rows_of(output), [item.name for item in items_of(str(images))]
    assert [row["path"] for row in rows] == files
    decoder, engine = (
        Decoder(bundle.manifest.preprocessing),
        open_engine(bundle, EngineOptions(precision="fp32")).engine,
    )
    stored = np.load(embeddings)
    for index, row in enumerate(rows):
        if row["path"].endswith("damaged.jpg"):
            assert "NotAnImage" in row["error"]
            assert not stored[index].any()
            continue
        outputs = engine.run(0, decoder.decode(Path(row["path"]).read_bytes())[None])
        assert row["label"] == bundle.labels[int(outputs.logits.argmax())]
        np.testing.assert_allclose(stored[index], outputs.embedding[0], atol=1e-4)
    engine.close()


def test_archives_tables_and_patterns_are_sources(images: Path, bundle: Bundle, tmp_path: Path) -> None:
    files = sorted((images / "b").iterdir())
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for file in files:
            archive.add(file, arcname=file.name)
    (tmp_path / "images.csv").write_text("id,path\n" + "".join(f"{n},{file}\n" for n, file in enumerate(files)))
    found = []
    for number, source in enumerate((f"{images}/b/*.png", tmp_path / "images.tar", tmp_path / "images.csv")):
        output = tmp_path / f"{number}.jsonl"
        run(source, "-o", output, "--bundle", bundle.path, "--precision", "fp32")
        found.append([(Path(row["path"]).name, row["label"]) for row in rows_of(output)])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(files)


@pytest.mark.parametrize("kind", ["paths", "bytes"])
def test_parquet_is_a_source_and_an_output(images: Path, bundle: Bundle, tmp_path: Path, kind: str) -> None:
    """Bytes as datasets of Hugging Face have them: a structure with bytes and path."""
    files = sorted((images / "b").iterdir())
    column: list[Any] = [str(file) for file in files]
    if kind == "bytes":
        column = [{"bytes": file.read_bytes(), "path": str(file)} for file in files]
    parquet.write_table(pyarrow.table({"image": column}), tmp_path / "images.parquet")
    arguments = "--bundle", bundle.path, "--precision", "fp32"
    run(tmp_path / "images.parquet", "-o", tmp_path / "out.parquet", *arguments)
    run(images / "b", "-o", tmp_path / "out.jsonl", *arguments)
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    expected = rows_of(tmp_path / "out.jsonl")
    assert [(row["path"], row["label"]) for row in rows] == [(row["path"], row["label"]) for row in expected]
    assert not (tmp_path / "out.parquet.partial.jsonl").exists()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_row_that_was_cut_off_is_written_again(images: Path, bundle: Bundle, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    arguments = images, "-o", output, "--bundle", bundle.path, "--precision", "fp32"
    run(*arguments)
    whole = output.read_bytes()
    for length in (0, 10, len(whole) // 3, len(whole) - 1, len(whole)):
        output.write_bytes(whole[:length])
        run(*arguments)
        assert output.read_bytes() == whole


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(images: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Killed three times, at different rows."""
    output, complete = tmp_path / "out.jsonl", tmp_path / "complete.jsonl"
    many = tmp_path / "many.csv"
    files = [item.name for item in items_of(str(images))]
    many.write_text("path\n" + "\n".join(files * 100) + "\n")
    arguments = str(many), "--bundle", str(bundle.path), "--precision", "fp32", "--max-batch", "1", "-o"
    command = [sys.executable, "-m", "vitserve", "predict", *arguments, str(output)]
    for part in (1, 2, 3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        eventually(lambda: output.exists() and output.stat().st_size > 50_000 * part, "some rows")  # noqa: B023
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run(*arguments, output)
    run(*arguments, complete)
    assert output.read_bytes() == complete.read_bytes()
    assert len(rows_of(output)) == 100 * len(files)


def test_an_output_of_other_images_is_not_continued(images: Path, bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(images / "a", "-o", output, "--bundle", bundle.path)
    before = output.read_bytes()
    result = CliRunner().invoke(app, ["predict", str(images / "b"), "-o", str(output), "--bundle", str(bundle.path)])
    assert result.exit_code == 2
    assert "rows of other images" in result.output
    assert output.read_bytes() == before


def test_an_output_of_another_model_or_options_is_not_continued(images: Path, bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(images / "a", "-o", output, "--bundle", bundle.path)
    before = output.read_bytes()
    for more, message in (
        (["--top-k", "1", "--bundle", str(bundle.path)], "predictions of another model or other options"),
        ([], "predictions of another model or other options"),
        (["--embeddings", str(tmp_path / "e.npy"), "--bundle", str(bundle.path)], "rows without embeddings"),
    ):
        result = CliRunner().invoke(app, ["predict", str(images / "a"), "-o", str(output), *more])
        assert result.exit_code == 2
        assert message in result.output
    assert output.read_bytes() == before


def test_wrong_sources_and_outputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("id\n1\n")
    with pytest.raises(SourceError, match="needs one of the columns path, file, filename, image; it has id"):
        items_of(str(tmp_path / "table.csv"))
    with pytest.raises(SourceError, match="has no images"):
        items_of(str(tmp_path / "*.png"))
    with pytest.raises(OutputError, match=r"must end with .csv, .jsonl, or .parquet"):
        Output(tmp_path / "out.txt", "x")
    (tmp_path / "other.csv").write_text("something else\n")
    with pytest.raises(OutputError, match="is not an output of"):
        Output(tmp_path / "other.csv", "x")
    assert (tmp_path / "other.csv").read_text() == "something else\n"


def test_accuracy_and_calibration_of_labeled_directories() -> None:
    rows = [Row(f"x/cat/{number}.jpg", "cat" if number < 8 else "dog", 0.8) for number in range(10)]
    report = report_of([*rows, Row("x/cat/damaged.jpg", error="NotAnImage")], ("cat", "dog"))
    assert report is not None
    assert (report.images, report.accuracy) == (10, 0.8)
    assert report.calibration_error == pytest.approx(0.0)
    assert report.confusion.tolist() == [[8, 2], [0, 0]]
    assert report_of([Row("x/other/1.jpg", "cat", 0.8)], ("cat", "dog")) is None
