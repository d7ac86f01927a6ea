"""The images of a directory, a pattern, a tar archive, or a table, in an order that every run repeats."""

from __future__ import annotations

import csv
import glob
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitserve.model.bundle.evaluation import SUFFIXES, image_files

_COLUMNS = ("path", "file", "filename", "image")  # of a table


class SourceError(ValueError):
    """The source cannot be read, or has no images."""


@dataclass(frozen=True)
class Item:
    name: str  # as the output has it: a path, or the name in an archive
    read: Callable[[], bytes]  # may raise OSError


def items_of(source: str) -> list[Item]:
    """Raises SourceError."""
    path = Path(source)
    if path.is_dir():
        found = [_of_file(file) for file in image_files(path)]
    elif path.is_file() and tarfile.is_tarfile(path):
        found = _of_archive(path)
    elif path.is_file() and path.suffix == ".csv":
        found = _of_csv(path)
    elif path.is_file() and path.suffix == ".parquet":
        found = _of_parquet(path)
    elif path.is_file() and path.suffix.lower() in SUFFIXES:
        found = [_of_file(path)]
    elif path.exists():
        raise SourceError(f"{source} is no directory, image, .tar, .csv, or .parquet file")
    else:
        found = [_of_file(Path(match)) for match in sorted(glob.glob(source, recursive=True)) if Path(match).is_file()]
    if not found:
        raise SourceError(f"{source} has no images")
    return [replace(item, name=_in_one_line(item.name)) for item in found]


def _in_one_line(name: str) -> str:
    """As every output can have it: names of files may have any bytes."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\n", " ").replace("\r", " ")


def _of_file(path: Path) -> Item:
    return Item(str(path), path.read_bytes)


def _of_archive(path: Path) -> list[Item]:
    """Each image is read from its place in the file, on any thread."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
    except tarfile.ReadError as error:
        raise SourceError(f"{path} is compressed, so images cannot be read from their place; unpack it") from error

    def reader(member: tarfile.TarInfo) -> Callable[[], bytes]:
        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(member.offset_data)
                return file.read(member.size)

        return read

    images = [member for member in members if Path(member.name).suffix.lower() in SUFFIXES]
    return [Item(member.name, reader(member)) for member in images]


def _of_csv(path: Path) -> list[Item]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    column = _column(path, list(rows[0]) if rows else [])
    return [_of_file(path.parent / row[column]) for row in rows]


def _of_parquet(path: Path) -> list[Item]:
    """A column with paths, or with the bytes of images as datasets of Hugging Face have it."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    column = _column(path, table.column_names)
    items = []
    for number, value in enumerate(table.column(column).to_pylist()):
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, bytes):
            name = (value.get("path") if isinstance(value, dict) else None) or f"{path}:{number}"
            items.append(Item(name, _constant(content)))
        else:
            items.append(_of_file(path.parent / (value["path"] if isinstance(value, dict) else value)))
    return items


def _constant(content: bytes) -> Callable[[], bytes]:
    return lambda: content


def _column(path: Path, columns: Sequence[str]) -> Any:
    found = [column for column in columns if column.lower() in _COLUMNS]
    if not found:
        raise SourceError(
            f"{path} needs one of the columns {', '.join(_COLUMNS)}; it has {', '.join(columns) or 'none'}"
        )
    return found[0]
