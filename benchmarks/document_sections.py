"""Rewrites the part of a document between two marks, so that its figures are those that were measured."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path


def check(path: Path, name: str) -> None:
    """Raises ValueError where there are no such marks: before anything is measured."""
    found = len(_between(name).findall(path.read_text(encoding="utf-8")))
    if found != 1:
        raise ValueError(f"{path} has {found} parts between <!-- {name} --> and <!-- /{name} -->; it must have one")


def rewrite(path: Path, name: str, text: str) -> None:
    check(path, name)
    kept = path.read_text(encoding="utf-8")
    path.write_text(_between(name).sub(lambda found: f"{found[1]}\n{text.strip()}\n{found[2]}", kept), encoding="utf-8")


def publish(path: Path, name: str, text: str, picture: Path) -> None:
    """The text between the marks, under its picture, which is copied beside the document."""
    shown = path.with_name(f"{path.stem}-{name}.svg")
    shutil.copyfile(picture, shown)
    rewrite(path, name, f"![{name}]({shown.name})\n\n{text}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {re.escape(name)} -->)\n.*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
