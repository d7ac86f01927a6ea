"""Starts Python processes with the same interpreter, and without the working directory on the import path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_IMPORT_ROOT = Path(__file__).parents[
    2
]  # the directory that contains the package vitserve: a checkout or site-packages


def python_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs ``module``.

    ``-P`` keeps the working directory off the import path. It may contain a user's own vitserve.py or export.py.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def python_environment() -> dict[str, str]:
    """This process's environment, with a PYTHONPATH that contains the package vitserve."""
    path = os.pathsep.join(filter(None, [str(_IMPORT_ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}
