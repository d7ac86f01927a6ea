"""Schemathesis sends requests that it generates from the OpenAPI document, valid and invalid ones, with all checks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import ADMIN_KEY, serving
from tests.support.server import Server
from vitserve.model.bundle.bundle import Bundle


def schemathesis(url: str, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{url}/openapi.json",
        "--checks",
        "all",
        "--warnings",
        "off",
    ]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, "--no-color", "--warnings", "off", *options],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def check(url: str, directory: Path, *options: str) -> None:
    result = schemathesis(url, directory, *options, "--header", f"Authorization: Bearer {ADMIN_KEY}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 selected / 8 total" in result.stdout
    assert "No issues found" in result.stdout


@pytest.mark.slow
def test_generated_requests_get_the_documented_responses(server: Server, tmp_path: Path) -> None:
    check(server.url, tmp_path, "--phases", "fuzzing", "--max-examples", "10", "--seed", "1")


@pytest.mark.slow
def test_thousands_of_generated_requests_get_the_documented_responses(bundle: Bundle, tmp_path: Path) -> None:
    with serving("--bundle", str(bundle.path), environment={"VITSERVE_ADMIN_KEY": ADMIN_KEY}) as running:
        check(running.url, tmp_path, "--max-examples", "1000")
