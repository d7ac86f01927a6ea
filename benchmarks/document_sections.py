"""Replaces a section of a document with new results. HTML comments mark where the section begins and ends."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

_PATH_OPTIONS = (
    *("--bundle", "--graph", "--peers", "--environments", "--images", "--photos", "--models", "--output", "--docs"),
    *("--old", "--new"),
)


def check(path: Path, name: str) -> None:
    """Raises ValueError if the document does not have the section, before anything is measured."""
    count = len(_section(name).findall(path.read_text(encoding="utf-8")))
    if count != 1:
        raise ValueError(f"{path} has {count} sections from <!-- {name} --> to <!-- /{name} -->; it must have one")


def rewrite(path: Path, name: str, text: str) -> None:
    check(path, name)
    document = path.read_text(encoding="utf-8")
    updated = _section(name).sub(lambda match: f"{match[1]}\n{text.strip()}\n{match[2]}", document)
    path.write_text(updated, encoding="utf-8")


def publish(path: Path, name: str, text: str, plot: Path) -> None:
    """Writes the text into the section, below the plot, which is copied to the document's directory."""
    copied = path.with_name(f"{path.stem}-{name}.svg")
    shutil.copyfile(plot, copied)
    rewrite(path, name, f"![{name}]({copied.name})\n\n{text}")


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def command_line(words: Sequence[str]) -> str:
    """The options as shown in the document: a placeholder stands for each path of this machine."""
    shown = [before[2:].upper() if before in _PATH_OPTIONS else word for before, word in pairwise(["", *words])]
    return shlex.join(shown)


def _section(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {re.escape(name)} -->)\n.*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
