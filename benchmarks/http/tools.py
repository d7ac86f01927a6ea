"""The programs that the HTTP benchmark needs besides Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class ToolMissingError(RuntimeError):
    """A program is not installed. The message names it and the package that has it."""


def write_requests(requests: Sequence[bytes], directory: Path) -> list[Path]:
    """Writes each request to a file of its own, in the form that wrk.lua and load_generator.c read."""
    files = [directory / f"{number}.http" for number in range(len(requests))]
    for file, request in zip(files, requests, strict=True):
        file.write_bytes(request)
    return files
