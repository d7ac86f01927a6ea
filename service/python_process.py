"""How this package starts Python processes of its own: with the same interpreter, and never with code of the working directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_IMPORT_ROOT = Path(__file__).parents[2]  # the directory that holds the package vitserve: a checkout, or site-packages


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs ``module``. ``-P`` keeps the working directory out of its import path: users have files called service.py or export.py."""
    return [sys.executable, "-P", "-m", module, *arguments]


def python_environment() -> dict[str, str]:
    """This process's environment, with an import path on which the package vitserve is found."""
    path = os.pathsep.join(filter(None, [str(_IMPORT_ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}
