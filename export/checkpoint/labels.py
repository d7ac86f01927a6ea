"""The names of the classes: from a file that the user gives, or from another library's configuration."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitserve.export.checkpoint.configuration import Configuration
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.files import fault_of

_IMAGENET = Path(__file__).parent / "imagenet_labels.txt"
# Byte order marks, the longer ones first because UTF-16's begins UTF-32's.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_label_file(path: Path, encoding: str = "") -> tuple[str, ...]:
    """One label a line, or in a .json file a list or an object of index → label. Empty lines at the end do not count.

    Without an ``encoding``, a byte order mark gives it, or the zeros of UTF-16; the default is UTF-8.
    Raises CheckpointError naming the file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if fault := fault_of(path):
        raise CheckpointError(f"{path} {fault}")
    chosen = encoding or _encoding_of(content)
    try:
        text = content.decode(chosen)
    except LookupError as error:
        raise CheckpointError(f"unknown encoding {encoding!r} (--labels-encoding)") from error
    except UnicodeError as error:
        raise CheckpointError(
            f"{path} is not text in {chosen}: {error}; save it as UTF-8, or name its encoding with --labels-encoding"
        ) from error
    if path.suffix == ".json":
        return _from_json(path, text)
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return tuple(lines)


def labels_of(names: Any, classes: int, key: str) -> tuple[str, ...] | None:
    """The labels of a list, or of an object of index → label. None if there are none.

    ``key`` is where the configuration has them, for messages. Raises CheckpointError if they are not one for each
    class.
    """
    if names is None or names == [] or names == {}:
        return None
    if isinstance(names, Mapping):
        by_index = {str(index): name for index, name in names.items()}
        missing = [index for index in range(classes) if str(index) not in by_index]
        if missing or len(by_index) != classes:
            lacking = f", none for class {missing[0]}" if missing else ""
            raise CheckpointError(f"{key} has {len(by_index)} labels{lacking}; the model has {classes} classes")
        names = [by_index[str(index)] for index in range(classes)]
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise CheckpointError(f"{key} must be a list or an object of labels, not {type(names).__name__}")
    return checked_labels([str(name) for name in names], classes, key)


def checked_labels(labels: Sequence[str], classes: int, where: str) -> tuple[str, ...]:
    """Raises CheckpointError if the labels are not one for each class, or not text that UTF-8 can encode."""
    if len(labels) != classes:
        raise CheckpointError(f"{where} has {len(labels)} labels; the model has {classes} classes")
    for index, label in enumerate(labels):
        if not label.isascii() and any("\ud800" <= character <= "\udfff" for character in label):
            raise CheckpointError(f"label {index} of {where} is not valid text: {label!r}")
    return tuple(labels)


def default_labels(classes: int) -> tuple[str, ...]:
    """For a checkpoint without labels: ImageNet's for 1,000 classes, else class 0, class 1, …"""
    if classes == 1000:
        return tuple(_IMAGENET.read_text(encoding="utf-8").splitlines())
    return numbered_labels(classes)


def numbered_labels(classes: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(classes))


def timm_labels(
    root: Configuration, pretrained: Configuration, classes: int, notes: list[str]
) -> tuple[str, ...] | None:
    """timm writes label_names at the root of config.json or in pretrained_cfg, and the former applies.

    labels is the old name of label_names.
    label_descriptions only describe the names, so they are not labels.
    """
    named = [
        (f"{key} in {source.name}", names)
        for source in (root, pretrained)
        for key in ("label_names", "labels")
        if (names := source.take(key)) is not None
    ]
    described = [source.name for source in (root, pretrained) if source.take("label_descriptions") is not None]
    if named:
        where, names = named[0]
        return labels_of(names, classes, where)
    if described:
        notes.append(
            f"label_descriptions in {described[0]} are not used: without label_names their order is unknown;"
            " --labels names the classes"
        )
    return None


def _encoding_of(content: bytes) -> str:
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            return encoding
    # UTF-16 without a mark: every other byte of Latin letters is zero.
    even, odd = content[::2].count(0), content[1::2].count(0)
    if len(content) >= 4 and max(even, odd) > len(content) // 8:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"


def _from_json(path: Path, text: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(names, list | dict):
        raise CheckpointError(f"{path} must hold a list or an object of labels")
    return labels_of(names, len(names), str(path)) or ()
