"""Helm, from the package helm-python-sdk, which contains Helm's own library. `make test` installs it on x86-64."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.manifests import Manifest


class HelmFailedError(Exception):
    """Helm rejected the values, or a template."""


class HelmChart:
    """A chart. The release is called ``my-release``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.lint: list[dict[str, Any]] = self._result()["lint"]

    def render(self, values: dict[str, Any]) -> list[Manifest]:
        """The objects. Raises HelmFailedError."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(values) + "\n")
        self._process.stdin.flush()
        result = self._result()
        if "error" in result:
            raise HelmFailedError(result["error"])
        return [document for text in result["rendered"] for document in yaml.safe_load_all(text) if document]

    def _result(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        return result


def is_installed() -> bool:
    return importlib.util.find_spec("helm_python") is not None


@contextmanager
def loaded(chart: Path) -> Iterator[HelmChart]:
    command = [sys.executable, "-m", "tests.support.helm_renderer", str(chart)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield HelmChart(process)
