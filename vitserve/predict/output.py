"""Rows of predictions in a file that grows, so that a run that was killed can continue."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vitserve.model.arrays import Floats

csv.field_size_limit(2**31 - 1)  # top_k of thousands of classes

COLUMNS = ("path", "label", "probability", "top_k", "error")


class OutputError(ValueError):
    """The output cannot be written or continued."""


class Row(NamedTuple):
    path: str
    label: str = ""
    probability: float | None = None
    top_k: Sequence[tuple[str, float]] = ()
    error: str = ""  # why there is no prediction


class RowFormat(Protocol):
    header: bytes

    def encode(self, row: Row) -> bytes: ...

    def decode(self, content: bytes) -> list[Row]:
        """``content``: whole lines, without the header."""
        ...


class JsonLines:
    header = b""

    def encode(self, row: Row) -> bytes:
        return json.dumps(row._asdict(), ensure_ascii=False).encode() + b"\n"

    def decode(self, content: bytes) -> list[Row]:
        return [Row(**json.loads(line)) for line in content.splitlines()]


class Csv:
    """top_k is JSON. Line breaks in names are spaces, so that a row is a line."""

    header = b"path,label,probability,top_k,error\n"

    def encode(self, row: Row) -> bytes:
        text = io.StringIO()
        probability = "" if row.probability is None else repr(row.probability)
        values = row.path, row.label, probability, json.dumps(row.top_k) if row.top_k else "", row.error
        csv.writer(text, lineterminator="").writerow([value.replace("\n", " ").replace("\r", " ") for value in values])
        return text.getvalue().encode() + b"\n"

    def decode(self, content: bytes) -> list[Row]:
        rows = []
        for path, label, probability, top_k, error in csv.reader(io.StringIO(content.decode(), newline="")):
            number = float(probability) if probability else None
            rows.append(Row(path, label, number, json.loads(top_k) if top_k else (), error))
        return rows


class Output:
    """Appends rows. A row is written as a whole or, if the process is killed, cut off and then written again."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Reads the rows that an earlier run has written. ``fingerprint``: of the model and the options.

        Raises OutputError for an unknown suffix, for other content, and for rows with another fingerprint.
        """
        kinds: dict[str, RowFormat] = {".csv": Csv(), ".jsonl": JsonLines(), ".parquet": JsonLines()}
        if path.suffix not in kinds:
            raise OutputError(f"{path} must end with .csv, .jsonl, or .parquet")
        self._path, self._format = path, kinds[path.suffix]
        self._file_path = path.with_name(f"{path.name}.partial.jsonl") if path.suffix == ".parquet" else path
        content = self._file_path.read_bytes() if self._file_path.exists() else b""
        self._check_fingerprint(fingerprint, bool(content))
        header = self._format.header
        if content and not content.startswith(header) and not header.startswith(content):
            raise OutputError(f"{self._file_path} is not an output of `vitserve predict`; choose another file")
        whole = content[len(header) : content.rfind(b"\n") + 1] if len(content) > len(header) else b""
        try:
            self.rows = self._format.decode(whole)
        except (ValueError, TypeError, csv.Error) as error:
            raise OutputError(f"{self._file_path} is not an output of `vitserve predict`: {error}") from error
        self._file_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._file_path.open("r+b" if content else "wb")
        self._file.write(header)
        self._file.seek(len(header) + len(whole))
        self._file.truncate()

    def _check_fingerprint(self, fingerprint: str, has_content: bool) -> None:
        """It is in a hidden file beside the output."""
        beside = self._path.with_name(f".{self._path.name}.run")
        known = beside.read_text() if beside.exists() else ""
        if has_content and not known:
            raise OutputError(f"{self._file_path} is not an output of `vitserve predict`; choose another file")
        if has_content and known != fingerprint:
            raise OutputError(
                f"{self._file_path} has predictions of another model or other options; choose another file"
            )
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(fingerprint)

    def append(self, rows: Sequence[Row]) -> None:
        self._file.write(b"".join(map(self._format.encode, rows)))
        self._file.flush()
        self.rows += rows

    def close(self, complete: bool) -> None:
        """``complete``: there are no more rows. Parquet, which cannot grow, is written now."""
        self._file.close()
        if complete and self._path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            columns = {name: [getattr(row, name) for row in self.rows] for name in COLUMNS}
            columns["top_k"] = [json.dumps(value) for value in columns["top_k"]]
            pyarrow.parquet.write_table(pyarrow.table(columns), self._path)
            self._file_path.unlink()


class Embeddings:
    """A .npy file, float32 [images, width], whose rows are written in any order. Zeros for images with an error."""

    def __init__(self, path: Path, images: int, width: int, rows: int) -> None:
        """``rows``: that the output has. Raises OutputError if they were written without embeddings."""
        if path.exists():
            self._array = np.load(path, mmap_mode="r+")
            if self._array.shape != (images, width):
                raise OutputError(f"{path} has shape {list(self._array.shape)}; it must be [{images}, {width}]")
        elif rows:
            raise OutputError(f"the output has {rows} rows without embeddings; choose another output")
        else:
            self._array = np.lib.format.open_memmap(path, "w+", np.float32, (images, width))

    def write(self, index: int, embedding: Floats) -> None:
        self._array[index] = embedding
