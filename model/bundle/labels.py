"""labels.txt: one label a line, in UTF-8. If a label has a line break, the manifest has the labels too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LABELS = "labels.txt"


def write_labels(directory: Path, labels: Sequence[str]) -> tuple[str, ...] | None:
    """Writes labels.txt. Returns the labels for the manifest if one has a line break, which is a space in the file."""
    lines = [label.replace("\n", " ") for label in labels]
    # Not as text, which would change other characters that end a line.
    (directory / LABELS).write_bytes("".join(f"{line}\n" for line in lines).encode())
    return None if lines == list(labels) else tuple(labels)


def read_labels(directory: Path) -> tuple[str, ...]:
    """Raises OSError, and ValueError if the file is not UTF-8."""
    *labels, rest = (directory / LABELS).read_bytes().decode().split("\n")
    return tuple(labels if not rest else [*labels, rest])
